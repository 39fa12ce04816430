"""One site, run in isolation: each run starts from the same input and the same state.

Every other module is in eval mode, so a difference between two runs comes from the site. A module
inside the site that is random in eval stays random.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from evalmode.export.audit.call import Call, write_state
from evalmode.export.audit.direct_calls import DirectCall, watch_direct_calls
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import own_forward
from evalmode.export.module.untouched import saved


class IsolatedSite:
    """A module of a network, with one call to repeat.

    Runs belong inside `with site.isolated():`, which also puts everything back:

        site = IsolatedSite(network, network.parts[path], call)
        with site.isolated():
            outputs = site.run(training=True)
    """

    def __init__(
        self,
        network: Network,
        module: nn.Module,
        call: Call,
        *,
        trains: bool = True,
        random_modules: Collection[nn.Module] = (),
    ) -> None:
        """Write the state of the call to the module; leaving `isolated()` restores the original.

        `trains` is False for a module that refuses training mode. `random_modules` are the modules
        of the network that draw: they are judged as sites themselves.
        """
        self.module, self.call, self._trains = module, call, trains
        parts = Network.of(module).parts
        self._inside = list(parts.values())
        self._network_parts = list(network.parts.values())
        self._random_module_ids = {id(part) for part in random_modules}

        # Two states of the site: as it was before the audit, and as it was before the call.
        self._restore_original = [saved(part) for part in self._inside]
        write_state(parts, call.state)
        self._restore_call_state = [saved(part) for part in self._inside]

        self._switched_children: list[nn.Module] = []
        self._branch_factors: Mapping[nn.Module, float] = {}
        self.includes_inputs = False
        self._calls: list[DirectCall] = []
        self._last_outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Inside, the network is in eval mode. Afterwards, all flags and numbers are restored."""
        flags = [part.training for part in self._network_parts]
        try:
            # By attribute: `eval()` does not reach modules in plain lists, and may be overridden.
            for part in self._network_parts:
                part.training = False
            # Fused attention and cuDNN's recurrent layers hide their dropout from a dispatch mode.
            with (
                plain_forward(),
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.cudnn.flags(enabled=False),
            ):
                yield
        finally:
            for part, flag in zip(self._network_parts, flags, strict=True):
                part.training = flag
            for restore in self._restore_original:
                restore()

    def run(self, *, training: bool, watched: bool = False) -> list[Tensor]:
        """The floating point tensors of the output, from the same input and state at every run.

        `watched` records the modules that the site calls directly: see `last_called`.
        """
        return self.run_prepared(self.prepare(), training=training, watched=watched)

    def prepare(self) -> Call:
        """Restore the site's state to that before the call, and return a fresh copy of the call."""
        for restore in self._restore_call_state:
            restore()
        return self.call.copy()

    def run_prepared(self, call: Call, *, training: bool, watched: bool = False) -> list[Tensor]:
        """As `run`, for a call that `prepare` returned: a tape needs the call's tensors first."""
        for part in self._switched_children:
            part.training = training
        self.module.training = training and self._trains
        self._calls = []
        # Global hooks slow every module down, so they are set only where the calls are read.
        reads_calls = watched or self.includes_inputs or bool(self._branch_factors)
        try:
            with ExitStack() as stack:
                if reads_calls:
                    stack.enter_context(watch_direct_calls(self.module, on_leave=self._record))
                output = self.module(*call.args, **call.kwargs)
        finally:
            for part in self._inside:
                part.training = False

        outputs = output_tensors(output)
        if self.includes_inputs:
            for direct_call in self._calls:
                if direct_call.module not in self._branch_factors:
                    outputs += direct_call.inputs()
        return [tensor.detach() for tensor in outputs if tensor.is_floating_point()]

    def _record(self, call: DirectCall) -> Any:
        """Record a direct call. Returns what replaces its output; None leaves it as it is."""
        self._calls.append(call)
        factor = self._branch_factors.get(call.module)
        if factor is None:
            self._last_outputs[call.module] = call.output
            return None
        # At factor 0 the module did not run: `scaled_branches` exchanged its forward.
        return None if factor == 0 else call.output_with_branch(factor)

    def called_modules(self, *, training: bool) -> list[nn.Module]:
        """The modules that the site calls directly in one more forward, in order."""
        self.run(training=training, watched=True)
        return self.last_called

    @property
    def last_called(self) -> list[nn.Module]:
        """The modules that the site called directly in the last watched forward, in order."""
        return [call.module for call in self._calls]

    def switch_children(self) -> None:
        """From now on set the training flag of the modules inside too.

        Some sites read the flag of a child. Random modules, which are judged as sites themselves,
        stay in eval.
        """
        self._switched_children = [
            part for part in self._inside if id(part) not in self._random_module_ids
        ]

    @contextmanager
    def including_inputs(self) -> Iterator[None]:
        """Inside, the output of a run includes the inputs of the modules that the site calls."""
        self.includes_inputs = True
        try:
            yield
        finally:
            self.includes_inputs = False

    @contextmanager
    def scaled_branches(self, factors: Mapping[nn.Module, float]) -> Iterator[None]:
        """Inside, multiply the residual branches of these modules by their factors.

        A module with factor 0 does not run. It returns its input, in the structure of its output in
        the last watched forward.
        """
        with ExitStack() as stack:
            for module, factor in factors.items():
                if factor == 0 and module in self._last_outputs:
                    stack.enter_context(own_forward(module))
                    module.forward = partial(_skip, module, self._last_outputs[module])
            outer_factors, self._branch_factors = self._branch_factors, factors
            try:
                yield
            finally:
                self._branch_factors = outer_factors

    @contextmanager
    def random_inputs(self) -> Iterator[None]:
        """Inside, the floating point tensors among the arguments have standard normal values."""
        original_call, self.call = self.call, self.call.with_random_values()
        try:
            yield
        finally:
            self.call = original_call

    @property
    def has_children(self) -> bool:
        """Whether there is any module inside the site."""
        return len(self._inside) > 1

    @property
    def has_zero_weights(self) -> bool:
        """Whether a parameter is zero everywhere, as at the end of a new residual branch."""
        return any(not bool(parameter.any()) for parameter in self.module.parameters())

    def weights(self) -> list[Tensor]:
        """The parameters and buffers of the site and of the modules inside."""
        return [*self.module.parameters(), *self.module.buffers()]


def _skip(module: nn.Module, last_output: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a skipped layer: it returns its input, in the structure of `last_output`."""
    return DirectCall(0, module, args, kwargs, last_output).output_with_branch(0.0)


@contextmanager
def random_zero_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters that are zero everywhere have random values.

    They are drawn from N(0, 0.5^2), which neither vanishes nor overflows in the layers behind.
    """
    zeros = [
        parameter
        for parameter in module.parameters()
        if parameter.is_floating_point() and not bool(parameter.any())
    ]
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def output_tensors(output: object) -> list[Tensor]:
    """The tensors of a module's output, in the order of torch's pytrees.

    Objects that pytrees do not open, such as dataclasses, are read by their attributes.
    """
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(output):
        is_object = hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor)
        leaves.append(vars(leaf) if is_object else leaf)
    return [leaf for leaf in pytree.tree_leaves(leaves) if isinstance(leaf, Tensor)]


def rounding_step(tensors: list[Tensor]) -> float:
    """The largest relative rounding step of the dtypes of these tensors.

    That of float32 where none is a floating point tensor.
    """
    steps = [torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()]
    return max(steps, default=torch.finfo(torch.float32).eps)
