"""Inputs of other sizes and values stay within what the sample shows."""

from __future__ import annotations

import pytest
import torch

from evalmode.export.inputs.resize import boundary_sizes, keeps_masks, resampled, resized
from tests.export.inputs.counting import tensors


def test_fewer_rows_are_cut_at_the_end_and_more_rows_repeat_the_first() -> None:
    sample, axes = tensors(x=(3, 2)), {"x": {0: "batch"}}
    assert resized(sample, axes, {"batch": 1})["x"].tolist() == [[0, 1]]
    assert resized(sample, axes, {"batch": 5})["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert resized(sample, axes, {})["x"].tolist() == sample["x"].tolist()


def test_a_longer_input_is_continued_with_new_numbers_and_its_mask_repeats() -> None:
    axes = {key: {1: "length"} for key in ("ids", "x", "mask")}
    sample = {
        "ids": torch.tensor([[3, 5, 40], [7, 9, 2]]),
        "x": torch.rand(2, 3),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    longer = resized(sample, axes, {"length": 6})
    for name in ("ids", "x"):
        assert torch.equal(longer[name][:, :3], sample[name])
        assert longer[name].unique().numel() == 12
        assert sample[name].min() * 0.99 <= longer[name].min()
        assert longer[name].max() <= sample[name].max()
    assert torch.equal(longer["mask"], torch.cat([sample["mask"]] * 2, 1))
    repeated = resized(sample, axes, {"length": 6}, repeat=True)
    assert torch.equal(repeated["ids"], torch.cat([sample["ids"]] * 2, 1))


def test_both_ends_of_every_axis_are_reached() -> None:
    axes = {"x": {0: "batch", 1: "length"}}
    sample = tensors(x=(3, 8, 4))
    shapes = {
        tuple(resized(sample, axes, sizes)["x"].shape) for sizes in boundary_sizes(sample, axes)
    }
    assert {(1, 8, 4), (2, 8, 4), (65, 8, 4), (3, 1, 4), (1, 1, 4), (3, 7, 4), (3, 16, 4)} <= shapes


def test_other_values_stay_in_the_range_of_the_sample_and_ids_are_its_own() -> None:
    sample = {"ids": torch.tensor([[3, 5], [7, 9]]), "x": torch.rand(4, 3) + 1.0}
    other = resampled(sample, 0)
    assert set(other["ids"].flatten().tolist()) <= {3, 5, 7, 9}
    assert float(other["x"].min()) > 0
    assert float(other["x"].max()) <= float(sample["x"].max())
    assert not torch.equal(other["x"], sample["x"])
    assert other["ids"].unique().numel() == 4, "an id that occurs once does not occur twice"
    assert torch.equal(resampled(sample, 0)["x"], other["x"]), "the same seed, the same values"


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.ones(3, 2), torch.tensor(2.0)])
def test_a_constant_sample_gets_values_that_differ(tensor: torch.Tensor) -> None:
    other = resampled({"x": tensor}, 0)["x"]
    assert other.shape == tensor.shape
    assert not torch.equal(other, tensor)
    if tensor.ndim:
        assert len({tuple(row.tolist()) for row in other}) == 3, (
            "rows must differ to show that one depends on another"
        )


def test_a_mask_keeps_its_values_and_a_size_at_which_a_row_loses_them_all_is_noticed() -> None:
    sample = {
        "ids": torch.arange(12).reshape(2, 6),
        "mask": torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]),
    }
    assert torch.equal(resampled(sample, 0)["mask"], sample["mask"])
    axes = {"ids": {1: "length"}, "mask": {1: "length"}}
    assert keeps_masks(sample, resized(sample, axes, {"length": 4}))
    assert not keeps_masks(sample, resized(sample, axes, {"length": 3})), (
        "the second row would attend to nothing"
    )
