"""The samples, and a module that is asked, show which axes vary together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from evalmode.export.inputs.axes import Sample
from evalmode.export.inputs.find_axes import Forward, find_axes
from tests.export.inputs.counting import tensors


def module_that_requires(*conditions: Callable[[Sample], bool]) -> Forward:
    """A module that reads samples that meet all conditions, and answers with their sums."""

    def run(sample: Sample) -> dict[str, torch.Tensor]:
        if not all(condition(sample) for condition in conditions):
            raise ValueError("sizes that do not fit")
        return {name: tensor.double().sum() for name, tensor in sample.items()}

    return run


def equal(*axes: tuple[str, int]) -> Callable[[Sample], bool]:
    """The condition that these axes have equal sizes."""
    return lambda sample: len({sample[name].shape[index] for name, index in axes}) == 1


def test_one_sample_shows_the_batch_only() -> None:
    run = module_that_requires(equal(("ids", 0), ("mask", 0)))
    assert find_axes(run, [tensors(ids=(3, 9), mask=(3, 9))]) == {
        "ids": {0: "batch"},
        "mask": {0: "batch"},
    }


def test_axes_that_differ_between_samples_vary_and_share_a_name_if_they_vary_together() -> None:
    samples = [
        tensors(ids=(3, 9), mask=(3, 9), image=(3, 8, 9)),
        tensors(ids=(2, 16), mask=(2, 16), image=(2, 8, 7)),
    ]
    run = module_that_requires(
        equal(("ids", 0), ("mask", 0), ("image", 0)), equal(("ids", 1), ("mask", 1))
    )
    assert find_axes(run, samples) == {
        "ids": {0: "batch", 1: "length"},
        "mask": {0: "batch", 1: "length"},
        "image": {0: "batch", 2: "length1"},
    }


def test_axes_of_one_size_are_distinguished_by_asking_the_module() -> None:
    square = [tensors(image=(2, 8, 8)), tensors(image=(3, 9, 9))]
    assert find_axes(module_that_requires(), square) == {
        "image": {0: "batch", 1: "length", 2: "length1"}
    }
    rows = [tensors(ids=(4, 4), mask=(4, 4)), tensors(ids=(6, 6), mask=(6, 6))]
    run = module_that_requires(equal(("ids", 0), ("mask", 0)), equal(("ids", 1), ("mask", 1)))
    assert find_axes(run, rows) == {key: {0: "batch", 1: "length"} for key in ("ids", "mask")}


def test_an_axis_that_shows_in_no_answer_joins_those_of_its_size() -> None:
    def run(sample: Sample) -> dict[str, torch.Tensor]:
        return {"y": sample["ids"].cumsum(0)}

    samples = [tensors(ids=(2, 5), unused=(2, 5)), tensors(ids=(3, 7), unused=(3, 7))]
    assert find_axes(run, samples) == {key: {0: "batch", 1: "length"} for key in ("ids", "unused")}


@pytest.mark.parametrize("shapes", [{"x": (3, 4), "y": (5, 4)}, {"x": (), "scale": ()}])
def test_inputs_of_different_first_sizes_have_no_batch(shapes: dict[str, tuple[int, ...]]) -> None:
    assert find_axes(module_that_requires(), [tensors(**shapes)]) == {name: {} for name in shapes}


@pytest.mark.parametrize("shape", [(), (1,), (1, 4)])
def test_an_input_that_all_rows_share_has_no_axis_of_rows(shape: tuple[int, ...]) -> None:
    expected = {"x": {0: "batch"}, "scale": {}}
    assert find_axes(module_that_requires(), [tensors(x=(3, 4), scale=shape)]) == expected
    samples = [tensors(x=(3, 4), scale=shape), tensors(x=(5, 4), scale=shape)]
    assert find_axes(module_that_requires(), samples) == expected


def test_two_inputs_whose_first_axes_vary_apart_have_no_batch() -> None:
    samples = [tensors(x=(3, 4), y=(5, 4)), tensors(x=(2, 4), y=(7, 4))]
    assert find_axes(module_that_requires(), samples) == {"x": {0: "length"}, "y": {0: "length1"}}


def test_rows_may_be_on_different_axes_of_two_inputs() -> None:
    samples = [tensors(x=(3, 4), state=(2, 3, 8)), tensors(x=(5, 4), state=(2, 5, 8))]
    run = module_that_requires(equal(("x", 0), ("state", 1)))
    assert find_axes(run, samples) == {"x": {0: "batch"}, "state": {1: "batch"}}


def test_a_first_axis_that_varies_with_another_of_the_same_input_is_no_batch() -> None:
    samples = [tensors(x=(3, 3)), tensors(x=(5, 5))]
    run = module_that_requires(equal(("x", 0), ("x", 1)))
    assert find_axes(run, samples) == {"x": {0: "length", 1: "length"}}
