"""One site, held still: its captured input and its own state are the same at every run, and nothing
else is random.

Every other module is in eval mode, so that a difference between two runs is the site's own. Does
not know a module that is random in eval around or inside the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from evalmode.export.audit.find_sites import Call
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import saved


class IsolatedSite:
    """A site of a network, with the call to repeat. The network's flags are the site's to set while
    it is judged.
    """

    def __init__(
        self, network: Network, site: nn.Module, call: Call, *, trains: bool = True
    ) -> None:
        """`trains` is False for a site that refuses training mode."""
        self.site, self.call, self._trains = site, call, trains
        inside = list(Network.of(site).parts.values())
        self._restores = [saved(part) for part in inside]
        self._inside = inside
        self._everything = list(network.parts.values())
        self._with_children = False

    def with_children(self) -> None:
        """From now on training is the flag of everything inside too: some ask their child for
        it.
        """
        self._with_children = True

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

    def prepared(self) -> Call:
        """The site's own state as it was, and a fresh copy of its input."""
        for restore in self._restores:
            restore()
        return self.call.again()

    def run_prepared(self, call: Call, *, training: bool) -> list[Tensor]:
        """The floating tensors of the site's output for a prepared call."""
        for part in self._inside if self._with_children else ():
            part.training = training
        self.site.training = training and self._trains
        try:
            output = self.site(*call.args, **call.kwargs)
        finally:
            for part in self._inside:
                part.training = False
        return [tensor.detach() for tensor in tensors(output) if tensor.is_floating_point()]

    def run(self, *, training: bool) -> list[Tensor]:
        """The floating tensors of the site's output, from the same input and state each time."""
        return self.run_prepared(self.prepared(), training=training)

    def weights(self) -> list[Tensor]:
        """The parameters and buffers inside the site."""
        return [*self.site.parameters(), *self.site.buffers()]


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
