"""Known answers: inputs with their certified outputs, replayed before a bundle serves."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from evalmode.bundle.certificate import (
    Certificate,
    Platform,
    PlatformDifference,
    relative_difference,
)
from evalmode.bundle.errors import BundleCorrupt, KnownAnswersDiffer
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, Frozen
from evalmode.bundle.npz import npz_of

Tensors = Mapping[str, npt.NDArray[np.generic]]
Run = Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """The inputs and outputs of one row, with a leading dimension of 1, and the text of the row.

    `text` is None for a model without a front end.
    """

    inputs: Tensors
    outputs: Tensors
    text: str | None = None


class Replay(Frozen):
    """The result of replaying the known answers of a bundle on this platform.

    `verdict` is "bitwise" on the certifying platform, and on every one if it is proved that the
    graph never rounds. On another platform it is "within tolerance". For a bundle without answers
    it is "no answers".
    """

    verdict: str
    answers: int
    largest_difference: float
    tolerance: float
    differences: tuple[PlatformDifference, ...] = Field(
        default=(), description="how this platform differs from the certifying one"
    )

    def __str__(self) -> str:
        if not self.differences:
            return self.verdict
        return f"{self.verdict} ({'; '.join(map(str, self.differences))})"


def pack(answers: tuple[KnownAnswer, ...]) -> bytes:
    """The bytes of known_answers.npz, which depend on the answers alone.

    Answer 3 has the arrays "3/text", "3/input/NAME" and "3/output/NAME". A text is the bytes of its
    UTF-8, in which a lone surrogate is allowed.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for index, answer in enumerate(answers):
        if answer.text is not None:
            text = answer.text.encode("utf-8", "surrogatepass")
            arrays[f"{index}/text"] = np.frombuffer(text, np.uint8)
        for name, tensor in answer.inputs.items():
            arrays[f"{index}/input/{name}"] = np.asarray(tensor)
        for name, tensor in answer.outputs.items():
            arrays[f"{index}/output/{name}"] = np.asarray(tensor)
    return npz_of(arrays)


def unpack(file: bytes) -> tuple[KnownAnswer, ...]:
    """The answers that `pack` wrote. Raises BundleCorrupt for any other bytes."""
    arrays: dict[int, dict[str, dict[str, npt.NDArray[np.generic]]]] = {}
    answers: list[KnownAnswer] = []
    try:
        with np.load(io.BytesIO(file), allow_pickle=False) as archive:
            for key in archive.files:
                index, kind, *name = key.split("/", 2)
                by_name = arrays.setdefault(int(index), {}).setdefault(kind, {})
                by_name[name[0] if name else ""] = archive[key]
        for _, kinds in sorted(arrays.items()):
            text = None
            if "text" in kinds:
                text = kinds["text"][""].tobytes().decode("utf-8", "surrogatepass")
            answers.append(KnownAnswer(inputs=kinds["input"], outputs=kinds["output"], text=text))
    # zipfile and numpy raise a dozen kinds of errors for other bytes, which share no base class.
    except Exception as error:
        raise BundleCorrupt(f"{KNOWN_ANSWERS_FILE} cannot be read: {error}") from error
    return tuple(answers)


def replay(
    answers: tuple[KnownAnswer, ...],
    run: Run,
    *,
    certificate: Certificate,
    platform: Platform,
    frontend: FrontEnd | None,
    twice: bool = True,
) -> Replay:
    """Run every known answer on `platform`, and compare it with the bundle.

    For each answer, in this order:
    1. With a front end, the text must be encoded to the certified ids.
    2. The model must have every output of the answer.
    3. A second run must give the same bits, which it does not if the model still drops.
       `twice=False` leaves this out if it was tested before.
    4. On the certifying platform the outputs must have the certified bits, and on every platform if
       the certificate is exact. Otherwise they may differ by the certified tolerance, but no label
       may change.

    Raises KnownAnswersDiffer, which names the first answer that fails.
    """
    differences = certificate.platform.differences(platform)
    bitwise = not differences or certificate.is_exact
    largest = 0.0
    for index, answer in enumerate(answers):
        if frontend is not None and answer.text is not None:
            ids = frontend.encode(answer.text).ids
            certified_ids = answer.inputs["input_ids"][0]
            # The certified ids are padded with zeros.
            if (
                len(ids) > len(certified_ids)
                or not np.array_equal(ids, certified_ids[: len(ids)])
                or certified_ids[len(ids) :].any()
            ):
                raise KnownAnswersDiffer(
                    f"known answer {index} is encoded to other ids than at its certification: the"
                    " front end's library or Unicode tables differ here (certified for"
                    f" {frontend.spec.model_dump_json()})"
                )

        outputs = run(answer.inputs)
        missing = sorted(answer.outputs.keys() - outputs.keys())
        if missing:
            raise KnownAnswersDiffer(
                f"known answer {index} names an output that the model does not have: {missing[0]!r}"
            )

        if twice:
            second = run(answer.inputs)
            for name, tensor in outputs.items():
                if tensor.shape != second[name].shape or bits(tensor) != bits(second[name]):
                    raise KnownAnswersDiffer(
                        f"known answer {index} does not repeat: output {name!r} has other bits in a"
                        " second run of the same session, as if a dropout is still on; export the"
                        " model again"
                    )

        for name, expected in answer.outputs.items():
            actual = outputs[name]
            difference = relative_difference(actual, expected)
            largest = max(largest, difference)
            has_same_bits = actual.tobytes() == expected.tobytes()
            has_same_labels = np.array_equal(actual.argmax(-1), expected.argmax(-1))
            if (
                (bitwise and not has_same_bits)
                or difference > certificate.tolerance
                or not has_same_labels
            ):
                allowed = "not one bit" if bitwise else f"at most {certificate.tolerance:g}"
                remedy = "export the model again on this platform"
                if certificate.is_exact:
                    remedy = (
                        "the certificate proves that no float32 rounds, so"
                        f" {platform.provider} computes with fewer bits here (float16, bfloat16 or"
                        " TF32): set it to float32, or use another provider"
                    )
                raise KnownAnswersDiffer(
                    f"known answer {index} is not reproduced: output {name!r} differs by"
                    f" {difference:.3e} standard deviations where {allowed} is allowed; {remedy}"
                )

    verdict = "bitwise" if bitwise else "within tolerance"
    if not answers:
        verdict = "no answers"  # nothing was compared
    return Replay(
        verdict=verdict,
        answers=len(answers),
        largest_difference=largest,
        tolerance=certificate.tolerance,
        differences=differences,
    )


def bits(tensor: npt.NDArray[np.generic]) -> bytes:
    """The bytes of a tensor, by which tensors of the same shape are compared.

    NumPy's bytes of an array of strings are addresses. Here each string follows its length, so that
    ["ab", "c"] and ["a", "bc"] have different bytes.
    """
    if tensor.dtype.hasobject:
        strings = [str(element).encode("utf-8", "surrogatepass") for element in tensor.flat]
        return b"".join(len(string).to_bytes(8, "little") + string for string in strings)
    return tensor.tobytes()
