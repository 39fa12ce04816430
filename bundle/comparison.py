"""The same rows under other settings: how many of them get other bits.

The reference is one row at a time, padded as the service pads it, on one thread of the CPU provider
with all optimisations. Each setting changes one thing: the level of optimisation, the threads, the
rows that share a batch, the padding, the rounding mode of the processor, or the provider.

Shapes: T positions, G ids a position.
"""

from __future__ import annotations

import ctypes
import math
import platform as machine
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from evalmode.bundle.errors import BundleError, ProviderUnavailable
from evalmode.bundle.frontend import FrontEndSpec, Ids, collate
from evalmode.bundle.known_answers import Tensors, bits
from evalmode.bundle.row_counts import rows_by_length, stack
from evalmode.bundle.session import Optimisation, Session, open_session
from evalmode.bundle.store import Bundle

Rounding: TypeAlias = Literal["nearest", "down", "up", "toward zero"]
Padding: TypeAlias = Literal["ladder", "none", "longest"]
# Ids (T,) or (T, G) that are not padded yet, or the inputs of a model without a front end.
Row: TypeAlias = Ids | Tensors

# The arguments of C's `fesetround`, by the architecture: <bits/fenv.h> of glibc.
_X86_ROUNDING = {"nearest": 0, "down": 0x400, "up": 0x800, "toward zero": 0xC00}
_ARM_ROUNDING = {"nearest": 0, "up": 0x400000, "down": 0x800000, "toward zero": 0xC00000}
_ROUNDING_CODES = {"x86_64": _X86_ROUNDING, "aarch64": _ARM_ROUNDING}

OTHER_ROUNDINGS: tuple[Rounding, ...] = ("down", "up", "toward zero")
"""The modes beside the default one; empty on a processor whose codes are not known."""
if machine.machine() not in _ROUNDING_CODES:
    OTHER_ROUNDINGS = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How rows are run.

    Attributes:
        provider: the short name of an execution provider.
        optimisation: how far ONNX Runtime may rewrite the graph.
        threads: the threads of one run.
        batch_rows: the rows of a batch. The last batch may have fewer.
        padding: "ladder" pads a row to the next length of the bundle's ladder, "none" to its own
            length, and "longest" to the longest length of the ladder.
        rounding: the rounding mode of the processor while the model runs.
    """

    provider: str = "cpu"
    optimisation: Optimisation = "all"
    threads: int = 1
    batch_rows: int = 1
    padding: Padding = "ladder"
    rounding: Rounding = "nearest"

    def __str__(self) -> str:
        """What differs from the reference: "optimisation off", "cuda, batches of 32"."""
        parts = []
        if self.provider != "cpu":
            parts.append(self.provider)
        if self.optimisation != "all":
            parts.append(f"optimisation {self.optimisation}")
        if self.threads != 1:
            parts.append(f"{self.threads} threads")
        if self.batch_rows != 1:
            parts.append(f"batches of {self.batch_rows}")
        if self.padding == "none":
            parts.append("no padding")
        if self.padding == "longest":
            parts.append("padded to the longest")
        if self.rounding != "nearest":
            parts.append(f"rounding {self.rounding}")
        return ", ".join(parts) or "a second run"


REFERENCE = Setting()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answers of one setting beside those of the reference.

    Attributes:
        setting: how the rows were run.
        rows: the number of rows.
        differing: rows with other bits in any output.
        largest: the largest difference of any number; None if one of them is not finite.
        changed_labels: rows whose first output is largest at another index.
        refusal: why the setting cannot run here; empty where it ran.
    """

    setting: Setting
    rows: int
    differing: int = 0
    largest: float | None = 0.0
    changed_labels: int = 0
    refusal: str = ""


def settings_for(bundle: Bundle, providers: Sequence[str] = ()) -> list[Setting]:
    """The settings that every processor has, and each of `providers` at one row and in batches.

    Only rows of a front end are padded. A model whose axis of rows is fixed has no batches.
    """
    settings = [
        REFERENCE,
        Setting(optimisation="off"),
        Setting(optimisation="basic"),
        Setting(optimisation="extended"),
        Setting(threads=2),
        Setting(batch_rows=2),
        Setting(batch_rows=7),
        Setting(batch_rows=32),
        Setting(batch_rows=64, padding="longest"),
        Setting(padding="none"),
        Setting(padding="longest"),
    ]
    settings += [Setting(rounding=mode) for mode in OTHER_ROUNDINGS]
    for provider in providers:
        settings.append(Setting(provider=provider))
        settings.append(Setting(provider=provider, batch_rows=32))

    tensors = [*bundle.manifest.inputs, *bundle.manifest.outputs]
    can_batch = all(tensor.shape[:1] == (-1,) for tensor in tensors)
    can_pad = bundle.manifest.frontend is not None
    return [
        setting
        for setting in settings
        if (can_batch or setting.batch_rows == 1) and (can_pad or setting.padding == "ladder")
    ]


