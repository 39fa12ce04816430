"""The modules around the sites: whether their own code does in training what it does in eval.

A factor beside a dropout is not the dropout's, and no site shows it. So the own code of every
module that is no site runs in training on a call that was captured in eval, while all that it calls
runs in eval: there is no noise left, and its output must be eval's. Where it is not, a factor is
looked for that, put on what the module is given or on what one of its parts answers, makes the two
equal: its inverse is the gap. Modules of torch's own have no such branch, but for normalisations
and dropouts, which are judged elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evalmode.export.audit import statistics as st
from evalmode.export.audit.balance import Balance, Constants
from evalmode.export.audit.call import Call, CallKind, give_state, state_before
from evalmode.export.audit.isolated_site import noise_for_zero_weights, tensors
from evalmode.export.audit.own_calls import OwnCall, own_calls
from evalmode.export.audit.site import Unclear
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import saved

Sample = Mapping[str, Tensor]

MOST_CALLS = 8  # of one module
_SAME = 2  # calls of one kind
_MOST_PARTS = 16  # whose factor is looked for
_INPUT = -1  # the key of the module's own input among the constants


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A module whose own code does another thing in training than in eval.

    `gap` is E[train] / eval of what `of` names, None where no factor explains the difference.
    `site` is the path of the part where the factor is on the only call of one. `calls` counts the
    module's calls. `apart`: it is no matter of noise, since nothing comes after it, or since it is
    that of statistics. `why` says what differs, or what stood in the way of a comparison.
    """

    path: str
    type: str
    gap: float | None = None
    of: str = ""
    site: str | None = None
    calls: int = 0
    apart: bool = False
    why: str = ""


@dataclass(frozen=True)
class _Recorded:
    """One call in eval; `final` says that what it answered is what the network answered."""

    call: Call
    output: list[Tensor]
    final: bool = False


@dataclass
class _Record:
    calls: list[_Recorded] = field(default_factory=list)
    kinds: list[CallKind] = field(default_factory=list)
    unlike: int = 0
    count: int = 0

    def wants(self, kind: CallKind) -> bool:
        self.count += 1
        if len(self.calls) < MOST_CALLS:
            return self.kinds.count(kind) < _SAME
        self.unlike += kind.arguments not in {other.arguments for other in self.kinds}
        return False


def differences(
    network: Network,
    sites: Collection[str],
    trains: Mapping[str, bool],
    samples: Sequence[Sample],
    *,
    seed: int,
) -> list[Difference]:
    """What the modules around `sites`, which are paths, do in training alone; at most one
    difference a module.

    `network` is a working copy, whose weights that are all zero get random values: a branch that
    gives nothing would hide its factor. `trains` are the flags of training mode by path.
    """
    around = {
        path: part
        for path, part in network.parts.items()
        if path not in sites and not isinstance(part, _NormBase) and not _is_torchs(part)
    }
    with (
        noise_for_zero_weights(network.module),
        plain_forward(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False),
    ):
        for part in network.parts.values():
            part.training = False
        records = _recorded(network, around, samples, seed=seed)
        runner = _Runner(network, trains, sites)
        findings = []
        for path, record in records.items():
            part = around[path]
            inside = Network.of(part).parts
            restores = [saved(item) for item in inside.values()]
            difference = None
            for recorded in record.calls:
                give_state(inside, recorded.call.state)
                difference = difference or _difference(runner, path, part, recorded)
                for restore in restores:
                    restore()
            if difference is None and record.unlike:
                why = f"{record.unlike} of its calls were not looked at, which are unlike the first"
                difference = Difference(path=path, type=type(part).__name__, why=why)
            findings += [] if difference is None else [replace(difference, calls=record.count)]
    return findings


def _is_torchs(part: nn.Module) -> bool:
    """Whether a module runs code of torch's alone: no hook and no other forward was put on it."""
    own = "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
    return type(part).__module__.startswith("torch.") and not own


