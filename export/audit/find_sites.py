"""Finding the sites: which modules draw in training, which in eval, which are a dropout by name,
and what reaches them.

A site's input is that of its first call in a training forward, or of the first that carries values
where that one does not. Does not know what a site does with its draws.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.module.dropouts import declared_rate, should_drop
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.randomness import Draw, Unwatched, draws

Sample = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one call, in copies of their own; their tensors may be of any shape and
    dtype.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Copies: an in-place dropout writes to its argument. What was one tensor stays one
        (self-attention asks).
        """
        copies: dict[int, Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copies.setdefault(id(value), value.detach().clone())
            return _copied_object(value)

        return cls(*pytree.tree_map(copied, (tuple(args), dict(kwargs))))

    def again(self) -> Call:
        """The same call, in fresh copies."""
        return Call.of(self.args, self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return [
            leaf
            for leaf in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(leaf, Tensor)
        ]

    def emptiness(self) -> str:
        """What its floating tensors are where they show no mask; "" where they carry values, or
        there are none.
        """
        tensors = self.tensors()
        if tensors and not any(tensor.numel() for tensor in tensors):
            return "empty"
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        return "" if not floats or carry_values(floats) else _emptiness(floats)


def carry_values(floats: Sequence[Tensor]) -> bool:
    """Whether any element is finite and not zero."""
    return any(bool((tensor.isfinite() & (tensor != 0)).any()) for tensor in floats)


def _emptiness(floats: Sequence[Tensor]) -> str:
    if not any(tensor.numel() for tensor in floats):
        return "empty"
    if not any(bool(tensor.isfinite().any()) for tensor in floats):
        return "finite nowhere"
    return (
        "zero everywhere"
        if all(bool(tensor.isfinite().all()) for tensor in floats)
        else "zero where it is finite"
    )


def _copied_object(value: Any) -> Any:
    """An object of the user's, in a copy: a cache of keys and values grows with every call that is
    given it.
    """
    if value is None or isinstance(value, bool | int | float | str | nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever it raises when it is copied
        return value


@dataclass(frozen=True, kw_only=True)
class PossibleSite:
    """What may be a site: a module's path, its draws in the two modes, its call (None: no sample
    reaches it).

    `trains` is its training flag after the root's `train()`, which a module may refuse.
    """

    path: str
    kind: str
    p: float | None
    training: tuple[Draw, ...]
    eval: tuple[Draw, ...]
    call: Call | None
    calls: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """The possible sites in the order of the modules, and what went wrong on the way.

    `network` is a copy in eval mode to judge the sites in. `ran` are the samples, by index, on
    which the training forward ran; empty when no eval forward did.
    """

    network: Network
    sites: tuple[PossibleSite, ...]
    failures: tuple[str, ...]
    ran: tuple[int, ...]


def find(network: Network, samples: Sequence[Sample], *, seed: int) -> Search:
    """Every possible site of a network, which the caller puts back (see `untouched`).

    Raises UnusableInputs where no sample runs in either mode.
    """
    # A copy for each use, and no more than two at a time: a forward may exchange its module's parts
    # or use up an iterator, and what is measured afterwards would be another network.
    copied = network.copy(parameters=True)
    copied.module.train()
    flags = {path: part.training for path, part in copied.parts.items()}
    drawn, ran, failures = _draws(copied.module, samples, seed=seed)
    copied = network.copy(parameters=True)
    copied.module.eval()
    always, answered, others = _draws(copied.module, samples, seed=seed)
    if not ran and not answered and not any(isinstance(error, Unwatched) for error in others):
        reason = _described(others[0]).strip().partition("\n")[0]
        kind = type(network.module).__name__
        raise UnusableInputs(f"{kind} fails on every sample, in eval mode too: {reason}")
    if not answered:
        ran = []
    # What cannot be copied ran itself, and may have made parts or exchanged them.
    network = Network.of(network.module)
    paths = [
        path
        for path, part in network.parts.items()
        if path in drawn
        or path in always
        or (should_drop(part) and declared_rate(part) is not None)
    ]
    copied = network.copy(parameters=True)
    copied.module.train()
    calls, counts = _calls(copied, [samples[index] for index in ran], paths, seed=seed)
    judged = Network.of(network.module).copy(parameters=True)
    judged.module.eval()
    sites = [
        PossibleSite(
            path=path,
            kind=type(network.parts[path]).__name__,
            p=_rate(network.parts[path], (*drawn.get(path, ()), *always.get(path, ()))),
            training=tuple(drawn.get(path, ())),
            eval=tuple(always.get(path, ())),
            call=calls.get(path),
            calls=counts.get(path, 0),
            trains=flags.get(path, True),
        )
        for path in paths
    ]
    return Search(
        network=judged,
        sites=tuple(sites),
        failures=(
            *(f"in training mode on a sample: {_described(error)}" for error in failures),
            *(f"in eval mode on a sample: {_described(error)}" for error in others),
        ),
        ran=tuple(ran),
    )


def _described(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _rate(part: nn.Module, drawn: Sequence[Draw]) -> float | None:
    """The one rate that the calls give, else the one that the module holds."""
    rates = {draw.p for draw in drawn if draw.p is not None}
    return rates.pop() if len(rates) == 1 else declared_rate(part)


def _draws(
    module: nn.Module, samples: Sequence[Sample], *, seed: int
) -> tuple[dict[str, dict[Draw, None]], list[int], list[Exception]]:
    """The draws by the path of the innermost module that has one, the samples that ran, and what
    the others raised.
    """
    drawn: dict[str, dict[Draw, None]] = {}
    ran: list[int] = []
    failures: list[Exception] = []
    for index, sample in enumerate(samples):
        seed_everything(seed + index)
        try:
            seen = draws(module, Call.of((), sample).kwargs)
        # the user's own code, in a mode that may be new to it; or what cannot be watched
        except Exception as error:
            failures.append(error)
            continue
        ran.append(index)
        for draw in seen:
            # "blocks.0 > unregistered": a module made while running belongs to the one that made
            # it.
            path = draw.path.partition(" > ")[0]
            drawn.setdefault("" if path == "(root)" else path, {})[draw] = None
    return drawn, ran, failures


def _calls(
    network: Network, samples: Sequence[Sample], paths: Sequence[str], *, seed: int
) -> tuple[dict[str, Call], dict[str, int]]:
    first: dict[str, Call] = {}
    counts: dict[str, int] = {}

    def watch(stack: ExitStack, path: str) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[path] = counts.get(path, 0) + 1
            if path not in first:
                first[path] = Call.of(args, kwargs)
            elif first[path].emptiness() and not (call := Call.of(args, kwargs)).emptiness():
                first[path] = call

        stack.callback(network.parts[path].register_forward_pre_hook(hook, with_kwargs=True).remove)

    with ExitStack() as stack, plain_forward(), torch.no_grad():
        for path in paths:
            watch(stack, path)
        for index, sample in enumerate(samples):
            seed_everything(seed + index)
            network.module(**Call.of((), sample).kwargs)
    return first, counts
