"""One site, held still: its captured input and its own state are the same at every run, and nothing
else is random.

Every other module is in eval mode, so that a difference between two runs is the site's own. Does
not know a module that is random in eval around or inside the site.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from evalmode.export.audit.call import Call, give_state
from evalmode.export.audit.own_calls import OwnCall, own_calls
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import own_forward
from evalmode.export.module.untouched import saved


class IsolatedSite:
    """A site of a network, with the call to repeat. The network's flags are the site's to set while
    it is judged.
    """

    def __init__(
        self,
        network: Network,
        site: nn.Module,
        call: Call,
        *,
        trains: bool = True,
        sites: Collection[nn.Module] = (),
    ) -> None:
        """`trains` is False for a site that refuses training mode; `sites` are the modules that are
        judged themselves.
        """
        self.site, self.call, self._trains = site, call, trains
        parts = Network.of(site).parts
        self._inside = list(parts.values())
        self._before = [saved(part) for part in self._inside]
        give_state(parts, call.state)
        self._restores = [saved(part) for part in self._inside]
        self._everything = list(network.parts.values())
        self._sites = {id(part) for part in sites}
        self._asked: list[nn.Module] = []
        self._branches: Mapping[nn.Module, float] = {}
        self._shows_inputs = False
        self._calls: list[OwnCall] = []
        self._answers: dict[nn.Module, Any] = {}

    @property
    def has_parts(self) -> bool:
        """Whether there is any module inside the site."""
        return len(self._inside) > 1

    def with_children(self) -> None:
        """From now on training is the flag of what is inside too: some ask their child for it. What
        is a site itself stays in eval.
        """
        self._asked = [part for part in self._inside if id(part) not in self._sites]

    @contextmanager
    def showing_inputs(self) -> Iterator[None]:
        """Meanwhile what reaches the modules that the site calls is part of its output."""
        self._shows_inputs = True
        try:
            yield
        finally:
            self._shows_inputs = False

    @contextmanager
    def branches(self, factors: Mapping[nn.Module, float]) -> Iterator[None]:
        """Meanwhile what these modules add to their input counts so many times.

        A module with factor 0 does not run: it passes on its input, in the form of its last answer
        that was watched.
        """
        with ExitStack() as stack:
            for module, factor in factors.items():
                if factor == 0 and module in self._answers:
                    stack.enter_context(own_forward(module))
                    module.forward = partial(_skip, module, self._answers[module])
            before, self._branches = self._branches, factors
            try:
                yield
            finally:
                self._branches = before

    def calls_of(self, *, training: bool) -> list[nn.Module]:
        """The modules that the site's own code calls in one more forward, in order."""
        self.run(training=training, watched=True)
        return self.called

    @property
    def called(self) -> list[nn.Module]:
        """The modules that the site's own code called in the last forward that was watched."""
        return [call.module for call in self._calls]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """No gradients, no fused attention (it hides its dropout), every flag given back.

        Eval mode is set by attribute: `eval()` does not reach modules in plain lists.
        """
        flags = [part.training for part in self._everything]
        try:
            for part in self._everything:
                part.training = False
            # Fused attention and cuDNN's recurrent layers hide their dropout from a dispatch mode.
            with (
                plain_forward(),
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.cudnn.flags(enabled=False),
            ):
                yield
        finally:
            for part, flag in zip(self._everything, flags, strict=True):
                part.training = flag
            for restore in self._before:
                restore()

    def prepared(self) -> Call:
        """The site's own state as it was, and a fresh copy of its input."""
        for restore in self._restores:
            restore()
        return self.call.again()

    def run_prepared(self, call: Call, *, training: bool, watched: bool = False) -> list[Tensor]:
        """The floating tensors of the site's output for a prepared call."""
        for part in self._asked:
            part.training = training
        self.site.training = training and self._trains
        self._calls = []
        watches = watched or self._shows_inputs or bool(self._branches)
        try:
            with own_calls(self.site, leaving=self._left) if watches else nullcontext():
                output = self.site(*call.args, **call.kwargs)
        finally:
            for part in self._inside:
                part.training = False
        shown = self._calls if self._shows_inputs else ()
        inputs = [x for own in shown if own.module not in self._branches for x in own.inputs()]
        return [
            tensor.detach() for tensor in (*tensors(output), *inputs) if tensor.is_floating_point()
        ]

    def _left(self, call: OwnCall) -> Any:
        self._calls.append(call)
        factor = self._branches.get(call.module)
        if factor is None:
            self._answers[call.module] = call.output
        return None if factor is None or factor == 0 else call.with_branch(factor)

    def run(self, *, training: bool, watched: bool = False) -> list[Tensor]:
        """The floating tensors of the site's output, from the same input and state each time."""
        return self.run_prepared(self.prepared(), training=training, watched=watched)

    @property
    def has_zero_weights(self) -> bool:
        """Whether a parameter inside is zero everywhere: a branch may give nothing at the start."""
        return any(not bool(parameter.any()) for parameter in self.site.parameters())

    def weights(self) -> list[Tensor]:
        """The parameters and buffers inside the site."""
        return [*self.site.parameters(), *self.site.buffers()]


def _skip(module: nn.Module, answer: Any, *args: Any, **kwargs: Any) -> Any:
    return OwnCall(0, module, args, kwargs, answer).with_branch(0.0)


@contextmanager
def noise_for_zero_weights(module: nn.Module) -> Iterator[None]:
    """Small random values meanwhile in the parameters that are zero everywhere: normal ones of a
    standard deviation of .5, which neither vanish nor overflow.
    """
    zeros = [
        item for item in module.parameters() if item.is_floating_point() and not bool(item.any())
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


def tensors(output: object) -> list[Tensor]:
    """The tensors of a module's output, in the order of torch's pytrees; of other objects, those
    that they hold.
    """
    leaves = pytree.tree_leaves(output)
    held = [
        vars(leaf) if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    return [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, Tensor)]


def rounding(of: list[Tensor]) -> float:
    """The largest relative rounding step of these tensors' dtypes; float32's where there is
    none.
    """
    steps = [torch.finfo(tensor.dtype).eps for tensor in of if tensor.is_floating_point()]
    return max(steps, default=torch.finfo(torch.float32).eps)
