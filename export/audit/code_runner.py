"""Running the code of one module in training mode, while all that it calls runs in eval."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evalmode.export.audit.balance import Constants
from evalmode.export.audit.call import Call
from evalmode.export.audit.direct_calls import DirectCall, scaled, watch_direct_calls
from evalmode.export.audit.isolated_site import output_tensors
from evalmode.export.module.network import Network

# The key of the module's own input among the constants; direct calls count from 0.
INPUT = -1
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


class CodeRunner:
    """Runs the code of one module in training mode, and all that it calls in eval.

        runner = CodeRunner(network, training_flags, sites)
        outputs = runner.run(network.parts["encoder"], call, {})

    `direct_calls` are those of the last run.
    """

    def __init__(
        self, network: Network, training_flags: Mapping[str, bool], sites: Collection[str]
    ) -> None:
        """`training_flags` are the flags of training mode and `sites` the sites, both by path."""
        self.sites = sites
        self.paths = {id(part): path for path, part in network.parts.items()}
        self.direct_calls: list[DirectCall] = []
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
        """The floating point tensors of the output. With `training` False, the code runs in eval.

        `constants` multiply the outputs of direct calls, by index, and the input, by `INPUT`.
        """
        self.direct_calls = []

        def on_leave(direct_call: DirectCall) -> Any:
            self._set_training(training)
            self.direct_calls.append(direct_call)
            factor = constants.get(direct_call.index, 1.0)
            return None if factor == 1 else direct_call.scaled_output(factor)

        copied = call.copy()
        args, kwargs = copied.args, copied.kwargs
        factor = constants.get(INPUT, 1.0)
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
        return float_outputs(output)

    def only_scales(self, part: nn.Module, call: Call) -> bool:
        """Whether the modes run the same operators, apart from products and quotients."""
        with _OperatorLog() as eval_log:
            self.run(part, call, {}, training=False)
        with _OperatorLog() as training_log:
            self.run(part, call, {}, training=True)
        in_eval, in_training = eval_log.operators, training_log.operators
        matcher = difflib.SequenceMatcher(None, in_eval, in_training, autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag == "equal":
                continue
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


def float_outputs(output: object) -> list[Tensor]:
    """The floating point tensors of a module's output, detached."""
    return [tensor.detach() for tensor in output_tensors(output) if tensor.is_floating_point()]


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
