"""Axes are what the user says, or what the samples show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from evalmode.export.inputs.axes import (
    Run,
    ends,
    find_axes,
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


def reads(*needs: Callable[[Sample], bool]) -> Run:
    """A module that reads samples for which all of `needs` hold, and answers with their sums."""

    def run(sample: Sample) -> dict[str, torch.Tensor]:
        if not all(need(sample) for need in needs):
            raise ValueError("sizes that do not fit")
        return {name: tensor.double().sum() for name, tensor in sample.items()}

    return run


def same(*places: tuple[str, int]) -> Callable[[Sample], bool]:
    """Whether the sizes at these places are equal."""
    return lambda sample: len({sample[name].shape[place] for name, place in places}) == 1


def test_one_sample_shows_the_batch_alone() -> None:
    run = reads(same(("ids", 0), ("mask", 0)))
    assert find_axes(run, [tensors(ids=(3, 9), mask=(3, 9))]) == {
        "ids": {0: "batch"},
        "mask": {0: "batch"},
    }


def test_axes_that_differ_between_samples_vary_and_share_a_name_where_they_go_together() -> None:
    samples = [
        tensors(ids=(3, 9), mask=(3, 9), image=(3, 8, 9)),
        tensors(ids=(2, 16), mask=(2, 16), image=(2, 8, 7)),
    ]
    run = reads(same(("ids", 0), ("mask", 0), ("image", 0)), same(("ids", 1), ("mask", 1)))
    assert find_axes(run, samples) == {
        "ids": {0: "batch", 1: "length"},
        "mask": {0: "batch", 1: "length"},
        "image": {0: "batch", 2: "length1"},
    }


def test_axes_of_one_size_that_may_differ_are_told_apart() -> None:
    square = [tensors(image=(2, 8, 8)), tensors(image=(3, 9, 9))]
    assert find_axes(reads(), square) == {"image": {0: "batch", 1: "length", 2: "length1"}}
    rows = [tensors(ids=(4, 4), mask=(4, 4)), tensors(ids=(6, 6), mask=(6, 6))]
    run = reads(same(("ids", 0), ("mask", 0)), same(("ids", 1), ("mask", 1)))
    assert find_axes(run, rows) == {key: {0: "batch", 1: "length"} for key in ("ids", "mask")}


def test_an_axis_that_shows_in_no_answer_goes_with_those_of_its_size() -> None:
    def run(sample: Sample) -> dict[str, torch.Tensor]:
        return {"y": sample["ids"].cumsum(0)}

    samples = [tensors(ids=(2, 5), unused=(2, 5)), tensors(ids=(3, 7), unused=(3, 7))]
    assert find_axes(run, samples) == {key: {0: "batch", 1: "length"} for key in ("ids", "unused")}


@pytest.mark.parametrize("shapes", [{"x": (3, 4), "y": (5, 4)}, {"x": (), "scale": ()}])
def test_inputs_of_different_first_sizes_have_no_batch(shapes: dict[str, tuple[int, ...]]) -> None:
    assert find_axes(reads(), [tensors(**shapes)]) == {name: {} for name in shapes}


@pytest.mark.parametrize("shape", [(), (1,), (1, 4)])
def test_an_input_that_all_rows_share_leaves_them_their_batch(shape: tuple[int, ...]) -> None:
    expected = {"x": {0: "batch"}, "scale": {}}
    assert find_axes(reads(), [tensors(x=(3, 4), scale=shape)]) == expected
    samples = [tensors(x=(3, 4), scale=shape), tensors(x=(5, 4), scale=shape)]
    assert find_axes(reads(), samples) == expected


def test_two_inputs_whose_first_axes_vary_apart_have_no_batch() -> None:
    samples = [tensors(x=(3, 4), y=(5, 4)), tensors(x=(2, 4), y=(7, 4))]
    assert find_axes(reads(), samples) == {"x": {0: "length"}, "y": {0: "length1"}}


def test_rows_may_lie_on_another_axis_of_another_input() -> None:
    samples = [tensors(x=(3, 4), state=(2, 3, 8)), tensors(x=(5, 4), state=(2, 5, 8))]
    run = reads(same(("x", 0), ("state", 1)))
    assert find_axes(run, samples) == {"x": {0: "batch"}, "state": {1: "batch"}}


def test_a_first_axis_that_goes_with_another_of_the_same_input_is_no_batch() -> None:
    samples = [tensors(x=(3, 3)), tensors(x=(5, 5))]
    assert find_axes(reads(same(("x", 0), ("x", 1))), samples) == {"x": {0: "length", 1: "length"}}


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


def test_another_number_of_rows_is_cut_from_the_end_or_begins_again() -> None:
    sample, axes = tensors(x=(3, 2)), {"x": {0: "batch"}}
    assert resized(sample, axes, {"batch": 1})["x"].tolist() == [[0, 1]]
    assert resized(sample, axes, {"batch": 5})["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert resized(sample, axes, {})["x"].tolist() == sample["x"].tolist()


def test_a_longer_input_holds_nothing_twice_that_it_held_once() -> None:
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
    again = resized(sample, axes, {"length": 6}, repeat=True)
    assert torch.equal(again["ids"], torch.cat([sample["ids"]] * 2, 1))


def test_the_ends_of_every_axis_are_reached() -> None:
    axes = {"x": {0: "batch", 1: "length"}}
    sample = tensors(x=(3, 8, 4))
    shapes = {tuple(resized(sample, axes, sizes)["x"].shape) for sizes in ends(sample, axes)}
    assert {(1, 8, 4), (2, 8, 4), (65, 8, 4), (3, 1, 4), (1, 1, 4), (3, 7, 4), (3, 16, 4)} <= shapes


def test_resampled_values_are_of_the_samples_range_and_whole_numbers_are_its_own() -> None:
    sample = {"ids": torch.tensor([[3, 5], [7, 9]]), "x": torch.rand(4, 3) + 1.0}
    other = resampled(sample, 0)
    assert set(other["ids"].flatten().tolist()) <= {3, 5, 7, 9}
    assert float(other["x"].min()) > 0
    assert float(other["x"].max()) <= float(sample["x"].max())
    assert not torch.equal(other["x"], sample["x"])
    assert other["ids"].unique().numel() == 4, "nothing occurs twice that occurs once"
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
