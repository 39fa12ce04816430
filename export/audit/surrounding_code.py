"""The modules around the sites: whether their code does in training what it does in eval.

A factor beside a dropout is not visible at the dropout. So every module that is no site runs again
on a call that was captured in eval. Its code runs in training mode, while all that it calls runs in
eval. Then there is no noise, and its output must be eval's.

Where it is not, a factor is searched that explains the difference. Multiplied with an input or with
the output of a part, its inverse makes the outputs equal; it is the gap E[train] / eval.

Modules of torch's own have no such code, except normalisations and dropouts. These are judged in
`batchnorm.py` and as sites.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evalmode.export.audit import statistics
from evalmode.export.audit.balance import Balance, Constants
from evalmode.export.audit.call import Call, CallKind, read_state, write_state
from evalmode.export.audit.direct_calls import DirectCall, scaled, watch_direct_calls
from evalmode.export.audit.isolated_site import noise_for_zero_weights, output_tensors
from evalmode.export.audit.site import Unclear
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import saved

Sample = Mapping[str, Tensor]

# The calls of one module that are compared, and those of one kind among them.
_MOST_CALLS = 8
_CALLS_PER_KIND = 2
# The direct calls of one module whose factor is searched: each search costs up to forty forwards.
_MOST_PARTS = 16
# The key of the module's own input among the constants; direct calls count from 0.
_INPUT = -1
# Operators in which the modes may differ where a module only scales: products and quotients, and
# what brings their number to a tensor.
_SCALING_OPERATORS = {
    "mul",
    "div",
    "detach",
    "lift_fresh",
    "scalar_tensor",
    "full",
    "_to_copy",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A module whose code does something else in training than in eval.

    `gap` is E[train] / eval of `scaled`, a phrase such as "its answer"; None where no factor
    explains the difference. `site` is the path of the part that the factor is on, where the module
    calls that part once. `call_count` counts the module's calls.

    `harmless` says that the difference has nothing to do with noise: nothing comes after it, or it
    is one of batch statistics. `reason` is what differs, or what prevented a comparison.
    """

    path: str
    type: str
    gap: float | None = None
    scaled: str = ""
    site: str | None = None
    call_count: int = 0
    harmless: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _RecordedCall:
    """One call in eval. `is_final` says that its output was the output of the network."""

    call: Call
    output: list[Tensor]
    is_final: bool = False


@dataclass
class _Record:
    """The recorded calls of one module.

    `unlike_count` counts the calls that were left out although no recorded call has such arguments.
    """

    calls: list[_RecordedCall] = field(default_factory=list)
    kinds: list[CallKind] = field(default_factory=list)
    unlike_count: int = 0
    call_count: int = 0

    def admit(self, kind: CallKind) -> bool:
        """Count a call of this kind, and decide whether it is recorded."""
        self.call_count += 1
        if len(self.calls) < _MOST_CALLS:
            return self.kinds.count(kind) < _CALLS_PER_KIND
        if kind.arguments not in {other.arguments for other in self.kinds}:
            self.unlike_count += 1
        return False


def find_differences(
    network: Network,
    sites: Collection[str],
    training_flags: Mapping[str, bool],
    samples: Sequence[Sample],
    *,
    seed: int,
) -> list[Difference]:
    """What the modules around `sites` do in training alone: at most one difference per module.

    `network` is a working copy. `sites` are paths; `training_flags` are the flags of training mode,
    by path.
    """
    around = {
        path: part
        for path, part in network.parts.items()
        if path not in sites and not isinstance(part, _NormBase) and not _is_plain_torch(part)
    }
    with (
        # A branch that gives nothing would hide its factor.
        noise_for_zero_weights(network.module),
        plain_forward(),
        # Plain kernels, as in `IsolatedSite.isolated`: fused ones hide their operators.
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False),
    ):
        for part in network.parts.values():
            part.training = False
        records = _record_calls(network, around, samples, seed=seed)
        runner = _Runner(network, training_flags, sites)
        differences = []
        for path, record in records.items():
            part = around[path]
            inside = Network.of(part).parts
            restores = [saved(item) for item in inside.values()]
            difference = None
            for recorded in record.calls:
                write_state(inside, recorded.call.state)
                if difference is None:
                    difference = _compare(runner, path, part, recorded)
                for restore in restores:
                    restore()
            if difference is None and record.unlike_count:
                reason = (
                    f"{record.unlike_count} of its calls were not looked at, which are unlike the"
                    " first"
                )
                difference = Difference(path=path, type=type(part).__name__, reason=reason)
            if difference is not None:
                differences.append(replace(difference, call_count=record.call_count))
    return differences


