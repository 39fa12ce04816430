"""Finding the sites: which modules draw in training, which in eval, which are a dropout by name,
and the calls that reach them.

Up to eight calls of a site are kept, those of different kinds first. Does not know what a site does
with its draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from evalmode.export.audit.call import Call, CallKind, state_before
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.module.dropouts import declared_rate, should_drop
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.randomness import Draw, Unwatched, draws

Sample = Mapping[str, Tensor]

MOST_CALLS = 8  # of one site that are kept to be judged
_MORE_PASSES = 16  # forwards beside one a sample, where layers are skipped at random


@dataclass(frozen=True, kw_only=True)
class PossibleSite:
    """What may be a site: a module's path, its draws in the two modes, the calls to judge (none: no
    sample reaches it).

    `kinds` and `numbers` belong to `calls`, and a number counts a call among all of the site's.
    `count` is the number of its calls in all samples' forwards. `left_out` counts those whose
    arguments are unlike those of all `calls`, and `drifted` those before which the module held
    other numbers. `trains` is its training flag after the root's `train()`, which a module may
    refuse.
    """

    path: str
    kind: str
    p: float | None
    training: tuple[Draw, ...]
    eval: tuple[Draw, ...]
    calls: tuple[Call, ...]
    kinds: tuple[CallKind, ...]
    numbers: tuple[int, ...]
    count: int
    drifted: int
    left_out: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """The possible sites in the order of the modules, and what went wrong on the way.

    `network` is a copy in eval mode to judge the sites in, and `trains` the training flags of its
    parts after the root's `train()`. `ran` are the samples, by index, on which the training forward
    ran, and none when no eval forward did; `ran_in_eval` are those on which the eval forward ran.
    """

    network: Network
    trains: Mapping[str, bool]
    sites: tuple[PossibleSite, ...]
    failures: tuple[str, ...]
    ran: tuple[int, ...]
    ran_in_eval: tuple[int, ...]


def find(network: Network, samples: Sequence[Sample], *, seed: int) -> Search:
    """Every possible site of a network, which the caller puts back (see `untouched`).

    Raises UnusableInputs where no sample runs in either mode.
    """
    # A copy for each use, and no more than two at a time: a forward may exchange its module's parts
    # or use up an iterator, and what is measured afterwards would be another network.
    copied = network.copy(parameters=True)
    copied.module.eval()
    in_eval = _Draws.of(copied, samples, seed=seed)
    copied = network.copy(parameters=True)
    copied.module.train()
    flags = {path: part.training for path, part in copied.parts.items()}
    in_training = _Draws.of(copied, samples, seed=seed)
    in_training.reach(copied, samples, in_eval.reached, seed=seed)
    ran, others = in_training.ran, in_eval.failures
    if not ran and not in_eval.ran and not any(isinstance(error, Unwatched) for error in others):
        reason = _described(others[0]).strip().partition("\n")[0]
        kind = type(network.module).__name__
        raise UnusableInputs(f"{kind} fails on every sample, in eval mode too: {reason}")
    if not in_eval.ran:
        ran = []
    # What cannot be copied ran itself, and may have made parts or exchanged them.
    network = Network.of(network.module)
    drawn, always = in_training.drawn, in_eval.drawn
    paths = [
        path
        for path, part in network.parts.items()
        if path in drawn
        or path in always
        or (should_drop(part) and declared_rate(part) is not None)
    ]
    copied = network.copy(parameters=True)
    copied.module.train()
    captured = _captured(
        copied, [samples[index] for index in ran], paths, in_training.reached, seed=seed
    )
    judged = Network.of(network.module).copy(parameters=True)
    judged.module.eval()
    sites = [
        PossibleSite(
            path=path,
            kind=type(network.parts[path]).__name__,
            p=_rate(network.parts[path], (*drawn.get(path, ()), *always.get(path, ()))),
            training=tuple(drawn.get(path, ())),
            eval=tuple(always.get(path, ())),
            calls=tuple(captured[path].calls),
            kinds=tuple(captured[path].kinds),
            numbers=tuple(captured[path].numbers),
            count=captured[path].count,
            drifted=captured[path].drifted,
            left_out=captured[path].left_out,
            trains=flags.get(path, True),
        )
        for path in paths
    ]
    return Search(
        network=judged,
        trains=flags,
        sites=tuple(sites),
        failures=(
            *(
                f"in training mode on a sample: {_described(error)}"
                for error in in_training.failures
            ),
            *(f"in eval mode on a sample: {_described(error)}" for error in others),
        ),
        ran=tuple(ran),
        ran_in_eval=tuple(in_eval.ran),
    )


def _described(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _rate(part: nn.Module, drawn: Sequence[Draw]) -> float | None:
    """The one rate that the calls give, else the one that the module holds."""
    rates = {draw.p for draw in drawn if draw.p is not None}
    return rates.pop() if len(rates) == 1 else declared_rate(part)


@dataclass
class _Draws:
    """What forwards in one mode showed: the draws by the path of the innermost module that has one,
    the parts that were called, the samples that ran, and what the others raised.
    """

    drawn: dict[str, dict[Draw, None]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    ran: list[int] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    @classmethod
    def of(cls, network: Network, samples: Sequence[Sample], *, seed: int) -> _Draws:
        """One forward a sample."""
        seen = cls()
        for index, sample in enumerate(samples):
            try:
                seen._run(network, sample, seed + index)
            # the user's own code, in a mode that may be new to it; or what cannot be watched
            except Exception as error:
                seen.failures.append(error)
            else:
                seen.ran.append(index)
        return seen

    def reach(
        self, network: Network, samples: Sequence[Sample], parts: set[str], *, seed: int
    ) -> None:
        """Run again while a module that draws has not called all that it calls in eval: LayerDrop
        skips layers, and a site inside of one would never be seen.
        """
        for repeat in range(_MORE_PASSES if self.ran else 0):
            if not _missing(parts - self.reached, self.drawn):
                return
            index = self.ran[repeat % len(self.ran)]
            try:
                self._run(network, samples[index], seed + 7919 * (repeat + 1))
            except Exception:  # a forward that runs only so often
                return

    def _run(self, network: Network, sample: Sample, seed: int) -> None:
        names = {id(part): path for path, part in network.parts.items()}

        def hook(module: nn.Module, _inputs: object) -> None:
            self.reached.add(names.get(id(module), ""))

        seed_everything(seed)
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(hook).remove)
            seen = draws(network.module, Call.of((), sample).kwargs)
        for draw in seen:
            # "blocks.0 > unregistered": a module made while running belongs to the one that made
            # it.
            path = draw.path.partition(" > ")[0]
            self.drawn.setdefault("" if path == "(root)" else path, {})[draw] = None


def _missing(parts: set[str], drawn: Mapping[str, object]) -> bool:
    """Whether any of these parts lies inside of a module that draws."""
    return any(not path or part.startswith(f"{path}.") for part in parts for path in drawn)


@dataclass
class _Captured:
    """The calls of one path: at most MOST_CALLS, of as many kinds as there are."""

    calls: list[Call] = field(default_factory=list)
    kinds: list[CallKind] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    count: int = 0
    drifted: int = 0
    left_out: int = 0

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Mapping[Any, Any]) -> None:
        self.count += 1
        kind = CallKind.of(args, kwargs, state)
        blank = next(
            (
                index
                for index, other in enumerate(self.kinds)
                if other == kind and self.calls[index].emptiness()
            ),
            None,
        )
        if blank is not None:  # one that carries values takes the place of one that does not
            call = Call.of(args, kwargs, state)
            self.calls[blank] = self.calls[blank] if call.emptiness() else call
            return
        repeats = [index for index, other in enumerate(self.kinds) if other in self.kinds[:index]]
        if len(self.calls) < MOST_CALLS:
            self.calls.append(Call.of(args, kwargs, state))
            self.kinds.append(kind)
            self.numbers.append(self.count)
        elif kind in self.kinds:
            pass
        elif repeats:
            self.calls[repeats[-1]] = Call.of(args, kwargs, state)
            self.kinds[repeats[-1]] = kind
            self.numbers[repeats[-1]] = self.count
        else:
            known = {other.arguments for other in self.kinds}
            self.left_out += kind.arguments not in known
            self.drifted += kind.arguments in known


def _captured(
    network: Network,
    samples: Sequence[Sample],
    paths: Sequence[str],
    reached: set[str],
    *,
    seed: int,
) -> dict[str, _Captured]:
    """The calls of each path in training forwards: one a sample, and more while a path that was
    reached before is not.
    """
    captured = {path: _Captured() for path in paths}

    def watch(stack: ExitStack, path: str) -> None:
        inside = Network.of(network.parts[path]).parts

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[path].add(args, kwargs, state_before(inside))

        stack.callback(network.parts[path].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def run(sample: Sample, seed: int) -> None:
        seed_everything(seed)
        network.module(**Call.of((), sample).kwargs)

    with ExitStack() as stack, plain_forward(), torch.no_grad():
        for path in paths:
            watch(stack, path)
        for index, sample in enumerate(samples):
            run(sample, seed + index)
        for repeat in range(_MORE_PASSES):
            if not samples or all(captured[path].count for path in paths if path in reached):
                break
            try:
                run(samples[repeat % len(samples)], seed + 7919 * (repeat + 1))
            except Exception:  # a forward that runs only so often
                break
    return captured