def rows_of(bundle: Bundle, texts: Sequence[str] = (), *, count: int) -> list[Row]:
    """At most `count` rows to compare.

    With a front end they are ids (T,) or (T, G): those of `texts`, or without texts those of the
    known answers and of pieces of them at every length. Without a front end they are the inputs of
    the known answers.

    Raises BundleError for texts without a front end, and for a bundle without any rows.
    """
    frontend = bundle.frontend()
    if frontend is None and texts:
        raise BundleError(f"{bundle.path} takes tensors and no texts: leave out --texts")
    answers = bundle.known_answers()
    if not answers and not texts:
        raise BundleError(f"{bundle.path} has no known answers: give texts with --texts")
    if frontend is None:
        return [answer.inputs for answer in answers[:count]]
    if texts:
        return [frontend.encode(text).ids for text in texts[:count]]

    rows = [frontend.encode(answer.text or "").ids for answer in answers]
    # Rows with more and with fewer positions than the texts have.
    each = -(-count // len(frontend.spec.lengths))
    for pieces in rows_by_length(rows, frontend.spec, each=each).values():
        for piece in pieces:
            ids = np.asarray(piece["input_ids"][0], np.int64)
            positions = np.nonzero(ids)[0]  # padding has id 0
            rows.append(ids[: int(positions.max(initial=0)) + 1])
    return list(rows[:count])


def compare(
    bundle: Bundle,
    rows: Sequence[Row],
    settings: Sequence[Setting],
    *,
    progress: Callable[[Setting], None] = lambda setting: None,
) -> list[Comparison]:
    """Run `rows` under the reference and under each setting, and compare every output bit for bit.

    `progress` is called with each setting before it runs. A provider that is missing here gives a
    comparison with a `refusal`.
    """
    spec = bundle.manifest.frontend
    sessions: dict[tuple[str, str, int], Session] = {}
    reference = _answers(bundle.model, rows, REFERENCE, spec=spec, sessions=sessions)
    comparisons = []
    for setting in settings:
        progress(setting)
        try:
            answers = _answers(bundle.model, rows, setting, spec=spec, sessions=sessions)
        except ProviderUnavailable as error:
            comparisons.append(Comparison(setting=setting, rows=len(rows), refusal=str(error)))
            continue
        differing = changed_labels = 0
        largest = 0.0
        for answer, expected in zip(answers, reference, strict=True):
            if any(bits(answer[name]) != bits(expected[name]) for name in expected):
                differing += 1
                largest = max(largest, _largest_difference(answer, expected))
                first = next(iter(expected))
                changed_labels += int(answer[first].argmax() != expected[first].argmax())
        comparisons.append(
            Comparison(
                setting=setting,
                rows=len(rows),
                differing=differing,
                largest=largest if math.isfinite(largest) else None,
                changed_labels=changed_labels,
            )
        )
    return comparisons


def _answers(
    model: bytes,
    rows: Sequence[Row],
    setting: Setting,
    *,
    spec: FrontEndSpec | None,
    sessions: dict[tuple[str, str, int], Session],
) -> list[Tensors]:
    """The answer of each row, every output by name, with a leading dimension of 1."""
    key = (setting.provider, setting.optimisation, setting.threads)
    if key not in sessions:
        sessions[key] = open_session(
            model,
            provider=setting.provider,
            optimisation=setting.optimisation,
            threads=setting.threads,
        )
    session = sessions[key]

    # The rows of a batch have one shape. They are taken in a fixed random order, so that each has
    # other neighbours at every batch size.
    order = np.random.default_rng(setting.batch_rows).permutation(len(rows)).tolist()
    padded_rows: dict[int, Tensors] = {}
    indices_by_shape: dict[tuple[object, ...], list[int]] = {}
    for index in order:
        padded_rows[index] = _padded(rows[index], setting.padding, spec)
        shape = tuple((name, tensor.shape) for name, tensor in padded_rows[index].items())
        indices_by_shape.setdefault(shape, []).append(index)

    answers: list[Tensors] = [{} for _ in rows]
    for indices in indices_by_shape.values():
        for start in range(0, len(indices), setting.batch_rows):
            batch = indices[start : start + setting.batch_rows]
            inputs = stack([padded_rows[index] for index in batch], count=len(batch))
            # A graph may take no attention mask.
            graph_inputs = {tensor.name: inputs[tensor.name] for tensor in session.inputs}
            with rounding_mode(setting.rounding):
                outputs = session.run(graph_inputs)
            if len(batch) == 1:
                answers[batch[0]] = outputs
                continue
            for position, index in enumerate(batch):
                answers[index] = {
                    name: tensor[position : position + 1] for name, tensor in outputs.items()
                }
    return answers


def _padded(row: Row, padding: Padding, spec: FrontEndSpec | None) -> Tensors:
    """The inputs of a row, with a leading dimension of 1."""
    if isinstance(row, Mapping):
        return row
    assert spec is not None, "ids come from a front end"
    length = len(row)
    if padding == "ladder":
        length = spec.padded_length(len(row))
    elif padding == "longest":
        length = spec.lengths[-1]
    return collate([row], length=length)


def _largest_difference(answer: Tensors, expected: Tensors) -> float:
    """The largest difference of two numbers; infinite if one of them is not finite."""
    largest = 0.0
    for name, tensor in expected.items():
        if tensor.dtype.kind not in "fiub" or tensor.size == 0:
            continue
        with np.errstate(invalid="ignore"):
            differences = np.abs(answer[name].astype(np.float64) - tensor.astype(np.float64))
        difference = float(differences.max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


@contextmanager
def rounding_mode(mode: Rounding) -> Iterator[None]:
    """Inside, this thread rounds in this mode, and so do the kernels of a run on one thread.

    No bit of a network that never rounds depends on it, but for the sign of a zero: x - x is -0.0
    in the mode "down". Round and QuantizeLinear are the exceptions: ONNX Runtime 1.31 computes them
    with `nearbyint`, which follows the mode and then gives other integers.
    """
    if mode == "nearest":
        yield
        return
    codes = _ROUNDING_CODES[machine.machine()]
    fesetround = ctypes.CDLL(None).fesetround
    fesetround(codes[mode])
    try:
        yield
    finally:
        fesetround(codes["nearest"])