def _is_plain_torch(part: nn.Module) -> bool:
    """Whether a module runs torch's code alone: it has no hook, and no other forward."""
    changed = "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
    return type(part).__module__.startswith("torch.") and not changed


def _record_calls(
    network: Network, around: Mapping[str, nn.Module], samples: Sequence[Sample], *, seed: int
) -> dict[str, _Record]:
    """The calls of these modules in eval forwards, with their outputs."""
    records = {path: _Record() for path in around}

    def watch(stack: ExitStack, path: str, part: nn.Module) -> None:
        inside = Network.of(part).parts
        record = records[path]
        # A stack, as a module may call itself. None: a call that is not recorded.
        open_calls: list[tuple[CallKind, Call] | None] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = read_state(inside)
            kind = CallKind.of(args, kwargs, state)
            if record.admit(kind):
                open_calls.append((kind, Call.of(args, kwargs, state)))
            else:
                open_calls.append(None)

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            opened = open_calls.pop()
            if opened is not None:
                kind, call = opened
                record.kinds.append(kind)
                floats = [tensor.clone() for tensor in _floats(output)]
                record.calls.append(_RecordedCall(call, floats))

        stack.callback(part.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(part.register_forward_hook(leave).remove)

    with ExitStack() as stack:
        for path, part in around.items():
            watch(stack, path, part)
        for index, sample in enumerate(samples):
            seed_everything(seed + index)
            answer = output_tensors(network.module(**Call.of((), sample).kwargs))
            for record in records.values():
                for position, call in enumerate(record.calls):
                    if not call.is_final and _is_among(call.output, answer):
                        record.calls[position] = replace(call, is_final=True)
    return records


def _is_among(output: list[Tensor], answer: list[Tensor]) -> bool:
    """Whether the network's answer holds each tensor of an output."""
    if not output:
        return False
    for tensor in output:
        if not any(tensor.shape == a.shape and torch.equal(tensor, a) for a in answer):
            return False
    return True


class _Runner:
    """Runs the code of one module in training mode, and all that it calls in eval."""

    def __init__(
        self, network: Network, training_flags: Mapping[str, bool], sites: Collection[str]
    ) -> None:
        self.sites = sites
        self.paths = {id(part): path for path, part in network.parts.items()}
        self.direct_calls: list[DirectCall] = []  # of the last run
        # Parts whose flag is a plain attribute, and the others, where it is a property.
        self._flag_owners: list[dict[str, Any]] = []
        self._other_parts: list[nn.Module] = []
        for path, part in network.parts.items():
            if not training_flags.get(path, True):
                continue
            if "training" in vars(part):
                self._flag_owners.append(vars(part))
            else:
                self._other_parts.append(part)

    def run(
        self, part: nn.Module, call: Call, constants: Constants, *, training: bool = True
    ) -> list[Tensor]:
        """The floating point tensors of the output.

        `constants` multiply the outputs of direct calls, by index, and the input, by `_INPUT`.
        """
        self.direct_calls = []

        def on_leave(direct_call: DirectCall) -> Any:
            self._set_training(training)
            self.direct_calls.append(direct_call)
            factor = constants.get(direct_call.index, 1.0)
            return None if factor == 1 else direct_call.scaled_output(factor)

        copied = call.copy()
        args, kwargs = copied.args, copied.kwargs
        factor = constants.get(_INPUT, 1.0)
        if factor != 1:
            args, kwargs = pytree.tree_map(lambda leaf: scaled(leaf, factor), (args, kwargs))
        try:
            self._set_training(training)
            with watch_direct_calls(
                part, on_enter=lambda: self._set_training(False), on_leave=on_leave
            ):
                output = part(*args, **kwargs)
        finally:
            self._set_training(False)
        return _floats(output)

    def only_scales(self, part: nn.Module, call: Call) -> bool:
        """Whether the modes run the same operators, apart from products and quotients."""
        operators = []
        for training in (False, True):
            with _OperatorLog() as log:
                self.run(part, call, {}, training=training)
            operators.append(log.operators)
        in_eval, in_training = operators
        matcher = difflib.SequenceMatcher(None, in_eval, in_training, autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag != "equal":
                for name, _numbers in (*in_eval[a:b], *in_training[c:d]):
                    if name not in _SCALING_OPERATORS:
                        return False
        return True

    def _set_training(self, training: bool) -> None:
        # Past nn.Module's __setattr__, which takes a third of the time of a small network.
        for attributes in self._flag_owners:
            attributes["training"] = training
        for part in self._other_parts:
            part.training = training


class _OperatorLog(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Logs the operators that run, views aside: their names and their numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            numbers = [arg for arg in args if isinstance(arg, bool | int | float)]
            self.operators.append((func.overloadpacket.__name__.rstrip("_"), str(numbers)))
        return func(*args, **(kwargs or {}))


def _compare(
    runner: _Runner, path: str, part: nn.Module, recorded: _RecordedCall
) -> Difference | None:
    """What the code of a module does in training alone; None where it does the same.

    Decided in this order:

    1. it raises in training: unproven;
    2. one mode returns the other's tensors and more: the same; other tensors: a difference;
    3. equal outputs: the same;
    4. one factor on the output of a part, on the input, on what reaches a part, or on the output:
       a gap;
    5. several factors together: the gap is the largest of them;
    6. nothing but products differ, and no factor explains it: unproven;
    7. batch statistics: a warning;
    8. anything else: unproven, or a warning where it is the network's answer.
    """
    difference = Difference(path=path, type=type(part).__name__)
    call, expected = recorded.call, recorded.output

    # 1. It raises.
    try:
        output = runner.run(part, call, {})
    except Exception as error:  # the user's code, without the network around it
        reason = f"it does not run alone in training: {type(error).__name__}: {error}"
        return replace(difference, reason=reason)

    # 2. and 3. The outputs are equal, or cannot be compared.
    if _extends(output, expected):
        return None
    if [tensor.shape for tensor in output] != [tensor.shape for tensor in expected]:
        reason = "it answers with other tensors in training than in eval"
        return replace(difference, harmless=recorded.is_final, reason=reason)
    balance = Balance(lambda constants: runner.run(part, call, constants), expected)
    direct_calls = runner.direct_calls
    if balance.equals(output):
        return None

    # 4. On the output of a part. Sites come first: a factor on a site equals one on what leads to
    # it, and the user looks for it at the site.
    names = [runner.paths.get(id(c.module), "a part of it") for c in direct_calls]
    indices = sorted(range(len(names)), key=lambda index: names[index] not in runner.sites)
    for index in (*indices[:_MOST_PARTS], _INPUT):
        factors = balance.find([[index]], [False], [1.0], None)
        if isinstance(factors, Unclear) or factors[0] == 0:
            continue
        gap = 1 / factors[0]
        if abs(gap - 1) <= statistics.NEGLIGIBLE * statistics.margin(0):
            return None  # two ways to compute the same, with different rounding
        if index == _INPUT:
            return replace(difference, gap=gap, scaled="what it is given")
        modules = [c.module for c in direct_calls]
        is_only_call = modules.count(modules[index]) == 1
        return replace(
            difference,
            gap=gap,
            scaled=f"what {names[index]} answers",
            site=names[index] if is_only_call else None,
        )

    # 4. On what reaches a part, or on the output.
    runner.run(part, call, {}, training=True)
    inputs_in_training = [direct_call.inputs() for direct_call in runner.direct_calls]
    runner.run(part, call, {}, training=False)
    inputs_in_eval = [direct_call.inputs() for direct_call in runner.direct_calls]
    unlike = None  # the index of the first part that gets something else
    for index, (a, b) in enumerate(zip(inputs_in_training, inputs_in_eval, strict=False)):
        if not _all_equal(a, b):
            unlike = index
            break
    if unlike is not None:
        factor = _common_factor(inputs_in_training[unlike], inputs_in_eval[unlike])
        if factor is not None:
            return replace(difference, gap=factor, scaled=f"what reaches {names[unlike]}")
    factor = _common_factor(output, expected)
    if factor is not None:
        return replace(difference, gap=factor, scaled="its answer")

    # 5. Several factors.
    together = balance.find_together(range(len(direct_calls))[:_MOST_PARTS])
    if together is not None and all(together):
        worst = max(range(len(together)), key=lambda index: abs(together[index] - 1))
        scaled_part = f"what {names[worst]} answers"
        return replace(difference, gap=1 / together[worst], scaled=scaled_part)

    # 6. Products.
    if unlike is None and runner.only_scales(part, call):
        return replace(difference, reason="its own code multiplies in one mode alone")

    # 7. Batch statistics.
    moved = _moved_buffers(runner, part, call)
    if moved:
        reason = f"its training uses statistics of the batch, and keeps them in {', '.join(moved)}"
        return replace(difference, harmless=True, reason=reason)

    # 8. Anything else.
    reason = "its own code answers otherwise in training than in eval, and by no factor"
    if recorded.is_final and unlike is None:
        reason += (
            "; what it calls gets the same in both modes, so that only the network's answer differs"
        )
        return replace(difference, harmless=True, reason=reason)
    return replace(difference, reason=reason)


def _floats(output: object) -> list[Tensor]:
    """The floating point tensors of a module's output, detached."""
    return [tensor.detach() for tensor in output_tensors(output) if tensor.is_floating_point()]


def _extends(output: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether one mode returns the other's tensors, in order, and more between or after them.

    Auxiliary heads in training do so, and a cache in eval.
    """
    fewer, more = sorted((output, expected), key=len)
    if not 0 < len(fewer) < len(more):
        return False
    remaining: Iterator[Tensor] = iter(more)
    for tensor in fewer:
        # `any` stops at the equal tensor, so the next search goes on behind it.
        if not any(tensor.shape == b.shape and torch.equal(tensor, b) for b in remaining):
            return False
    return True


def _all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not torch.equal(x.nan_to_num(), y.nan_to_num()):
            return False
    return True


def _common_factor(a: list[Tensor], b: list[Tensor]) -> float | None:
    """The one factor c with a = c b in all tensors that differ; None where there is none."""
    factors = []
    for x, y in zip(a, b, strict=False):
        if x.shape != y.shape:
            return None
        x, y = x.to(torch.float64), y.to(torch.float64)
        square = float((y * y).sum())
        if torch.equal(x, y) or not 0 < square < float("inf"):
            continue
        c = float((x * y).sum()) / square  # the least squares solution of x = c y
        # As in `Balance`: sums over a few thousand terms lose some hundred rounding steps.
        tolerance = 512 * torch.finfo(torch.float32).eps * float(y.abs().max())
        if c == 0 or float((x - c * y).abs().max()) > tolerance * max(abs(c), 1):
            return None
        factors.append(c)
    if not factors or len(a) != len(b):
        return None
    first = factors[0]
    return first if all(abs(c - first) <= 1e-3 * abs(c) for c in factors) else None


def _moved_buffers(runner: _Runner, part: nn.Module, call: Call) -> list[str]:
    """The names of the module's own floating point buffers that a training call changes.

    Buffers of one element are left out: they are counters and rates, not statistics.
    """
    before = {}
    for name, buffer in part.named_buffers(recurse=False):
        if buffer.is_floating_point() and buffer.numel() > 1:
            before[name] = buffer.clone()
    runner.run(part, call, {})
    buffers = dict(part.named_buffers(recurse=False))
    return [
        name for name in buffers if name in before and not torch.equal(buffers[name], before[name])
    ]
