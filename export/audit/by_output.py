"""Measuring at the output: for noise that no tape can follow, such as a mask drawn by Python or by
another path.

Training's output is held against eval's. Four patterns are read exactly: every element 0 or v times
eval's (a mask); one of two whole outputs (a path taken or not); AlphaDropout's affine pair; one
factor for each forward. Anything else is compared by the mean of the whole output, which may prove
agreement but, after a non-linear step, no gap. Does not see inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evalmode.export.audit.isolated_site import IsolatedSite, rounding
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.site import Effect, Kind, Unclear

_PROBES = 64
_MOST_ELEMENTS = 16_000_000  # of all probes, where the outputs are large


class OutputObserver:
    """An observer of the site's outputs, one effect for each tensor that moves."""

    def __init__(
        self,
        held: IsolatedSite,
        readers: list[Callable[[list[Tensor]], Tensor]],
        effects: tuple[Effect, ...],
    ) -> None:
        """`readers` turn a training output into the noise of their effect."""
        self.effects = effects
        self._held, self._readers = held, readers

    @classmethod
    def of(cls, held: IsolatedSite) -> OutputObserver | Unclear:
        """The observer of a site that moves; Unclear for outputs that do not compare."""
        expected, again = held.run(training=False), held.run(training=False)
        if not expected:
            return Unclear(("its output holds no floating point tensor",))
        if not _same(expected, again):
            return Unclear(("a module inside it is random in eval",))
        size = sum(tensor.numel() for tensor in expected)
        probes = [
            held.run(training=True)
            for _ in range(max(min(_PROBES, _MOST_ELEMENTS // max(size, 1)), 16))
        ]
        if any([t.shape for t in probe] != [t.shape for t in expected] for probe in probes):
            return Unclear(("training returns other shapes than eval",))
        gate = _gate(probes, expected)
        if gate is not None:
            return cls(held, [gate[0]], (gate[1],))
        pairs = [
            _tensor_pattern(index, [probe[index] for probe in probes], tensor)
            for index, tensor in enumerate(expected)
            if any(not _equal(probe[index], tensor) for probe in probes)
        ]
        return cls(held, [reader for reader, _ in pairs], tuple(effect for _, effect in pairs))

    @property
    def exact(self) -> bool:
        """Whether every output that moves is one of the patterns that are read exactly."""
        return bool(self.effects) and all(effect.direction is None for effect in self.effects)

    def draw(self) -> list[Tensor]:
        """The noise of one more forward."""
        output = self._held.run(training=True)
        return [reader(output) for reader in self._readers]


def _gate(
    probes: list[list[Tensor]], expected: list[Tensor]
) -> tuple[Callable[[list[Tensor]], Tensor], Effect] | None:
    """A path that is taken or not: two outputs in all, with eval on the line between (or beyond)
    them.
    """
    flat, e = [_flat(probe) for probe in probes], _flat(expected)
    other = next((f for f in flat if not torch.equal(f, flat[0])), None)
    if (
        other is None
        or e.numel() < 2
        or not all(torch.equal(f, flat[0]) or torch.equal(f, other) for f in flat)
    ):
        return None
    # Of the two, what eval returns was taken; else the larger.
    skipped, taken = sorted((flat[0], other), key=lambda f: (torch.allclose(f, e), float(f.norm())))
    step = taken - skipped
    balance = float((e - skipped) @ step / (step @ step))
    if float((skipped + balance * step - e).abs().max()) > 512 * rounding(expected) * float(
        e.abs().max()
    ):
        return None

    def reader(output: list[Tensor]) -> Tensor:
        return torch.tensor([float(torch.equal(_flat(output), taken))], dtype=torch.float64)

    # The path scaled by 1 in eval is scaled by 1/balance where it is taken in training; what is
    # scaled is not seen.
    return reader, Effect(
        balance=balance, scale=1 / balance if balance else 1.0, rounding=rounding(expected)
    )


def _tensor_pattern(
    index: int, probes: list[Tensor], e: Tensor
) -> tuple[Callable[[list[Tensor]], Tensor], Effect]:
    step = rounding([e])
    e = e.to(torch.float64)
    stack = torch.stack([probe.to(torch.float64) for probe in probes])
    alpha = _alpha(stack, e, step)
    if alpha is not None:
        return (lambda output: _where_dropped(output[index], alpha[0])), alpha[1]
    small = e.abs() <= 64 * step * e.abs().max()  # zeros, and values too small to divide by

    def ratio(output: list[Tensor]) -> Tensor:
        return (output[index].to(torch.float64) / e).masked_fill(small, float("nan"))

    ratios = (stack / e).masked_fill(small, float("nan"))
    if kept_value(ratios, rounding=4 * step) is not None or _one_factor(ratios, step):
        return ratio, Effect(balance=1.0, rounding=4 * step)
    norm = float(e.norm())

    def difference(output: list[Tensor]) -> Tensor:
        return (output[index].to(torch.float64) - e).reshape(-1) / norm

    return difference, Effect(
        balance=0.0, rounding=step, direction=e.reshape(-1) / norm, why=_UNLIKE
    )


_UNLIKE = "training's output is no multiple of eval's, and what it was made of cannot be seen"


def _one_factor(ratios: Tensor, step: float) -> bool:
    """Whether each draw multiplies everything by one number, which is noise that enters
    linearly.
    """
    flat = ratios.flatten(1)
    flat = flat[:, ~flat.isnan().any(0)]
    if flat.shape[1] < 2:
        return False
    return bool(((flat.amax(1) - flat.amin(1)) <= 16 * step * flat.abs().amax(1)).all())


def _alpha(stack: Tensor, e: Tensor, step: float) -> tuple[float, Effect] | None:
    """AlphaDropout's pair: what is dropped becomes d, what is kept a x + b, and N(0, 1) keeps its
    mean and variance.

    From a, b and d alone: the mean is kept at the keep rate k = d / (d - b), and the variance if
    then k (a^2 + b^2) + (1 - k) d^2 = 1 (Klambauer et al. 2017, section "New dropout technique"). k
    is measured.
    """
    dropped, count = stack.flatten().mode()[0], 0
    at = (stack - dropped).abs() <= 4 * step * dropped.abs()
    count = int(at.sum())
    x = e.expand_as(stack)[~at]
    if float(dropped) == 0 or count < 8 or x.numel() < 8 or float(x.std()) == 0:
        return None
    y = stack[~at]
    a = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    b, d = float(y.mean() - a * x.mean()), float(dropped)
    if float((a * x + b - y).abs().max()) > 64 * step * float(y.abs().max()) or d == b:
        return None
    k = d / (d - b)
    varies = abs(k * (a * a + b * b) + (1 - k) * d * d - 1) > max(1e-3, 4 * step)
    why = "what it returns has another variance than N(0, 1)" if varies else ""
    return d, Effect(
        balance=k, rounding=4 * step, law=Kind.ALPHA, why=why, scale=a / k if k else 1.0
    )


def _where_dropped(output: Tensor, d: float) -> Tensor:
    near = torch.finfo(output.dtype).eps * 4 * abs(d)
    return ((output.to(torch.float64) - d).abs() > near).to(torch.float64)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in tensors])


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
