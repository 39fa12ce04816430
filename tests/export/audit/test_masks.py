from __future__ import annotations

import math

import pytest
import torch

from evalmode.export.audit import masks

NAN = math.nan


def draws(
    shape: tuple[int, ...], *, keep: float = 0.7, count: int = 16, value: float = 1.25
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(shape, generator=generator).double() < keep) * value for _ in range(count)]


def pattern_of(noises: list[torch.Tensor], value: float = 1.25) -> masks.MaskPattern:
    pattern = masks.pattern_of(noises[0], value)
    for noise in noises[1:]:
        pattern = pattern.joined(masks.pattern_of(noise, value))
    return pattern


def test_zeros_and_nan_do_not_change_the_kept_value() -> None:
    assert masks.kept_value(torch.tensor([0.0, 1.25, NAN, 1.25]), rounding=1e-7) == 1.25


@pytest.mark.parametrize(
    "noise", [[0.0, 0.0], [1.0, 1.5, 0.0], [NAN], [-1.0, -1.0, 0.0], [1.0, -1.0]]
)
def test_noise_that_is_no_mask_has_no_kept_value(noise: list[float]) -> None:
    assert masks.kept_value(torch.tensor(noise), rounding=1e-7) is None


def test_values_within_rounding_are_one_kept_value() -> None:
    assert masks.kept_value(torch.tensor([1.25, 1.25 * (1 + 2e-7)]), rounding=1e-7) is not None
    assert (
        masks.kept_value(
            torch.tensor([1.25, 1.25 * (1 + 2e-6)], dtype=torch.float64), rounding=1e-7
        )
        is None
    )


@pytest.mark.parametrize(
    ("size", "shared"),
    [
        ((4, 6, 8), ()),
        ((4, 6, 1), (2,)),
        ((4, 1, 1), (1, 2)),
        ((1, 6, 8), (0,)),
        ((1, 1, 1), (0, 1, 2)),
    ],
)
def test_the_shared_axes_are_those_along_which_the_mask_is_constant(
    size: tuple[int, ...], shared: tuple[int, ...]
) -> None:
    noises = [noise.expand(4, 6, 8) for noise in draws(size)]
    pattern = pattern_of(noises)
    assert pattern.shared == shared
    is_visible, is_kept = masks.groups(noises[0], pattern)
    assert is_visible.sum() == math.prod(size)
    assert is_kept.sum() == (noises[0] != 0).double().mean() * math.prod(size)


def test_a_mask_that_drops_nothing_shares_no_axis() -> None:
    assert pattern_of([torch.full((4, 6), 1.25).double()]).shared == ()


def test_a_group_is_visible_when_one_of_its_elements_is() -> None:
    noise = torch.tensor([[1.25, NAN, 1.25], [NAN, 0.0, 0.0], [NAN, NAN, NAN]])
    is_visible, is_kept = masks.groups(noise, masks.MaskPattern(1.25, (True, False), dropped=True))
    assert is_visible.flatten().tolist() == [True, True, False]
    assert is_kept.flatten().tolist() == [True, False, False]


def test_neighbours_agree_in_blocks_and_not_where_elements_are_independent() -> None:
    independent = [noise != 0 for noise in draws((64, 64))]
    blocks = [noise.repeat_interleave(2, 1) for noise in independent]
    is_visible = [torch.ones_like(noise, dtype=torch.bool) for noise in independent]
    assert not masks.neighbours_agree(is_visible, independent)
    assert masks.neighbours_agree([torch.ones_like(b, dtype=torch.bool) for b in blocks], blocks)
    assert not masks.neighbours_agree(is_visible, [torch.ones_like(noise) for noise in is_visible])
