"""The modules around the sites: whether their code does in training what it does in eval.

A factor beside a dropout is not visible at the dropout. So every module that is no site runs again
on a call that was captured in eval. Its code runs in training mode, while all that it calls runs in
eval (`code_runner.py`). Then there is no noise, and its output must be eval's.

Where it is not, a factor is searched that explains the difference. Multiplied with an input or with
the output of a part, its inverse makes the outputs equal; it is the gap E[train] / eval.

Modules of torch's own have no such code, except normalisations and dropouts. These are judged in
`batchnorm.py` and as sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from evalmode.export.audit import statistics
from evalmode.export.audit.balance import Balance, NoiseGroup
from evalmode.export.audit.call import Call, CallSignature, read_state, write_state
from evalmode.export.audit.code_runner import INPUT, CodeRunner, float_outputs
from evalmode.export.audit.isolated_site import output_tensors, random_zero_weights
from evalmode.export.audit.site import Unclear
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import saved

Sample = Mapping[str, Tensor]

# The calls of one module that are compared, and those of one signature among them.
_MOST_CALLS = 8
_CALLS_PER_SIGNATURE = 2
# The direct calls of one module whose factor is searched: each search costs up to forty forwards.
_MOST_PARTS = 16


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A module whose code does something else in training than in eval.

    `gap` is E[train] / eval of `scaled`, a phrase such as "its output"; None where no factor
    explains the difference. `site` is the path of the part whose output has the factor, where the
    module calls that part once. `call_count` counts the module's calls.

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
    """One call in eval, with the floating point tensors of its output.

    `is_final` says that the network's answer holds them.
    """

    call: Call
    outputs: list[Tensor]
    is_final: bool = False


@dataclass
class _Record:
    """The recorded calls of one module.

    `unlike_count` counts the calls that were left out although no recorded call has such arguments.
    """

    calls: list[_RecordedCall] = field(default_factory=list)
    signatures: list[CallSignature] = field(default_factory=list)
    unlike_count: int = 0
    call_count: int = 0

    def admit(self, signature: CallSignature) -> bool:
        """Count a call of this signature, and decide whether it is recorded."""
        self.call_count += 1
        if len(self.calls) < _MOST_CALLS:
            return self.signatures.count(signature) < _CALLS_PER_SIGNATURE
        if signature.arguments not in {other.arguments for other in self.signatures}:
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
    modules = {
        path: part
        for path, part in network.parts.items()
        if path not in sites and not isinstance(part, _NormBase) and not _is_plain_torch(part)
    }
    with (
        # A branch that gives nothing would hide its factor.
        random_zero_weights(network.module),
        plain_forward(),
        # Plain kernels, as in `IsolatedSite.isolated`: fused ones hide their operators.
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False),
    ):
        for part in network.parts.values():
            part.training = False
        records = _record_calls(network, modules, samples, seed=seed)
        runner = CodeRunner(network, training_flags, sites)
        differences = []
        for path, record in records.items():
            part = modules[path]
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
                count = record.unlike_count
                reason = f"{count} of its calls were not compared: they are unlike the first"
                difference = Difference(path=path, type=type(part).__name__, reason=reason)
            if difference is not None:
                differences.append(replace(difference, call_count=record.call_count))
    return differences


def _is_plain_torch(part: nn.Module) -> bool:
    """Whether a module runs torch's code alone: it has no hook, and no other forward."""
    changed = "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
    return type(part).__module__.startswith("torch.") and not changed


