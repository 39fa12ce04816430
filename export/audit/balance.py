"""The balance of a site's noise: the constants with which its training forward equals eval.

Each application of noise to the data gets a constant in place of the noise. Applications that share
a constant are a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evalmode.export.audit.isolated_site import rounding_step
from evalmode.export.audit.site import Unclear

# Secant steps. A forward that is linear in the constant takes one.
_STEPS = 30
# Newton steps take every slope at once and need fewer.
_NEWTON_STEPS = 10
# The change of a constant that shows the slope of the outputs in it.
_NUDGE = 1e-3
# With p known, each group has three candidates, and four groups have 81 combinations. Each costs a
# forward, so more groups are searched from the usual constants alone.
_MOST_COMBINED = 4

SCALE_HIDDEN = "a later layer of the module, such as a normalisation, cancels every scale"

Constants = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class NoiseGroup:
    """Applications of noise that share one constant.

    `indices` are the indices of the applications in the order of the forward. `additive` says that
    the noise is added to the data, not multiplied. `largest` is the largest value of the noise,
    which for a mask is the value that it keeps.
    """

    indices: Sequence[int]
    additive: bool
    largest: float


class Balance:
    """Compares forwards under constants with the eval forward, and searches the constants.

    balance = Balance(forward, eval_outputs)
    constants = balance.find(groups, p=p)
    """

    def __init__(
        self, forward: Callable[[Constants], list[Tensor]], expected: list[Tensor]
    ) -> None:
        """`forward` maps constants, by the application's index, to the floating point tensors of
        the output. They have the shapes of `expected`, the eval output.
        """
        self._forward = forward
        self._expected = [tensor.to(torch.float64) for tensor in expected]
        # Sums over a few thousand terms lose some hundred rounding steps. In half precision that
        # would be 50 %, so the tolerance is at most 2 %.
        self._tolerance = min(512 * rounding_step(expected), 0.02)

    def holds(self, constants: Constants) -> bool:
        """Whether the forward under these constants equals the eval forward."""
        return self.equals(self._forward(constants))

    def equals(self, outputs: Sequence[Tensor]) -> bool:
        """Whether these outputs equal those of eval, up to the rounding of long sums."""
        doubles = [tensor.to(torch.float64) for tensor in outputs]
        return self._distance(doubles, self._expected) <= self._tolerance

    def find(self, noise_groups: Sequence[NoiseGroup], *, p: float | None) -> list[float] | Unclear:
        """One constant for each group that makes the training output equal eval's.

        Unclear if no constants, or any constants, make the outputs equal.

        `p` is the declared drop rate. The candidates are, in this order:

        1. the usual constants, as after inverted dropout: 1, or 0 for additive noise;
        2. the constants that the rate `p` would need;
        3. for each group in turn, and then for all groups together: what a secant search finds.
        """
        if not self._expected:
            return Unclear(("its output holds no floating point tensor",))
        groups = [group.indices for group in noise_groups]
        usual = [0.0 if group.additive else 1.0 for group in noise_groups]
        candidates = [usual]
        if p is not None and len(usual) <= _MOST_COMBINED:
            choices = []
            for group in noise_groups:
                if group.additive:
                    choices.append([0.0])  # additive noise has mean 0 at any rate
                else:
                    # The means of a mask with this value whose drop rate is p, or whose keep rate.
                    choices.append([1.0, group.largest * (1 - p), group.largest * p])
            candidates = [list(constants) for constants in itertools.product(*choices)]

        distance, best = float("inf"), usual
        for constants in candidates:
            candidate_distance = self._distance_at(groups, constants)
            if candidate_distance < distance:
                distance, best = candidate_distance, constants
            # Clearly equal: no other candidate can be better by more than rounding.
            if distance <= self._tolerance / 8:
                break
        if distance <= self._tolerance:
            return best if self._is_visible(groups, best) else Unclear((SCALE_HIDDEN,))

        all_groups = list(range(len(groups)))
        for free in [*([group] for group in all_groups), all_groups]:
            solution = self._search(groups, usual, free)
            if solution is not None:
                return solution
        return Unclear(("no single factor makes training equal eval",))

    def find_together(self, indices: Sequence[int]) -> list[float] | None:
        """One constant for each application, by Gauss-Newton steps from 1; None where they do not
        make the forwards equal.
        """
        groups = [[index] for index in indices]
        constants = [1.0] * len(groups)
        expected_shapes = [tensor.shape for tensor in self._expected]
        for _ in range(_NEWTON_STEPS if groups else 0):
            outputs = self._outputs(groups, constants)
            if [tensor.shape for tensor in outputs] != expected_shapes:
                return None
            slopes = []
            for group in range(len(groups)):
                nudged = list(constants)
                nudged[group] += _NUDGE
                change = _flat(self._outputs(groups, nudged)) - _flat(outputs)
                slopes.append(change / _NUDGE)
            residual = _flat(self._expected) - _flat(outputs)
            # gelsd: the slopes may be linearly dependent, which the default driver does not allow.
            steps = torch.linalg.lstsq(
                torch.stack(slopes, 1), residual[:, None], driver="gelsd"
            ).solution[:, 0]
            if not bool(steps.isfinite().all()):
                return None
            constants = [c + float(step) for c, step in zip(constants, steps, strict=True)]
            if self._distance_at(groups, constants) <= self._tolerance:
                return constants
        return None

    def _search(
        self, groups: Sequence[Sequence[int]], usual: list[float], free: list[int]
    ) -> list[float] | None:
        """One constant for the free groups, with the others at their usual constants.

        The secant method finds the zero of the difference from eval, projected on the direction in
        which the constant changes the outputs. None where it finds no visible balance.
        """

        def constants_at(c: float) -> list[float]:
            return [c if group in free else constant for group, constant in enumerate(usual)]

        def outputs_at(c: float) -> list[Tensor]:
            return self._outputs(groups, constants_at(c))

        a = usual[free[0]]
        b = a + 0.5
        direction = [y - x for x, y in zip(outputs_at(a), outputs_at(b), strict=True)]
        value_a = self._project(outputs_at(a), direction)
        value_b = self._project(outputs_at(b), direction)
        for _ in range(_STEPS):
            if value_b == value_a or not abs(value_b) < float("inf"):
                break
            a, b, value_a = b, b - value_b * (b - a) / (value_b - value_a), value_b
            value_b = self._project(outputs_at(b), direction)
            if abs(b - a) <= 1e-9 * max(abs(b), 1.0):
                break
        constants = constants_at(b)
        if self._distance_at(groups, constants) > self._tolerance:
            return None
        return constants if self._is_visible(groups, constants) else None

    def _is_visible(self, groups: Sequence[Sequence[int]], constants: list[float]) -> bool:
        """Whether other constants would change the outputs.

        A normalisation right after the dropout cancels every scale: equal outputs prove nothing.
        """
        outputs = self._outputs(groups, constants)
        for group in range(len(groups)):
            changed = list(constants)
            changed[group] = changed[group] * 1.5 + 0.1
            if self._distance(self._outputs(groups, changed), outputs) <= 2 * self._tolerance:
                return False
        return True

    def _outputs(self, groups: Sequence[Sequence[int]], constants: Sequence[float]) -> list[Tensor]:
        by_index = {}
        for group, constant in zip(groups, constants, strict=True):
            for index in group:
                by_index[index] = constant
        return [tensor.to(torch.float64) for tensor in self._forward(by_index)]

    def _distance_at(self, groups: Sequence[Sequence[int]], constants: Sequence[float]) -> float:
        return self._distance(self._outputs(groups, constants), self._expected)

    def _distance(self, outputs: list[Tensor], others: list[Tensor]) -> float:
        """The largest difference of any tensor, over the largest value that is expected of it.

        Infinite where shapes differ, or where a value is not finite in one of them alone.
        """
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in others]:
            return float("inf")
        distances = [0.0]
        for a, b, expected in zip(outputs, others, self._expected, strict=True):
            equal = (a == b) | (a.isnan() & b.isnan())
            if bool(equal.all()):
                continue
            finite = expected[expected.isfinite()]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            difference = float((a - b)[~equal].abs().max())
            is_nan = difference != difference
            distances.append(difference / largest if largest and not is_nan else float("inf"))
        return max(distances)

    def _project(self, outputs: list[Tensor], direction: list[Tensor]) -> float:
        """The difference from eval along `direction`; infinite where shapes differ."""
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in self._expected]:
            return float("inf")
        total: Tensor | float = 0
        for output, expected, d in zip(outputs, self._expected, direction, strict=True):
            total = total + ((output - expected) * d).nan_to_num(0.0, 0.0, 0.0).sum()
        return float(total)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one row, those that are not finite as 0."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat.nan_to_num(0.0, 0.0, 0.0)
