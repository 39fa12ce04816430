from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evalmode.export.audit.noise_tape import NoiseTape, Reading
from evalmode.export.audit.tensor_roles import Roles

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def run_on_tape(
    forward: Callable[[Tensor], Tensor],
    constants: Mapping[int, float] | None = None,
    *,
    noise: frozenset[int] = frozenset(),
) -> tuple[Reading, Tensor]:
    x = X.clone()
    tape = NoiseTape(Roles([WEIGHT], [x], noise), constants)
    with torch.no_grad(), tape:
        output = forward(x)
    return tape.reading, output


def indexed(x: Tensor) -> Tensor:
    x[torch.rand_like(x) < 0.2] = 0.0
    return x


# name: forward, and what it gives when its noise is replaced by c
MASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], Tensor]]] = {
    "F.dropout": (lambda x: F.dropout(x, 0.2), lambda c: X * c),
    "in place": (lambda x: F.dropout(x, 0.2, inplace=True), lambda c: X * c),
    "a boolean mask": (lambda x: x * (torch.rand_like(x) < 0.8), lambda c: X * c),
    "the mask first": (lambda x: (torch.rand_like(x) < 0.8).float() * x, lambda c: X * c),
    "into the mask": (lambda x: torch.rand(x.shape).floor_().add_(1.0).mul_(x), lambda c: X * c),
    "where": (lambda x: torch.where(torch.rand_like(x) < 0.8, x, 0.0), lambda c: X * c),
    "where, the other way": (
        lambda x: torch.where(torch.rand_like(x) < 0.2, 0.0, x),
        lambda c: X * c,
    ),
    "masked_fill": (lambda x: x.masked_fill(torch.rand_like(x) < 0.2, 0), lambda c: X * c),
    "masked_fill_": (lambda x: x.masked_fill_(torch.rand_like(x) < 0.2, 0), lambda c: X * c),
    "an index": (indexed, lambda c: X * c),
    "a sum": (lambda x: x + torch.randn_like(x), lambda c: X + c),
    "a weighted sum": (
        lambda x: torch.add(x, torch.randn_like(x), alpha=0.5),
        lambda c: X + 0.5 * c,
    ),
    "a difference": (lambda x: x - torch.randn_like(x), lambda c: X - c),
    "weights": (lambda x: x @ F.dropout(WEIGHT, 0.2), lambda c: X @ (WEIGHT * c)),
    "a product of matrices": (lambda x: x @ torch.rand(8, 8), lambda c: X @ torch.full((8, 8), c)),
    "a quotient": (lambda x: torch.rand_like(x) / x, lambda c: c / X),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_application_of_noise_is_recorded_and_a_constant_can_replace_it(name: str) -> None:
    forward, expected = MASKS[name]
    reading, _ = run_on_tape(forward)
    (application,) = reading.applications
    assert reading.obstacles == []
    assert application.noise.dtype == torch.float64
    assert len(application.draws) == 1
    for constant in (1.0, 0.3):
        torch.testing.assert_close(run_on_tape(forward, {0: constant})[1], expected(constant))


def test_the_noise_is_1_where_an_element_is_kept_also_for_masks_of_what_is_dropped() -> None:
    for name in ("where, the other way", "masked_fill", "an index"):
        reading, output = run_on_tape(MASKS[name][0])
        assert torch.equal(reading.applications[0].noise, (output != 0).double()), name


OBSTACLES: dict[str, Callable[[Tensor], Tensor]] = {
    "data as a probability": lambda x: torch.bernoulli(x.sigmoid()),
    "data as a threshold": lambda x: (torch.rand_like(x) < x).float(),
    "a constant that is not 0": lambda x: x.masked_fill(torch.rand_like(x) < 0.2, -1e4),
    "ids": lambda x: torch.where(
        torch.rand(6, 8) < 0.2, torch.zeros(6, 8, dtype=torch.long), x.long()
    ),
    "a divisor": lambda x: x / (1 + torch.rand_like(x)),
    "a power": lambda x: x.abs() ** torch.rand_like(x),
    "positions": lambda x: x[torch.randperm(6)],
    "two branches": lambda x: torch.where(torch.rand_like(x) < 0.5, x, x.flip(0)),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_operator_that_is_not_linear_in_the_noise_is_an_obstacle(name: str) -> None:
    reading, _ = run_on_tape(OBSTACLES[name])
    assert reading.obstacles
    assert all(len(obstacle.split()) > 4 for obstacle in reading.obstacles)


def test_without_draws_there_is_no_application() -> None:
    reading, output = run_on_tape(lambda x: (x @ WEIGHT).relu() * torch.ones_like(x))
    assert (reading.applications, reading.obstacles) == ([], [])
    assert torch.equal(output, (X @ WEIGHT).relu())


def test_the_factors_before_and_after_a_mask_are_recorded() -> None:
    reading, _ = run_on_tape(
        lambda x: x.div(0.8) * (torch.rand_like(x) < 0.8) * 3 / torch.tensor(2.0)
    )
    (application,) = reading.applications
    assert (application.before, application.after) == (pytest.approx(1.25), pytest.approx(1.5))


def test_a_tensor_that_torch_did_not_make_and_that_differs_from_run_to_run_is_noise() -> None:
    def forward(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0] * 7 + [0.0])

    assert run_on_tape(forward)[0].applications == []
    assert len(run_on_tape(forward)[0].non_torch) == 1
    (application,) = run_on_tape(forward, noise=frozenset({0}))[0].applications
    assert application.noise.tolist() == [1.0] * 7 + [0.0]


def test_a_mask_written_into_a_blank_tensor_is_noise() -> None:
    def forward(x: Tensor) -> Tensor:
        mask = torch.ones(8)
        mask[torch.randperm(8)[:2]] = 0.0
        return x * mask.expand(6, 8)

    (application,) = run_on_tape(forward)[0].applications
    assert int((application.noise == 0).sum()) == 12


def test_applications_that_share_a_draw_name_the_same_draws() -> None:
    reading, _ = run_on_tape(lambda x: F.alpha_dropout(x, 0.2, training=True))
    first, second = reading.applications
    assert first.draws == second.draws
    assert (first.additive, second.additive) == (False, True)
