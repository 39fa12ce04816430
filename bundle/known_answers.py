"""Inputs with their expected outputs, kept in the bundle and replayed wherever it is opened to
serve.

Knows neither ONNX Runtime nor HTTP: it is given `run`.
"""

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
    """One input of one row, as tensors with a leading dimension of 1, its output, and the text it
    came from.
    """

    inputs: Tensors
    outputs: Tensors
    text: str | None = None


class Replay(Frozen):
    """How the known answers came out here: bit for bit on the certifying platform, within the
    tolerance elsewhere.
    """

    verdict: str
    answers: int
    largest_difference: float
    tolerance: float
    differences: tuple[PlatformDifference, ...] = Field(
        default=(), description="in what this platform is not the certifying one"
    )

    def __str__(self) -> str:
        if not self.differences:
            return self.verdict
        return f"{self.verdict} ({'; '.join(map(str, self.differences))})"


def pack(answers: tuple[KnownAnswer, ...]) -> bytes:
    """The file: an .npz without pickles whose bytes depend on the answers alone."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for index, answer in enumerate(answers):
        if answer.text is not None:
            arrays[f"{index}/text"] = np.frombuffer(
                answer.text.encode("utf-8", "surrogatepass"), np.uint8
            )
        arrays |= {
            f"{index}/input/{name}": np.asarray(tensor) for name, tensor in answer.inputs.items()
        }
        arrays |= {
            f"{index}/output/{name}": np.asarray(tensor) for name, tensor in answer.outputs.items()
        }
    return npz_of(arrays)


def unpack(file: bytes) -> tuple[KnownAnswer, ...]:
    """The answers of `pack`; raises BundleCorrupt for bytes that are not such a file."""
    found: dict[int, dict[str, dict[str, npt.NDArray[np.generic]]]] = {}
    try:
        with np.load(io.BytesIO(file), allow_pickle=False) as arrays:
            for key in arrays.files:
                index, kind, *name = key.split("/", 2)
                found.setdefault(int(index), {}).setdefault(kind, {})[name[0] if name else ""] = (
                    arrays[key]
                )
        return tuple(
            KnownAnswer(
                inputs=parts["input"],
                outputs=parts["output"],
                text=(
                    parts["text"][""].tobytes().decode("utf-8", "surrogatepass")
                    if "text" in parts
                    else None
                ),
            )
            for _, parts in sorted(found.items())
        )
    # zipfile and numpy raise a dozen kinds, without a common base, for bytes not theirs
    except Exception as error:
        raise BundleCorrupt(f"{KNOWN_ANSWERS_FILE} cannot be read: {error}") from error


def replay(
    answers: tuple[KnownAnswer, ...],
    run: Run,
    *,
    certificate: Certificate,
    platform: Platform,
    frontend: FrontEnd | None,
    twice: bool = True,
) -> Replay:
    """Run every known answer twice, and compare it with itself and with what the bundle says.

    Both runs must give the same bits: a model that still drops does not. With `twice=False`, where
    that is known already, each runs once. On the certifying platform
    these must be the certified bits. On another one the difference must stay within the certified
    tolerance and no label may flip. Where there is a front end, each text must still give the very
    ids it was certified with. Raises KnownAnswersDiffer, naming the first answer that does not come
    out.
    """
    differences = certificate.platform.differences(platform)
    bitwise = not differences
    largest = 0.0
    for index, answer in enumerate(answers):
        if frontend is not None and answer.text is not None:
            _same_ids(index, answer, frontend)
        actual = run(answer.inputs)
        if unknown := sorted(answer.outputs.keys() - actual.keys()):
            raise KnownAnswersDiffer(
                f"known answer {index} names an output that the model has not: {unknown[0]!r}"
            )
        if twice:
            _require_same_bits(index, actual, run(answer.inputs))
        for name, expected in answer.outputs.items():
            difference = relative_difference(actual[name], expected)
            largest = max(largest, difference)
            same = actual[name].tobytes() == expected.tobytes()
            flipped = not np.array_equal(actual[name].argmax(-1), expected.argmax(-1))
            if (bitwise and not same) or difference > certificate.tolerance or flipped:
                allowed = "not one bit" if bitwise else f"at most {certificate.tolerance:g}"
                raise KnownAnswersDiffer(
                    f"known answer {index} does not come out: output {name!r} differs by"
                    f" {difference:.3e} standard deviations where {allowed} is allowed; export the"
                    " model again on this platform"
                )
    verdict = "bitwise" if bitwise else "within tolerance"
    return Replay(
        verdict=verdict if answers else "no answers",  # nothing was replayed, so nothing held
        answers=len(answers),
        largest_difference=largest,
        tolerance=certificate.tolerance,
        differences=differences,
    )


def bits(tensor: npt.NDArray[np.generic]) -> bytes:
    """The bytes by which two tensors of one shape are compared.

    Strings are objects, whose own bytes are mere addresses; each is told from the next by its
    length.
    """
    if tensor.dtype.hasobject:
        spelled = [str(element).encode("utf-8", "surrogatepass") for element in tensor.flat]
        return b"".join(len(element).to_bytes(8, "little") + element for element in spelled)
    return tensor.tobytes()


def _require_same_bits(index: int, first: Tensors, second: Tensors) -> None:
    for name, tensor in first.items():
        if tensor.shape != second[name].shape or bits(tensor) != bits(second[name]):
            raise KnownAnswersDiffer(
                f"known answer {index} is not the same twice: output {name!r} has other bits in a"
                " second run of the same session, as where a dropout is still on; export the model"
                " again"
            )


def _same_ids(index: int, answer: KnownAnswer, frontend: FrontEnd) -> None:
    assert answer.text is not None
    ids, certified = frontend.encode(answer.text).ids, answer.inputs["input_ids"][0]
    if (
        len(ids) > len(certified)
        or not np.array_equal(ids, certified[: len(ids)])
        or certified[len(ids) :].any()
    ):
        raise KnownAnswersDiffer(
            f"known answer {index} is encoded to other ids than when it was certified: the front"
            " end's library or Unicode tables differ here (certified for"
            f" {frontend.spec.model_dump_json()})"
        )
