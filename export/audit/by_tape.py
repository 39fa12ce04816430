"""Measuring where the noise meets the data: sound for a dropout anywhere inside a module, whatever
follows it.

If every element of a site's noise is replaced by one constant c and the training forward then
equals the eval forward, the noise's mean should be c: the downstream non-linearity is the same on
both sides. c is exact, the mean is measured. Does not know noise that reaches the data in no linear
way, or twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evalmode.export.audit import statistics as st
from evalmode.export.audit.augmentation import masks_spans
from evalmode.export.audit.balance import Balance
from evalmode.export.audit.isolated_site import IsolatedSite, rounding
from evalmode.export.audit.noise_tape import Application, NoiseTape, Reading
from evalmode.export.audit.site import Effect, Interval, Kind, Site, Unclear
from evalmode.export.audit.tensor_roles import Roles

_PROBES = 4
_UNLIKE = 1e-4  # how unlikely a call's mask must be to be judged anew
_MOST_PROBES = 64  # where a mask kept nothing so far


class PathChanged(Exception):  # noqa: N818 - read as a sentence: "raise PathChanged"
    """A forward that brings its noise to the data at other places than the first ones did."""


class TapeObserver:
    """An observer of the noise itself. `TapeObserver.of` says whether a site can be observed so."""

    def __init__(
        self,
        held: IsolatedSite,
        foreign: frozenset[int],
        parts: list[list[int]],
        effects: tuple[Effect, ...],
        *,
        count: int,
        repeats: bool = False,
    ) -> None:
        """`parts`: the applications, of `count`, by index, that each effect is made of.

        `repeats` says that one mask is used more than once: if twice on one path, its mean is not
        what it does there.
        """
        self.effects = effects
        self.repeats = repeats
        self._count = count
        self._held, self._foreign, self._parts = held, foreign, parts

    @classmethod
    def of(
        cls, held: IsolatedSite, p: float | None, *, augmented: bool = False
    ) -> TapeObserver | Unclear:
        """The observer of a site in training, or what stands in the way.

        `augmented` says that a mask of whole steps or features is meant to be one.
        """
        found = probe(held)
        if isinstance(found, Unclear):
            return found
        foreign, readings = found
        parts = _parts(readings)
        if not parts:
            return Unclear()
        if isinstance(parts, Unclear):
            return parts
        balance = Balance(
            lambda constants: read(held, foreign, constants)[1], held.run(training=False)
        )
        first = [readings[0].applications[part[0]] for part in parts]
        found_balances = balance.find(
            parts, [a.additive for a in first], _values(readings, parts), p
        )
        if isinstance(found_balances, Unclear):
            return found_balances
        step = rounding([*held.run(training=False), *held.call.tensors()])
        effects = tuple(
            _effect(a, c, step, augmented=augmented)
            for a, c in zip(first, found_balances, strict=True)
        )
        count = len(readings[0].applications)
        return cls(held, foreign, parts, effects, count=count, repeats=_repeats(readings[0]))

    def twin(self, sites: Sequence[Site]) -> Twin | None:
        """What tells calls that are like this one, which has been judged as `sites`."""
        if any(effect.law is not None for effect in self.effects):
            return None
        reading = read(self._held, self._foreign)[0]
        keeps = [site.keep_interval for site in sites]
        constants = {
            index: effect.balance
            for part, effect in zip(self._parts, self.effects, strict=True)
            for index in part
        }
        return Twin(self._foreign, reading, self._parts, constants, keeps)

    def balanced(self, *, watched: bool = False) -> list[Tensor]:
        """The output of one more training forward in which every noise is its balance."""
        constants = {
            index: effect.balance
            for part, effect in zip(self._parts, self.effects, strict=True)
            for index in part
        }
        return read(self._held, self._foreign, constants, watched=watched)[1]

    def draw(self) -> list[Tensor]:
        """The noise of one more forward."""
        reading, _ = read(self._held, self._foreign)
        if len(reading.applications) != self._count:
            raise PathChanged(_OTHER_PATH)
        return [gathered(reading, part) for part in self._parts]


@dataclass(frozen=True)
class Twin:
    """What a judged call showed, so that others of the same kind need three forwards and no test.

    Does not see a rate that depends on the sizes or values of tensors and that one mask of the call
    cannot tell from the first call's.
    """

    foreign: frozenset[int]
    reading: Reading
    parts: list[list[int]]
    constants: Mapping[int, float]
    keeps: list[Interval | None]

    def fits(self, held: IsolatedSite) -> bool:
        """Whether a call brings the same noises to the data, keeps as much, and gives eval's output
        where they are the same constants.
        """
        try:
            reading, _ = read(held, self.foreign)
            if len(reading.applications) != len(self.reading.applications) or reading.obstacles:
                return False
            if not all(map(_alike, reading.applications, self.reading.applications)):
                return False
            output = read(held, self.foreign, self.constants)[1]
        except (RuntimeError, NotImplementedError, TypeError):
            return False
        for part, keep in zip(self.parts, self.keeps, strict=True):
            noise = gathered(reading, part)
            kept, count = int((noise != 0).sum()), noise.numel()
            if keep is not None and st.exact_p(kept, max(count, 1), keep) < _UNLIKE:
                return False
        return Balance(lambda _: output, held.run(training=False)).equals(output)


def _alike(a: Application, b: Application) -> bool:
    scales = (a.before, a.after) == (b.before, b.after)
    return (
        a.additive == b.additive
        and a.noise.dim() == b.noise.dim()
        and scales
        and abs(_value(a) - _value(b)) <= 4 * max(a.step, b.step) * abs(_value(b))
    )


def gathered(reading: Reading, part: Sequence[int]) -> Tensor:
    """The noise of applications that are one effect: the tensor itself, or several of one shape
    stacked.
    """
    noises = [reading.applications[index].noise for index in part]
    return noises[0] if len(noises) == 1 else torch.stack(noises)


def read(
    held: IsolatedSite,
    foreign: frozenset[int],
    constants: Mapping[int, float] | None = None,
    *,
    training: bool = True,
    watched: bool = False,
) -> tuple[Reading, list[Tensor]]:
    """One forward of the site: what its tape shows, and the floating tensors of its output."""
    call = held.prepared()
    tape = NoiseTape(Roles(held.weights(), call.tensors(), foreign), constants)
    with tape:
        output = held.run_prepared(call, training=training, watched=watched)
    return tape.reading, output


def probe(
    held: IsolatedSite, *, training: bool = True
) -> tuple[frozenset[int], list[Reading]] | Unclear:
    """Which tensors from outside torch are random, and a few readings; Unclear when no two forwards
    are alike.
    """
    try:
        readings = [read(held, frozenset(), training=training)[0] for _ in range(_PROBES)]
        before = [reading.foreign for reading in readings]
        if len({tuple(tuple(t.shape) for t in found) for found in before}) != 1:
            return Unclear((_OTHER_PATH,))
        columns = zip(*before, strict=True)
        foreign = frozenset(
            i for i, column in enumerate(columns) if any(_differs(column[0], t) for t in column[1:])
        )
        if foreign:
            readings = [read(held, foreign, training=training)[0] for _ in range(_PROBES)]
        while len(readings) < _MOST_PROBES and not all(
            map(_seen, *(r.applications for r in readings))
        ):
            readings.append(read(held, foreign, training=training)[0])
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return Unclear((f"its forward cannot be watched: {error}",))
    if readings[0].obstacles:
        return Unclear(tuple(readings[0].obstacles))
    if (
        len({tuple(tuple(a.noise.shape) for a in reading.applications) for reading in readings})
        != 1
    ):
        return Unclear((_OTHER_PATH,))
    return foreign, readings


_OTHER_PATH = "its forward takes another path from call to call"


def _repeats(reading: Reading) -> bool:
    used = [
        draw
        for application in reading.applications
        for draw in application.draws
        if application.noise.any()
    ]
    return len(set(used)) < len(used)


def _seen(*applications: Application) -> bool:
    return any(bool(application.noise.any()) for application in applications)


def _differs(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(a, b)


def _parts(readings: list[Reading]) -> list[list[int]] | Unclear:
    """The applications that are one effect each; those whose noise is always 0 (a zero state's
    mask) are none.

    Unclear when two noises share a draw, as AlphaDropout's factor and offset do: their means do not
    multiply.
    """
    count = range(len(readings[0].applications))
    alive = [i for i in count if _seen(*(reading.applications[i] for reading in readings))]
    alive = [i for i in alive if readings[0].applications[i].draws]
    parts: list[list[int]] = []
    for index in alive:
        twin = next((part for part in parts if _same(readings, part[0], index)), None)
        if twin is None:
            parts.append([index])
        else:  # a mask that is used again is stacked on itself, and measured as one
            twin.append(index)
    for a, b in itertools.combinations(alive, 2):
        if readings[0].applications[a].draws & readings[0].applications[b].draws and not _equal(
            readings, a, b
        ):
            return Unclear(("the same random numbers reach the data in two ways",))
    return parts


def _same(readings: list[Reading], a: int, b: int) -> bool:
    """Whether two applications are alike: of one shape, kind and kept value."""
    pairs = [(reading.applications[a], reading.applications[b]) for reading in readings]
    return all(
        x.additive == y.additive
        and x.replaces == y.replaces
        and x.noise.shape == y.noise.shape
        and (x.before, x.after) == (y.before, y.after)
        and _value(x) == _value(y)
        for x, y in pairs
    )


def _equal(readings: list[Reading], a: int, b: int) -> bool:
    return all(
        torch.equal(reading.applications[a].noise, reading.applications[b].noise)
        for reading in readings
        if reading.applications[a].noise.shape == reading.applications[b].noise.shape
    )


def _value(application: Application) -> float:
    return float(application.noise.max()) if application.noise.numel() else 0.0


def _values(readings: list[Reading], parts: list[list[int]]) -> list[float]:
    return [max(_value(reading.applications[part[0]]) for reading in readings) for part in parts]


def _effect(application: Application, balance: float, step: float, *, augmented: bool) -> Effect:
    """With the scale that makes eval's factor 1 where the module scales before or after the
    mask.
    """
    if application.replaces or (augmented and masks_spans(application)):
        kept = abs(balance - 1) <= 1e-3  # else eval does more than leaving all as it is
        why = "" if kept else "it replaces values in training, and eval scales what it leaves"
        return Effect(balance=balance, rounding=step, law=Kind.AUGMENTED, why=why)
    before, after = application.before, application.after
    scales = (1.0, after, before, before * after)
    scale = next((s for s in scales if abs(balance * s - 1) <= 1e-3), 1.0)
    return Effect(
        balance=balance,
        additive=application.additive,
        scale=scale,
        rounding=max(step, application.step),
    )
