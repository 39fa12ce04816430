"""The two dropouts, written out: inverted (scales in training) and classic (scales at test time).

Both drop an element with probability `p` and keep it with probability `keep = 1 - p`. `p` is
PyTorch's convention, the *drop* probability, everywhere in this project; papers and course notes
often print the *keep* probability under the same letter: a `p = 0.8` of theirs is `p = 0.2` here.

The law both obey, for every input x:  E[train(x)] = eval(x).

                      training                eval
    Dropout           mask * x / keep         x            Srivastava et al. 2014, section 10
    ClassicDropout    mask * x                keep * x     Hinton et al. 2012; Srivastava, section 4

Knows nothing of the network around it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Mask(nn.Module):
    """What the two kinds share: a checked `p`, and a fresh Bernoulli(keep) mask for each forward in
    training.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        # p = 1 would need the factor 1/0; NaN fails the comparison too.
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be a drop probability in [0, 1), got p={p!r}")
        self.p = float(p)

    @property
    def keep(self) -> float:
        """The probability, 1 - p, with which an element survives."""
        return 1.0 - self.p

    def _mask(self, x: Tensor) -> Tensor:
        """A bool mask like x, each element True with probability keep, from torch's own seeded
        generator.
        """
        # Drawn in fp32 whatever x is: a uniform fp16 or bf16 has too few values to hit p. On CPU
        # this takes half the time of bernoulli_, which was a sixth of a training step; what stays
        # for backward is the bool mask alone.
        return torch.rand_like(x, dtype=torch.float32) < self.keep

    def extra_repr(self) -> str:
        """What `print(module)` shows between the brackets."""
        return f"p={self.p}"


class Dropout(_Mask):
    """Inverted dropout: in training each element is 0 with probability p, else x / (1 - p); in eval
    the input itself.

    x of any shape, any floating dtype, any device; the result has the same three. Raises ValueError
    for p outside [0, 1) when built.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training; return `x` itself, not a copy, in eval or at p = 0."""
        if not self.training or self.p == 0.0:
            return x
        # where, not a product: a dropped inf or NaN becomes 0, and a survivor is x / keep exactly,
        # rounded once.
        return torch.where(self._mask(x), x / self.keep, 0.0)


class ClassicDropout(_Mask):
    """Classic dropout: in training each element is 0 with probability p, else x; in eval keep * x.

    x of any shape, any floating dtype, any device; the result has the same three. Raises ValueError
    for p outside [0, 1) when built. `fold` moves the eval factor into neighbouring weights; a
    folded module refuses to train.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training, scale in eval (once folded: return `x` itself)."""
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
        """What `print(module)` shows between the brackets."""
        return f"{super().extra_repr()}, folded={self.folded}"


@torch.no_grad()
def fold(
    dropout: ClassicDropout,
    *,
    following: Iterable[nn.Linear] = (),
    preceding: Iterable[nn.Linear | nn.Embedding] = (),
) -> None:
    """Move a classic dropout's eval factor into the weights beside it, so that eval needs no
    multiplication.

    Give the linear layers that read its output (`following`: W (keep x) + b = (keep W) x + b, the
    bias stays), or, where its output feeds something that is not linear such as a residual sum, all
    the layers whose outputs are summed into its input (`preceding`: keep (W x + b) = (keep W) x +
    (keep b)). One side, never both.

    Raises ValueError when both sides or none are given, or when it is folded already: the factor
    would count twice.
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
