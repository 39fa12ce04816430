"""The two kinds of dropout: inverted (scales in training) and classic (scales in eval).

Both drop an element with probability `p` and keep it with probability `keep = 1 - p`. In this
project `p` is always the *drop* probability, as in PyTorch. Papers often use the same letter for
the *keep* probability: their `p = 0.8` is `p = 0.2` here.

Both obey one law, for every input x:  E[train(x)] = eval(x).

                      training                eval
    Dropout           mask * x / keep         x            Srivastava et al. 2014, section 10
    ClassicDropout    mask * x                keep * x     Hinton et al. 2012; Srivastava, section 4

What counts as a dropout in a user's module: export/module/dropouts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn


class _Mask(nn.Module):
    """The common part: a valid `p`, and a new Bernoulli(keep) mask for each forward in training."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        # p = 1 would need the factor 1 / 0. NaN fails this comparison as well.
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be a drop probability in [0, 1), got p={p!r}")
        self.p = float(p)

    @property
    def keep(self) -> float:
        """The probability that an element survives, 1 - p."""
        return 1.0 - self.p

    def _mask(self, x: Tensor) -> Tensor:
        """A bool mask of x's shape, each element True with probability keep.

        It is drawn from torch's default generator, so `torch.manual_seed` decides it.
        """
        # Drawn in fp32 for each dtype of x: a uniform fp16 or bf16 has too few values to hit p. On
        # a CPU this takes half the time of bernoulli_, which was a sixth of a training step. Only
        # the bool mask is stored for the backward pass.
        return torch.rand_like(x, dtype=torch.float32) < self.keep

    def extra_repr(self) -> str:
        """The text between the brackets of `repr(module)`."""
        return f"p={self.p}"


class Dropout(_Mask):
    """Inverted dropout: x / (1 - p) or, with probability p, 0 in training; x itself in eval.

    x has any shape, floating dtype and device, and the result has the same. The constructor raises
    ValueError for p outside [0, 1).

    >>> Dropout(0.5).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training; return `x` itself, not a copy, in eval or at p = 0."""
        if not self.training or self.p == 0.0:
            return x
        # `where` and not a product: a dropped inf or NaN becomes 0, and a survivor is exactly
        # x / keep, rounded once.
        return torch.where(self._mask(x), x / self.keep, 0.0)


class ClassicDropout(_Mask):
    """Classic dropout: x or, with probability p, 0 in training; keep * x in eval.

    x has any shape, floating dtype and device, and the result has the same. The constructor raises
    ValueError for p outside [0, 1). `fold` moves the eval factor into neighbouring weights; a
    folded module refuses to train.

    >>> ClassicDropout(0.5).eval()(torch.ones(3))
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training, scale in eval; return `x` itself at p = 0 and, in eval, if folded."""
        if self.p == 0.0:
            return x
        if self.training:
            if self.folded:
                raise RuntimeError(
                    "this ClassicDropout's scale is folded into its neighbours' weights: it cannot"
                    " train"
                )
            return torch.where(self._mask(x), x, 0.0)
        return x if self.folded else x * self.keep

    def extra_repr(self) -> str:
        """The text between the brackets of `repr(module)`."""
        return f"{super().extra_repr()}, folded={self.folded}"


def new_dropout(kind: Literal["inverted", "classic"], p: float) -> Dropout | ClassicDropout:
    """A dropout of this kind with the drop probability `p`."""
    return ClassicDropout(p) if kind == "classic" else Dropout(p)


@torch.no_grad()
def fold(
    dropout: ClassicDropout,
    *,
    following: Iterable[nn.Linear] = (),
    preceding: Iterable[nn.Linear | nn.Embedding] = (),
) -> None:
    """Move the eval factor of a classic dropout into the weights beside it.

    Eval then needs no multiplication. Pass the layers of exactly one side:

    following   the linear layers that read the dropout's output. The bias is unchanged:
                W (keep x) + b = (keep W) x + b
    preceding   all layers whose outputs are summed into the dropout's input. Use this side where
                the output feeds something that is not linear, such as a residual sum:
                keep (W x + b) = (keep W) x + (keep b)

    Raises ValueError for both sides or none, and for a dropout that is already folded, because the
    factor would count twice.
    """
    following, preceding = tuple(following), tuple(preceding)
    if bool(following) == bool(preceding):
        raise ValueError(
            "fold needs the layers on one side of the dropout: either following=... or"
            " preceding=..."
        )
    if dropout.folded:
        raise ValueError(
            "this ClassicDropout is folded already: folding it again would scale twice"
        )
    for layer in (*following, *preceding):
        layer.weight.mul_(dropout.keep)
    for layer in preceding:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.mul_(dropout.keep)
    dropout.folded = True