def _record_calls(
    network: Network, modules: Mapping[str, nn.Module], samples: Sequence[Sample], *, seed: int
) -> dict[str, _Record]:
    """The calls of these modules in eval forwards, with their outputs."""
    records = {path: _Record() for path in modules}

    def watch(stack: ExitStack, path: str, part: nn.Module) -> None:
        inside = Network.of(part).parts
        record = records[path]
        # A stack, as a module may call itself. None: a call that is not recorded.
        open_calls: list[tuple[CallSignature, Call] | None] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = read_state(inside)
            signature = CallSignature.of(args, kwargs, state)
            if record.admit(signature):
                open_calls.append((signature, Call.of(args, kwargs, state)))
            else:
                open_calls.append(None)

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            opened = open_calls.pop()
            if opened is not None:
                signature, call = opened
                record.signatures.append(signature)
                outputs = [tensor.clone() for tensor in float_outputs(output)]
                record.calls.append(_RecordedCall(call, outputs))

        stack.callback(part.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(part.register_forward_hook(leave).remove)

    with ExitStack() as stack:
        for path, part in modules.items():
            watch(stack, path, part)
        for index, sample in enumerate(samples):
            seed_everything(seed + index)
            answer = output_tensors(network.module(**Call.of((), sample).kwargs))
            for record in records.values():
                for position, call in enumerate(record.calls):
                    if not call.is_final and _are_among(call.outputs, answer):
                        record.calls[position] = replace(call, is_final=True)
    return records


def _are_among(outputs: list[Tensor], answer: list[Tensor]) -> bool:
    """Whether there are outputs, and the network's answer holds each of them."""
    for tensor in outputs:
        if not any(tensor.shape == a.shape and torch.equal(tensor, a) for a in answer):
            return False
    return bool(outputs)


def _compare(
    runner: CodeRunner, path: str, part: nn.Module, recorded: _RecordedCall
) -> Difference | None:
    """What the code of a module does in training alone; None where it does the same.

    Decided in this order:

    1. it raises in training: unproven;
    2. one mode returns the other's tensors and more: the same; other tensors: a difference;
    3. equal outputs: the same;
    4. one factor, on the output of a part or on the module's input: a gap;
    5. one factor, on what reaches a part or on the module's output: a gap;
    6. several factors together, on the outputs of parts: the gap is the largest of them;
    7. nothing but products differ, and no factor explains it: unproven;
    8. batch statistics: a warning;
    9. anything else: unproven, or a warning where it is the network's answer.
    """
    difference = Difference(path=path, type=type(part).__name__)
    call, expected = recorded.call, recorded.outputs

    # 1. It raises.
    try:
        outputs = runner.run(part, call, {})
    except Exception as error:  # the user's code, without the network around it
        reason = f"it does not run alone in training: {type(error).__name__}: {error}"
        return replace(difference, reason=reason)

    # 2. The outputs cannot be compared.
    if _extends(outputs, expected):
        return None
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        reason = "it returns other tensors in training than in eval"
        return replace(difference, harmless=recorded.is_final, reason=reason)

    # 3. The outputs are equal.
    balance = Balance(lambda constants: runner.run(part, call, constants), expected)
    modules = [direct_call.module for direct_call in runner.direct_calls]
    if balance.equals(outputs):
        return None

    # 4. A factor on the output of a part, or on the input. Sites come first: a factor on a site
    # equals one on what leads to it, and the user looks for it at the site.
    names = [runner.paths.get(id(module), "a part of it") for module in modules]
    indices = sorted(range(len(names)), key=lambda index: names[index] not in runner.sites)
    for index in (*indices[:_MOST_PARTS], INPUT):
        group = NoiseGroup(indices=[index], additive=False, largest=1.0)
        factors = balance.find([group], p=None)
        if isinstance(factors, Unclear) or factors[0] == 0:
            continue
        gap = 1 / factors[0]
        if abs(gap - 1) <= statistics.NEGLIGIBLE * statistics.margin(0):
            return None  # two ways to compute the same, with different rounding
        if index == INPUT:
            return replace(difference, gap=gap, scaled="its input")
        site = names[index] if modules.count(modules[index]) == 1 else None
        return replace(difference, gap=gap, scaled=f"the output of {names[index]}", site=site)

    # 5. A factor on what reaches a part: on the first part whose inputs differ. Or on the output.
    runner.run(part, call, {}, training=True)
    inputs_in_training = [direct_call.inputs() for direct_call in runner.direct_calls]
    runner.run(part, call, {}, training=False)
    inputs_in_eval = [direct_call.inputs() for direct_call in runner.direct_calls]
    inputs_differ = False
    for index, (a, b) in enumerate(zip(inputs_in_training, inputs_in_eval, strict=False)):
        if not _all_equal(a, b):
            inputs_differ = True
            factor = _common_factor(a, b)
            if factor is not None:
                return replace(difference, gap=factor, scaled=f"the input of {names[index]}")
            break
    factor = _common_factor(outputs, expected)
    if factor is not None:
        return replace(difference, gap=factor, scaled="its output")

    # 6. Several factors.
    together = balance.find_together(range(len(modules))[:_MOST_PARTS])
    if together is not None and all(together):
        worst = max(range(len(together)), key=lambda index: abs(together[index] - 1))
        scaled = f"the output of {names[worst]}"
        return replace(difference, gap=1 / together[worst], scaled=scaled)

    # 7. Products.
    if not inputs_differ and runner.only_scales(part, call):
        return replace(difference, reason="its own code multiplies in one mode alone")

    # 8. Batch statistics: floating point buffers of the module itself that a training call changes.
    # Buffers of one element are left out: they are counters and rates.
    before = {}
    for name, buffer in part.named_buffers(recurse=False):
        if buffer.is_floating_point() and buffer.numel() > 1:
            before[name] = buffer.clone()
    runner.run(part, call, {})
    changed_names = []
    for name, buffer in part.named_buffers(recurse=False):
        if name in before and not torch.equal(buffer, before[name]):
            changed_names.append(name)
    if changed_names:
        listed = ", ".join(changed_names)
        reason = f"its training uses statistics of the batch, and keeps them in {listed}"
        return replace(difference, harmless=True, reason=reason)

    # 9. Anything else.
    reason = (
        "its own code returns something else in training than in eval, which no factor explains"
    )
    if recorded.is_final and not inputs_differ:
        reason += (
            "; the modules that it calls get the same inputs in both modes, so that only the"
            " network's answer differs"
        )
        return replace(difference, harmless=True, reason=reason)
    return replace(difference, reason=reason)


def _extends(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether one mode returns the other's tensors, in order, and more between or after them.

    Auxiliary heads in training do so, and a cache in eval.
    """
    fewer, more = sorted((outputs, expected), key=len)
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
