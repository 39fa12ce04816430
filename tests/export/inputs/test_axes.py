"""Axes are what the user says, or what his samples show."""

from __future__ import annotations

import pytest
import torch

from evalmode.export.inputs.axes import (
    ends,
    infer_axes,
    keeps_masks,
    parse_axes,
    resampled,
    resized,
    sizes_of,
)
from evalmode.export.inputs.candidate import Sample
from evalmode.export.inputs.errors import UnusableInputs


def tensors(**shapes: tuple[int, ...]) -> Sample:
    """Float tensors whose elements count up: each is known by its value."""
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        for name, shape in shapes.items()
    }


def test_one_sample_shows_the_batch_alone() -> None:
    assert infer_axes([tensors(ids=(3, 9), mask=(3, 9))]) == {
        "ids": {0: "batch"},
        "mask": {0: "batch"},
    }


def test_axes_that_differ_between_samples_vary_and_share_a_name_where_they_go_together() -> None:
    samples = [
        tensors(ids=(3, 9), mask=(3, 9), image=(3, 8, 9)),
        tensors(ids=(2, 16), mask=(2, 16), image=(2, 8, 7)),
    ]
    assert infer_axes(samples) == {
        "ids": {0: "batch", 1: "length"},
        "mask": {0: "batch", 1: "length"},
        "image": {0: "batch", 2: "length1"},
    }


@pytest.mark.parametrize("shapes", [{"x": (3, 4), "y": (5, 4)}, {"x": (), "scale": ()}])
def test_inputs_of_different_first_sizes_have_no_batch(shapes: dict[str, tuple[int, ...]]) -> None:
    assert infer_axes([tensors(**shapes)]) == {name: {} for name in shapes}


def test_a_number_beside_rows_leaves_them_their_batch() -> None:
    assert infer_axes([tensors(x=(3, 4), scale=())]) == {"x": {0: "batch"}, "scale": {}}


def test_an_axis_that_grows_with_the_batch_is_named_after_it() -> None:
    assert infer_axes([tensors(x=(3, 3)), tensors(x=(5, 5))]) == {"x": {0: "batch", 1: "batch"}}


def test_what_the_user_says_is_what_varies() -> None:
    assert parse_axes(["x=batch,_,length"], tensors(x=(1, 2, 3), y=(4,))) == {
        "x": {0: "batch", 2: "length"}
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x", "must read NAME=batch,length"),
        ("x=1,2", "must read NAME=batch,length"),
        ("z=batch", "names the input 'z', the inputs are x"),
        ("x=batch", "gives x 1 axes, its sample has 2"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(given: str, said: str) -> None:
    with pytest.raises(UnusableInputs, match=said):
        parse_axes([given], tensors(x=(2, 3)))


def test_one_name_for_axes_of_two_sizes_is_refused() -> None:
    with pytest.raises(UnusableInputs, match="axis 'batch' is 2 in one input and 3 in y"):
        sizes_of(tensors(x=(2,), y=(3,)), {"x": {0: "batch"}, "y": {0: "batch"}})


def test_another_size_is_cut_from_the_end_or_begins_again() -> None:
    sample, axes = tensors(x=(3, 2)), {"x": {0: "batch"}}
    assert resized(sample, axes, {"batch": 1})["x"].tolist() == [[0, 1]]
    assert resized(sample, axes, {"batch": 5})["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert resized(sample, axes, {})["x"].tolist() == sample["x"].tolist()


def test_the_ends_of_every_axis_are_reached() -> None:
    axes = {"x": {0: "batch", 1: "length"}}
    shapes = {tuple(probe["x"].shape) for probe in ends(tensors(x=(3, 8, 4)), axes)}
    assert {(1, 8, 4), (2, 8, 4), (65, 8, 4), (3, 1, 4), (1, 1, 4), (3, 7, 4), (3, 16, 4)} <= shapes


def test_resampled_values_are_of_the_samples_range_and_whole_numbers_are_its_own() -> None:
    sample = {"ids": torch.tensor([[3, 5], [7, 9]]), "x": torch.rand(4, 3) + 1.0}
    other = resampled(sample, 0)
    assert set(other["ids"].flatten().tolist()) <= {3, 5, 7, 9}
    assert float(other["x"].min()) > 0
    assert float(other["x"].max()) <= float(sample["x"].max())
    assert not torch.equal(other["x"], sample["x"])
    assert torch.equal(resampled(sample, 0)["x"], other["x"]), "the same seed, the same values"


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.ones(3, 2), torch.tensor(2.0)])
def test_a_constant_sample_gets_values_that_differ(tensor: torch.Tensor) -> None:
    other = resampled({"x": tensor}, 0)["x"]
    assert other.shape == tensor.shape
    assert not torch.equal(other, tensor)
    if tensor.ndim:
        assert len({tuple(row.tolist()) for row in other}) == 3, (
            "rows that differ show who depends on whom"
        )


def test_a_mask_keeps_its_rows() -> None:
    sample = {
        "ids": torch.arange(12).reshape(2, 6),
        "mask": torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]),
    }
    assert torch.equal(resampled(sample, 0)["mask"], sample["mask"])
    axes = {"ids": {1: "length"}, "mask": {1: "length"}}
    assert keeps_masks(sample, resized(sample, axes, {"length": 4}))
    assert not keeps_masks(sample, resized(sample, axes, {"length": 3})), (
        "the second row would look at nothing"
    )
