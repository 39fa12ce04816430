"""Measuring where the noise meets the data: exact for a dropout anywhere inside a module.

Replace every element of a site's noise by one constant c. If the training forward then equals the
eval forward, the mean of the noise should be c: all that follows the noise, linear or not, is the
same on both sides. c is exact; the mean is measured (`measure.py`).

Noise that reaches the data in two ways, or in no linear way, cannot be measured like this.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evalmode.export.audit import statistics
from evalmode.export.audit.augmentation import masks_spans
from evalmode.export.audit.balance import Balance, NoiseGroup
from evalmode.export.audit.isolated_site import IsolatedSite, rounding_step
from evalmode.export.audit.noise_tape import Application, NoiseTape, Reading
from evalmode.export.audit.site import Effect, Interval, Kind, SiteReport, Unclear
from evalmode.export.audit.tensor_roles import Roles

# Readings that find the random tensors and the applications. A small drop rate may keep all or
# drop all in some of them, so more follow while a mask has kept nothing at all.
_READINGS = 4
_MOST_READINGS = 64
# A call matches no fingerprint if a mask like its first one has a smaller probability than this.
# Smaller values would miss more differences; larger ones would cost more tests.
_UNLIKELY = 1e-4
# What a tape, or the user's code on a tape, raises where it cannot be watched.
TAPE_ERRORS = (RuntimeError, NotImplementedError, TypeError)
_PATH_VARIES = "its forward takes another path from call to call"


class PathChanged(Exception):  # noqa: N818 - read as a sentence: "raise PathChanged"
    """A forward applies its noise to the data in other places than the first readings."""


@dataclass(frozen=True)
class TapedRun:
    """One forward on a tape: its reading, and the floating point tensors of its output."""

    reading: Reading
    outputs: list[Tensor]


def run_on_tape(
    site: IsolatedSite,
    random_non_torch: frozenset[int],
    constants: Mapping[int, float] | None = None,
    *,
    training: bool = True,
    watched: bool = False,
) -> TapedRun:
    """Run one forward of the site on a tape.

    `random_non_torch` is that of `Roles`, `constants` are those of `NoiseTape`, and `watched` is
    that of `IsolatedSite.run`.
    """
    call = site.prepare()
    tape = NoiseTape(Roles(site.weights(), call.tensors(), random_non_torch), constants)
    with tape:
        outputs = site.run_prepared(call, training=training, watched=watched)
    return TapedRun(tape.reading, outputs)


@dataclass(frozen=True)
class TapeReadings:
    """A few readings, all with the same applications.

    `random_non_torch` holds the indices of the random tensors that torch did not make, for `Roles`.
    """

    random_non_torch: frozenset[int]
    readings: list[Reading]


def read_tapes(site: IsolatedSite, *, training: bool = True) -> TapeReadings | Unclear:
    """Run a site a few times on a tape. Unclear where the tape cannot follow the forwards."""

    def read(random_non_torch: frozenset[int]) -> Reading:
        return run_on_tape(site, random_non_torch, training=training).reading

    try:
        readings = [read(frozenset()) for _ in range(_READINGS)]
        non_torch = [reading.non_torch for reading in readings]
        if not _have_same_shapes(non_torch):
            return Unclear((_PATH_VARIES,))

        # A tensor that torch did not make, such as one from NumPy, is random if it differs from
        # forward to forward. The readings are then repeated with its role known.
        random_indices = set()
        for index, (first, *repeats) in enumerate(zip(*non_torch, strict=True)):
            if not all(torch.equal(first, tensor) for tensor in repeats):
                random_indices.add(index)
        random_non_torch = frozenset(random_indices)
        if random_non_torch:
            readings = [read(random_non_torch) for _ in range(_READINGS)]
        while len(readings) < _MOST_READINGS and not _has_each_kept_something(readings):
            readings.append(read(random_non_torch))
    except TAPE_ERRORS as error:
        return Unclear((f"its forward cannot be watched: {error}",))

    if readings[0].obstacles:
        return Unclear(tuple(readings[0].obstacles))
    if not _have_same_shapes([[a.noise for a in reading.applications] for reading in readings]):
        return Unclear((_PATH_VARIES,))
    return TapeReadings(random_non_torch, readings)


def _have_same_shapes(forwards: Sequence[Sequence[Tensor]]) -> bool:
    """Whether each forward has tensors of the same shapes, in the same order."""
    shapes = [[tensor.shape for tensor in tensors] for tensors in forwards]
    return all(other == shapes[0] for other in shapes)


def _has_each_kept_something(readings: list[Reading]) -> bool:
    """Whether the noise of each application was other than 0 in at least one reading."""
    # Not strict: readings of different lengths are refused later, with a reason.
    for applications in zip(*(reading.applications for reading in readings), strict=False):
        if not any(bool(application.noise.any()) for application in applications):
            return False
    return True


class TapeObserver:
    """Observes the noise itself, on a tape. `TapeObserver.of` decides whether a site allows it."""

    def __init__(
        self,
        site: IsolatedSite,
        random_non_torch: frozenset[int],
        groups: list[list[int]],
        effects: tuple[Effect, ...],
        *,
        application_count: int,
        reuses_mask: bool = False,
    ) -> None:
        """`groups` holds, for each effect, the indices of the applications that it consists of.

        `reuses_mask` says that one mask is used several times. If a path uses it twice, replacing
        it by its mean gives another result.
        """
        self.effects = effects
        self.reuses_mask = reuses_mask
        self.includes_inputs = site.includes_inputs
        self._site, self._random_non_torch, self._groups = site, random_non_torch, groups
        self._application_count = application_count

    @classmethod
    def of(
        cls, site: IsolatedSite, p: float | None, *, augmented: bool = False
    ) -> TapeObserver | Unclear:
        """The observer of a site in training, or why a tape cannot follow its noise.

        `p` is the declared drop rate. `augmented` says that the module augments its data, so that
        a mask of whole steps or features is meant.
        """
        tapes = read_tapes(site)
        if isinstance(tapes, Unclear):
            return tapes
        readings = tapes.readings
        groups = _group_applications(readings)
        if isinstance(groups, Unclear):
            return groups
        if not groups:
            return Unclear()

        # One constant per group makes the training forward equal eval's.
        balance = Balance(
            lambda constants: run_on_tape(site, tapes.random_non_torch, constants).outputs,
            site.run(training=False),
        )
        applications = readings[0].applications
        noise_groups = []
        for group in groups:
            # The applications of a group have one form, and one largest value in each reading.
            index = group[0]
            noise_group = NoiseGroup(
                indices=group,
                additive=applications[index].additive,
                largest=max(_largest(reading.applications[index]) for reading in readings),
            )
            noise_groups.append(noise_group)
        constants = balance.find(noise_groups, p=p)
        if isinstance(constants, Unclear):
            return constants

        rounding = rounding_step([*site.run(training=False), *site.call.tensors()])
        effects = []
        for group, constant in zip(groups, constants, strict=True):
            application = applications[group[0]]
            effects.append(_effect_of(application, constant, rounding, augmented=augmented))
        draws: list[int] = []
        for application in applications:
            if application.noise.any():
                draws += application.draws
        return cls(
            site,
            tapes.random_non_torch,
            groups,
            tuple(effects),
            application_count=len(applications),
            reuses_mask=len(set(draws)) < len(draws),
        )

    def draw(self) -> list[Tensor]:
        """The noise of one more forward, one tensor per effect. Raises PathChanged."""
        reading = run_on_tape(self._site, self._random_non_torch).reading
        if len(reading.applications) != self._application_count:
            raise PathChanged(_PATH_VARIES)
        return [_noise_of(reading, group) for group in self._groups]

    def balanced(self, *, watched: bool = False) -> list[Tensor]:
        """The output of one more training forward in which all noise is replaced by its balance."""
        constants = self._balances()
        return run_on_tape(self._site, self._random_non_torch, constants, watched=watched).outputs

    def fingerprint(self, reports: Sequence[SiteReport]) -> Fingerprint | None:
        """The fingerprint of the observed call; `reports` are those on it.

        None for augmentation, which has no keep interval to compare with.
        """
        if any(effect.pattern is not None for effect in self.effects):
            return None
        return Fingerprint(
            random_non_torch=self._random_non_torch,
            reading=run_on_tape(self._site, self._random_non_torch).reading,
            groups=self._groups,
            balances=self._balances(),
            keep_intervals=[report.keep_interval for report in reports],
        )

    def _balances(self) -> dict[int, float]:
        """The balance of each application, by its index."""
        balances = {}
        for group, effect in zip(self._groups, self.effects, strict=True):
            for index in group:
                balances[index] = effect.balance
        return balances


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """How a judged call behaved. A later call that matches it needs three forwards and no test.

    A match can miss a small dependence of the rate on the sizes or values of tensors: it compares a
    single mask.
    """

    random_non_torch: frozenset[int]
    reading: Reading
    groups: list[list[int]]
    balances: Mapping[int, float]
    keep_intervals: list[Interval | None]

    def matches(self, site: IsolatedSite) -> bool:
        """Whether the site's call behaves like the judged call.

        It must apply the same noise in the same order, keep about as much of it, and equal eval
        under the same constants.
        """
        applications = self.reading.applications
        try:
            reading = run_on_tape(site, self.random_non_torch).reading
            if len(reading.applications) != len(applications) or reading.obstacles:
                return False
            for a, b in zip(reading.applications, applications, strict=True):
                if a.additive != b.additive or a.noise.dim() != b.noise.dim():
                    return False
                difference = abs(_largest(a) - _largest(b))
                tolerance = 4 * max(a.step, b.step) * abs(_largest(b))
                if (a.before, a.after) != (b.before, b.after) or not difference <= tolerance:
                    return False
            output = run_on_tape(site, self.random_non_torch, self.balances).outputs
        except TAPE_ERRORS:
            return False

        for group, interval in zip(self.groups, self.keep_intervals, strict=True):
            # The noises of this call may have shapes that differ from one another.
            noises = [reading.applications[index].noise for index in group]
            kept_count = sum(int((noise != 0).sum()) for noise in noises)
            count = max(sum(noise.numel() for noise in noises), 1)
            # None: noise that is no mask keeps everything.
            if interval is not None and (
                statistics.exact_p(kept_count, count, interval) < _UNLIKELY
            ):
                return False
        return Balance(lambda _: output, site.run(training=False)).equals(output)


def _noise_of(reading: Reading, group: Sequence[int]) -> Tensor:
    """The noise of the applications of one effect: a tensor, or several of one shape stacked."""
    noises = [reading.applications[index].noise for index in group]
    return noises[0] if len(noises) == 1 else torch.stack(noises)


def _largest(application: Application) -> float:
    """The largest value of the noise, which for a mask is the value that it keeps."""
    return float(application.noise.max()) if application.noise.numel() else 0.0


def _group_applications(readings: list[Reading]) -> list[list[int]] | Unclear:
    """The indices of the applications, one group per effect. Applications of one form are a group.

    Noise that is always 0, such as the mask of a zero state, is no effect. Unclear where two
    different noises share a draw, as the factor and the offset of AlphaDropout do: the mean of both
    is not made up of their means.
    """
    first = readings[0].applications
    indices = []
    for index, application in enumerate(first):
        is_zero = not any(bool(reading.applications[index].noise.any()) for reading in readings)
        if application.draws and not is_zero:
            indices.append(index)

    groups: list[list[int]] = []
    for index in indices:
        for group in groups:
            if _have_one_form(readings, group[0], index):
                # A mask that is used several times is stacked on itself, and measured as one.
                group.append(index)
                break
        else:
            groups.append([index])

    for a, b in itertools.combinations(indices, 2):
        if not first[a].draws & first[b].draws:
            continue
        for reading in readings:
            x, y = reading.applications[a].noise, reading.applications[b].noise
            if x.shape == y.shape and not torch.equal(x, y):
                return Unclear(("the same random numbers reach the data in two ways",))
    return groups


def _have_one_form(readings: list[Reading], a: int, b: int) -> bool:
    """Whether two applications have the same form, scales and largest value in every reading."""
    for reading in readings:
        x, y = reading.applications[a], reading.applications[b]
        if (x.additive, x.replaces, x.noise.shape) != (y.additive, y.replaces, y.noise.shape):
            return False
        if (x.before, x.after, _largest(x)) != (y.before, y.after, _largest(y)):
            return False
    return True


def _effect_of(
    application: Application, balance: float, rounding: float, *, augmented: bool
) -> Effect:
    """The effect of an application whose noise must have the mean `balance`."""
    if application.replaces or (augmented and masks_spans(application)):
        # In eval nothing is replaced, so 1 is the only balance of an augmentation.
        is_pure = abs(balance - 1) <= 1e-3
        remark = "" if is_pure else "it replaces values in training, and eval scales what it leaves"
        return Effect(balance=balance, rounding=rounding, pattern=Kind.AUGMENTED, remark=remark)

    # The module may scale just before or just after the mask. Of these factors, the user's scale
    # contains those that make the eval factor 1.
    before, after = application.before, application.after
    scale = 1.0
    for factor in (1.0, after, before, before * after):
        if abs(balance * factor - 1) <= 1e-3:
            scale = factor
            break
    return Effect(
        balance=balance,
        additive=application.additive,
        scale=scale,
        rounding=max(rounding, application.step),
    )
