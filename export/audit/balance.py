"""The constants for which a site's training forward equals its eval forward. Knows a function of
constants, no tape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evalmode.export.audit.isolated_site import rounding
from evalmode.export.audit.site import Unclear

_STEPS = 30
_NUDGE = 1e-3  # of a constant, for the slope of outputs in it
_MOST_TOGETHER = 4  # effects whose candidates are tried in every combination

Constants = Mapping[int, float]


class Balance:
    """Compares forwards under constants with the eval forward."""

    def __init__(
        self, forward: Callable[[Constants], list[Tensor]], expected: list[Tensor]
    ) -> None:
        """`forward` maps constants by application to the floating tensors of the output, shaped
        like `expected`.
        """
        self._forward = forward
        self._expected = [tensor.to(torch.float64) for tensor in expected]
        # Sums over a few thousand terms lose some hundred rounding steps.
        self._tolerance = min(512 * rounding(expected), 0.02)

    def holds(self, constants: Constants) -> bool:
        """Whether the forward under these constants equals the eval forward."""
        return self.equals(self._forward(constants))

    def equals(self, outputs: Sequence[Tensor]) -> bool:
        """Whether these outputs equal those of the eval forward, to the rounding of long sums."""
        doubles = [tensor.to(torch.float64) for tensor in outputs]
        return self._distance(doubles, self._expected) <= self._tolerance

    def find(
        self,
        parts: Sequence[Sequence[int]],
        additive: Sequence[bool],
        values: Sequence[float],
        p: float | None,
    ) -> list[float] | Unclear:
        """A constant for each part; Unclear when none makes the forwards equal, or any would.

        Tried first: 1 (0 for what is added), as after inverted dropout; then what the declared rate
        would need; then, for one part after the other and for all as one, the constant that a
        secant search finds.
        """
        if not self._expected:
            return Unclear(("its output holds no floating point tensor",))
        usual = [0.0 if is_sum else 1.0 for is_sum in additive]
        off, best = float("inf"), usual
        for guess in self._guesses(usual, values, p):
            away = self._off(parts, guess)
            off, best = (away, guess) if away < off else (off, best)
            if off <= self._tolerance / 8:
                break
        if off <= self._tolerance:
            return best if self._matters(parts, best) else Unclear((UNSEEN,))
        for free in [*([part] for part in range(len(parts))), list(range(len(parts)))]:
            found = self._search(parts, usual, free)
            if found is not None:
                return found
        return Unclear(("training and eval differ by more than the factor of the dropped values",))

    def find_together(self, indices: Sequence[int]) -> list[float] | None:
        """A constant for each application, by Gauss and Newton's steps from 1; None where they lead
        to no equal forwards.
        """
        parts = [[index] for index in indices]
        constants = [1.0] * len(parts)
        for _ in range(_STEPS // 3 if parts else 0):
            outputs = self._outputs(parts, constants)
            if [t.shape for t in outputs] != [t.shape for t in self._expected]:
                return None
            columns = []
            for part in range(len(parts)):
                moved = [c + _NUDGE * (index == part) for index, c in enumerate(constants)]
                columns.append((_joined(self._outputs(parts, moved)) - _joined(outputs)) / _NUDGE)
            away = _joined(self._expected) - _joined(outputs)
            steps = torch.linalg.lstsq(
                torch.stack(columns, 1), away[:, None], driver="gelsd"
            ).solution[:, 0]
            if not bool(steps.isfinite().all()):
                return None
            constants = [c + float(step) for c, step in zip(constants, steps, strict=True)]
            if self._off(parts, constants) <= self._tolerance:
                return constants
        return None

    def _guesses(
        self, usual: list[float], values: Sequence[float], p: float | None
    ) -> list[list[float]]:
        if p is None or len(usual) > _MOST_TOGETHER:
            return [usual]
        choices = [
            (c, *([] if c == 0 else [v * (1 - p), v * p]))
            for c, v in zip(usual, values, strict=True)
        ]
        return [list(guess) for guess in itertools.product(*choices)]

    def _outputs(self, parts: Sequence[Sequence[int]], constants: Sequence[float]) -> list[Tensor]:
        by_index = {index: c for part, c in zip(parts, constants, strict=True) for index in part}
        return [tensor.to(torch.float64) for tensor in self._forward(by_index)]

    def _off(self, parts: Sequence[Sequence[int]], constants: Sequence[float]) -> float:
        return self._distance(self._outputs(parts, constants), self._expected)

    def _distance(self, outputs: list[Tensor], others: list[Tensor]) -> float:
        """The largest difference over the largest expected value, tensor by tensor; inf for shapes
        that differ.
        """
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in others]:
            return float("inf")
        return max(
            (
                self._relative(a, b, e)
                for a, b, e in zip(outputs, others, self._expected, strict=True)
            ),
            default=0,
        )

    def _relative(self, a: Tensor, b: Tensor, expected: Tensor) -> float:
        alike = (a == b) | (a.isnan() & b.isnan())
        if bool(alike.all()):
            return 0.0
        finite = expected[expected.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        away = float((a - b)[~alike].abs().max())
        return away / largest if largest and away == away else float("inf")

    def _matters(self, parts: Sequence[Sequence[int]], constants: list[float]) -> bool:
        """Whether another constant would be seen: a normalisation right after the dropout takes any
        scale out.
        """
        outputs = self._outputs(parts, constants)
        return all(
            self._distance(self._outputs(parts, _moved(constants, part)), outputs)
            > 2 * self._tolerance
            for part in range(len(parts))
        )

    def _search(
        self, parts: Sequence[Sequence[int]], usual: list[float], free: list[int]
    ) -> list[float] | None:
        """The constant of the free parts, the others as usual, by secants on the projected
        difference.
        """

        def outputs(c: float) -> list[Tensor]:
            return self._outputs(parts, [c if part in free else u for part, u in enumerate(usual)])

        a, b = usual[free[0]] or 0.0, (usual[free[0]] or 0.0) + 0.5
        direction = [y - x for x, y in zip(outputs(a), outputs(b), strict=True)]
        low, high = self._along(outputs(a), direction), self._along(outputs(b), direction)
        for _ in range(_STEPS):
            if high == low or not abs(high) < float("inf"):
                break
            a, low, b = b, high, b - high * (b - a) / (high - low)
            high = self._along(outputs(b), direction)
            if abs(b - a) <= 1e-9 * max(abs(b), 1.0):
                break
        found = [b if part in free else u for part, u in enumerate(usual)]
        return (
            found
            if self._off(parts, found) <= self._tolerance and self._matters(parts, found)
            else None
        )

    def _along(self, outputs: list[Tensor], direction: list[Tensor]) -> float:
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in self._expected]:
            return float("inf")
        terms = [
            ((o - e) * d).nan_to_num(0.0, 0.0, 0.0).sum()
            for o, e, d in zip(outputs, self._expected, direction, strict=True)
        ]
        return float(sum(terms)) if terms else 0.0


UNSEEN = "what follows inside the module takes any scale out again"


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat.nan_to_num(0.0, 0.0, 0.0)


def _moved(constants: list[float], part: int) -> list[float]:
    return [c * 1.5 + 0.1 if index == part else c for index, c in enumerate(constants)]