def _recorded(
    network: Network, around: Mapping[str, nn.Module], samples: Sequence[Sample], *, seed: int
) -> dict[str, _Record]:
    """The calls of these modules in eval forwards, with what they answered."""
    records = {path: _Record() for path in around}

    def watch(stack: ExitStack, path: str, part: nn.Module) -> None:
        inside = Network.of(part).parts
        open_calls: list[tuple[CallKind, Call] | None] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = state_before(inside)
            kind = CallKind.of(args, kwargs, state)
            wanted = records[path].wants(kind)
            open_calls.append((kind, Call.of(args, kwargs, state)) if wanted else None)

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            opened = open_calls.pop()
            if opened is not None:
                records[path].kinds.append(opened[0])
                floats = [t.detach().clone() for t in tensors(output) if t.is_floating_point()]
                records[path].calls.append(_Recorded(opened[1], floats))

        stack.callback(part.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(part.register_forward_hook(leave).remove)

    with ExitStack() as stack:
        for path, part in around.items():
            watch(stack, path, part)
        for index, sample in enumerate(samples):
            seed_everything(seed + index)
            answer = tensors(network.module(**Call.of((), sample).kwargs))
            for record in records.values():
                record.calls = [
                    replace(call, final=call.final or _among(call.output, answer))
                    for call in record.calls
                ]
    return records


def _among(output: list[Tensor], answer: list[Tensor]) -> bool:
    return bool(output) and all(
        any(a.shape == b.shape and torch.equal(a, b) for b in answer) for a in output
    )


class _Runner:
    """Runs the own code of one module in training, and all that it calls in eval."""

    def __init__(
        self, network: Network, trains: Mapping[str, bool], sites: Collection[str]
    ) -> None:
        self.sites = sites
        self.paths = {id(part): path for path, part in network.parts.items()}
        training = [part for path, part in network.parts.items() if trains.get(path, True)]
        self._flags = [vars(part) for part in training if "training" in vars(part)]
        self._others = [part for part in training if "training" not in vars(part)]
        self.calls: list[OwnCall] = []

    def run(
        self, part: nn.Module, call: Call, constants: Constants, *, training: bool = True
    ) -> list[Tensor]:
        """The floating tensors of its output; `constants` scale its input and what its parts
        answer.
        """
        self.calls = []

        def leave(own: OwnCall) -> Any:
            self._set(training=training)
            self.calls.append(own)
            factor = constants.get(own.index, 1.0)
            return None if factor == 1 else own.scaled(factor)

        again = call.again()
        args, kwargs = again.args, again.kwargs
        if (factor := constants.get(_INPUT, 1.0)) != 1:
            args, kwargs = pytree.tree_map(lambda leaf: _scaled(leaf, factor), (args, kwargs))
        try:
            self._set(training=training)
            with own_calls(part, entering=lambda: self._set(training=False), leaving=leave):
                output = part(*args, **kwargs)
        finally:
            self._set(training=False)
        return [t.detach() for t in tensors(output) if t.is_floating_point()]

    def reached(self, part: nn.Module, call: Call, *, training: bool) -> list[list[Tensor]]:
        """The floating tensors that reach each module that it calls."""
        self.run(part, call, {}, training=training)
        return [own.inputs() for own in self.calls]

    def only_scales(self, part: nn.Module, call: Call) -> bool:
        """Whether the modes run the same operators, but for products and quotients with numbers."""
        ran: list[list[tuple[str, str]]] = []
        for training in (False, True):
            with _Operators() as operators:
                self.run(part, call, {}, training=training)
            ran.append(operators.ran)
        changes = difflib.SequenceMatcher(None, ran[0], ran[1], autojunk=False).get_opcodes()
        return all(
            name in _SCALES
            for tag, a, b, c, d in changes
            if tag != "equal"
            for name, _ in (*ran[0][a:b], *ran[1][c:d])
        )

    def _set(self, *, training: bool) -> None:
        # Past nn.Module's own __setattr__, which takes a third of the time of a small network.
        for values in self._flags:
            values["training"] = training
        for part in self._others:
            part.training = training


def _scaled(leaf: Any, factor: float) -> Any:
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf * factor if floats else leaf


def _difference(
    runner: _Runner, path: str, part: nn.Module, recorded: _Recorded
) -> Difference | None:
    kind = type(part).__name__
    try:
        output = runner.run(part, recorded.call, {})
    except Exception as error:  # the user's own code, run without the network around it
        why = f"it does not run alone in training: {type(error).__name__}: {error}"
        return Difference(path=path, type=kind, why=why)
    expected = recorded.output
    if _share_all(output, expected):
        return None
    if [tensor.shape for tensor in output] != [tensor.shape for tensor in expected]:
        why = "it answers with other tensors in training than in eval"
        return Difference(path=path, type=kind, apart=recorded.final, why=why)
    calls = runner.calls
    balance = Balance(lambda constants: runner.run(part, recorded.call, constants), expected)
    if balance.equals(output):
        return None
    names = [runner.paths.get(id(call.module), "a part of it") for call in calls]
    # A site first: a factor on it may as well be put on what leads to it.
    indices = sorted(range(len(calls)), key=lambda index: names[index] not in runner.sites)
    for index in (*indices[:_MOST_PARTS], _INPUT):
        factors = balance.find([[index]], [False], [1.0], None)
        if isinstance(factors, Unclear) or factors[0] == 0:
            continue
        gap = 1 / factors[0]
        if abs(gap - 1) <= st.NEGLIGIBLE * st.margin(0):
            return None  # two ways to compute the same, whose rounding differs
        if index == _INPUT:
            return Difference(path=path, type=kind, gap=gap, of="what it is given")
        alone = [call.module for call in calls].count(calls[index].module) == 1
        return Difference(
            path=path,
            type=kind,
            gap=gap,
            of=f"what {names[index]} answers",
            site=names[index] if alone else None,
        )
    in_training = runner.reached(part, recorded.call, training=True)
    in_eval = runner.reached(part, recorded.call, training=False)
    unlike = [
        index
        for index, (a, b) in enumerate(zip(in_training, in_eval, strict=False))
        if not _alike(a, b)
    ]
    if unlike and (factor := _factor(in_training[unlike[0]], in_eval[unlike[0]])) is not None:
        return Difference(path=path, type=kind, gap=factor, of=f"what reaches {names[unlike[0]]}")
    if (factor := _factor(output, expected)) is not None:
        return Difference(path=path, type=kind, gap=factor, of="its answer")
    together = balance.find_together(range(len(calls))[:_MOST_PARTS])
    if together is not None and all(together):
        worst = max(range(len(together)), key=lambda index: abs(together[index] - 1))
        of = f"what {names[worst]} answers"
        return Difference(path=path, type=kind, gap=1 / together[worst], of=of)
    if not unlike and runner.only_scales(part, recorded.call):
        why = "its own code multiplies in one mode alone"
        return Difference(path=path, type=kind, why=why)
    if statistics := _moved_buffers(part, recorded.call, runner):
        why = (
            f"its training uses statistics of the batch, and keeps them in {', '.join(statistics)}"
        )
        return Difference(path=path, type=kind, apart=True, why=why)
    why = "its own code answers otherwise in training than in eval, and by no factor"
    if recorded.final and not unlike:
        why += (
            "; what it calls gets the same in both modes, so that only the network's answer differs"
        )
        return Difference(path=path, type=kind, apart=True, why=why)
    return Difference(path=path, type=kind, why=why)


def _moved_buffers(part: nn.Module, call: Call, runner: _Runner) -> list[str]:
    """The names of its own floating buffers, of several elements, that a training call moves."""
    before = {
        name: buffer.clone()
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.is_floating_point() and buffer.numel() > 1
    }
    runner.run(part, call, {})
    return [
        name
        for name, buffer in part.named_buffers(recurse=False)
        if name in before and not torch.equal(buffer, before[name])
    ]


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


def _factor(a: list[Tensor], b: list[Tensor]) -> float | None:
    """The one factor c by which tensors `a` are tensors `b`, but for those that are equal."""
    factors = []
    for x, y in zip(a, b, strict=False):
        if x.shape != y.shape:
            return None
        x, y = x.to(torch.float64), y.to(torch.float64)
        square = float((y * y).sum())
        if torch.equal(x, y) or not 0 < square < float("inf"):
            continue
        c = float((x * y).sum()) / square
        step = 512 * torch.finfo(torch.float32).eps * float(y.abs().max())
        if c == 0 or float((x - c * y).abs().max()) > step * max(abs(c), 1):
            return None
        factors.append(c)
    same = bool(factors) and all(abs(c - factors[0]) <= 1e-3 * abs(c) for c in factors)
    return factors[0] if same and len(a) == len(b) else None


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Notes the operators that run, views aside, by their names and the numbers that they get."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            numbers = [arg for arg in args if isinstance(arg, bool | int | float)]
            self.ran.append((func.overloadpacket.__name__.rstrip("_"), str(numbers)))
        return func(*args, **(kwargs or {}))


_SCALES = {"mul", "div", "detach", "lift_fresh", "scalar_tensor", "full", "_to_copy"}


def _share_all(output: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether one mode answers with the other's tensors and more beside them: auxiliary heads in
    training, a cache in eval.
    """
    fewer, more = sorted((output, expected), key=len)
    rest = iter(more)
    return 0 < len(fewer) < len(more) and all(
        any(a.shape == b.shape and torch.equal(a, b) for b in rest) for a in fewer
    )
