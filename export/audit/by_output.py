"""Measuring at the outputs, for noise that no tape can follow.

Examples are a mask that Python draws, and a path that is chosen at random.

Training's output is compared with eval's. Four patterns are read exactly:

1. a path that is taken or not: one of two whole outputs (`_read_two_outputs`);
2. the affine pair of AlphaDropout (`_read_alpha`);
3. a mask: every element is 0 or v times eval's;
4. one factor for the whole forward.

For anything else only the mean of the whole output is compared (`agreement.py`). That may prove
agreement but, after a non-linear step, no gap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evalmode.export.audit.isolated_site import IsolatedSite, rounding_step
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.site import Effect, Kind, Unclear

# Training forwards that show the pattern: this many, fewer for large outputs, but never under 16.
_PROBES = 64
_LEAST_PROBES = 16
# The elements of all probes together: 128 MB in float64.
_MOST_ELEMENTS = 16_000_000

_NO_PATTERN = "training's output is no multiple of eval's, and what it was made of cannot be seen"

# Turns the training output into the noise of an effect.
Reader = Callable[[list[Tensor]], Tensor]


class OutputObserver:
    """Observes the outputs of a site: one effect for each tensor that differs from eval."""

    def __init__(
        self, site: IsolatedSite, readers: list[Reader], effects: tuple[Effect, ...]
    ) -> None:
        self.effects = effects
        self._site, self._readers = site, readers

    @classmethod
    def of(cls, site: IsolatedSite) -> OutputObserver | Unclear:
        """The observer of a site; Unclear where the outputs cannot be compared.

        It has no effects where training always returned what eval returns.
        """
        expected, repeated = site.run(training=False), site.run(training=False)
        if not expected:
            return Unclear(("its output holds no floating point tensor",))
        if not all(_equal(a, b) for a, b in zip(expected, repeated, strict=True)):
            return Unclear(("a module inside it is random in eval",))

        size = max(sum(tensor.numel() for tensor in expected), 1)
        probe_count = max(min(_PROBES, _MOST_ELEMENTS // size), _LEAST_PROBES)
        probes = [site.run(training=True) for _ in range(probe_count)]
        shapes = [tensor.shape for tensor in expected]
        if any([tensor.shape for tensor in probe] != shapes for probe in probes):
            return Unclear(("training returns other shapes than eval",))

        two_outputs = _read_two_outputs(probes, expected)
        if two_outputs is not None:
            reader, effect = two_outputs
            return cls(site, [reader], (effect,))
        readers, effects = [], []
        for index, tensor in enumerate(expected):
            tensor_probes = [probe[index] for probe in probes]
            if not all(_equal(probe, tensor) for probe in tensor_probes):
                reader, effect = _read_tensor(index, tensor_probes, tensor)
                readers.append(reader)
                effects.append(effect)
        return cls(site, readers, tuple(effects))

    @property
    def exact(self) -> bool:
        """Whether every output that differs has a pattern that is read exactly."""
        return bool(self.effects) and all(effect.direction is None for effect in self.effects)

    def draw(self) -> list[Tensor]:
        """The noise of one more forward, one tensor per effect."""
        output = self._site.run(training=True)
        return [reader(output) for reader in self._readers]


def _read_two_outputs(
    probes: list[list[Tensor]], expected: list[Tensor]
) -> tuple[Reader, Effect] | None:
    """A path that is taken or not: two outputs in all, and eval's on the line through them.

    The noise is 1 where the path was taken, else 0.
    """
    outputs, e = [_flat(probe) for probe in probes], _flat(expected)
    first = outputs[0]
    second = next((output for output in outputs if not torch.equal(output, first)), None)
    if second is None or e.numel() < 2:
        return None
    if not all(torch.equal(output, first) or torch.equal(output, second) for output in outputs):
        return None

    # The path was taken in the output that equals eval's, else in the larger one.
    without_path, with_path = sorted(
        (first, second), key=lambda output: (torch.allclose(output, e), float(output.norm()))
    )
    step = with_path - without_path
    balance = float((e - without_path) @ step / (step @ step))
    rounding = rounding_step(expected)
    # 512 rounding steps: the error of sums over a few thousand terms.
    error = float((without_path + balance * step - e).abs().max())
    if error > 512 * rounding * float(e.abs().max()):
        return None

    def reader(output: list[Tensor]) -> Tensor:
        return torch.tensor([float(torch.equal(_flat(output), with_path))], dtype=torch.float64)

    # A path that eval scales by 1 is scaled by 1 / balance where training takes it. The scales
    # themselves are not visible in the outputs.
    scale = 1 / balance if balance else 1.0
    return reader, Effect(balance=balance, scale=scale, rounding=rounding)


def _read_tensor(index: int, probes: list[Tensor], e: Tensor) -> tuple[Reader, Effect]:
    """The pattern of the output tensor at `index`, whose eval value is `e`."""
    step = rounding_step([e])
    e = e.to(torch.float64)
    stack = torch.stack([probe.to(torch.float64) for probe in probes])  # (probes, *e.shape)
    alpha = _read_alpha(index, stack, e, step)
    if alpha is not None:
        return alpha

    # Zeros, and values so small that rounding would decide the ratio.
    too_small = e.abs() <= 64 * step * e.abs().max()

    def ratio(output: list[Tensor]) -> Tensor:
        return (output[index].to(torch.float64) / e).masked_fill(too_small, float("nan"))

    ratios = (stack / e).masked_fill(too_small, float("nan"))
    is_multiple = kept_value(ratios, rounding=4 * step) is not None
    # Noise that enters linearly multiplies each whole forward by one number.
    flat = ratios.flatten(1)  # (probes, elements)
    flat = flat[:, ~flat.isnan().any(0)]
    if not is_multiple and flat.shape[1] >= 2:
        spread = flat.amax(1) - flat.amin(1)
        is_multiple = bool((spread <= 16 * step * flat.abs().amax(1)).all())
    if is_multiple:
        return ratio, Effect(balance=1.0, rounding=4 * step)

    norm = float(e.norm())

    def difference(output: list[Tensor]) -> Tensor:
        return (output[index].to(torch.float64) - e).reshape(-1) / norm

    direction = e.reshape(-1) / norm
    return difference, Effect(balance=0.0, rounding=step, direction=direction, remark=_NO_PATTERN)


def _read_alpha(index: int, stack: Tensor, e: Tensor, step: float) -> tuple[Reader, Effect] | None:
    """The affine pair of AlphaDropout: a dropped element becomes d, a kept one a x + b.

    At the keep rate k = d / (d - b) the pair keeps the mean of N(0, 1). It keeps the variance if
    k (a^2 + b^2) + (1 - k) d^2 = 1. Both are from Klambauer et al. 2017 (arXiv:1706.02515), section
    "New dropout technique". k is the balance: the measured rate must be k. The noise is 1 where an
    element is kept, else 0.
    """
    d_tensor = stack.flatten().mode()[0]
    dropped = (stack - d_tensor).abs() <= 4 * step * d_tensor.abs()
    dropped_count = int(dropped.sum())
    x = e.expand_as(stack)[~dropped]
    d = float(d_tensor)
    if d == 0 or dropped_count < 8 or x.numel() < 8 or float(x.std()) == 0:
        return None

    # The line through the kept elements.
    y = stack[~dropped]
    a = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    b = float(y.mean() - a * x.mean())
    if float((a * x + b - y).abs().max()) > 64 * step * float(y.abs().max()) or d == b:
        return None

    k = d / (d - b)
    scale = a / k if k else 1.0  # 0 where b is not finite
    variance = k * (a * a + b * b) + (1 - k) * d * d
    remark = ""
    if abs(variance - 1) > max(1e-3, 4 * step):
        remark = "what it returns has another variance than N(0, 1)"

    def reader(output: list[Tensor]) -> Tensor:
        tolerance = torch.finfo(output[index].dtype).eps * 4 * abs(d)
        is_kept = (output[index].to(torch.float64) - d).abs() > tolerance
        return is_kept.to(torch.float64)

    effect = Effect(
        balance=k,
        rounding=4 * step,
        pattern=Kind.ALPHA,
        remark=remark,
        scale=scale,
    )
    return reader, effect


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.to(torch.float64).reshape(-1) for tensor in tensors])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and values; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
