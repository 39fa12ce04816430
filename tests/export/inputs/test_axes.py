"""The text of a flag names the axes that vary; axes with one name have one size."""

from __future__ import annotations

import pytest

from evalmode.export.inputs.axes import parse_axes, sizes_of
from evalmode.export.inputs.errors import UnusableInputs
from tests.export.inputs.counting import tensors


def test_a_text_names_the_axes_of_an_input_that_vary() -> None:
    assert parse_axes(["x=batch,_,length"], tensors(x=(1, 2, 3), y=(4,))) == {
        "x": {0: "batch", 2: "length"}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "must have the form INPUT=batch,length"),
        ("x=1,2", "must have the form INPUT=batch,length"),
        ("z=batch", "names the input 'z', and the inputs are x"),
        ("x=batch", "names 1 axes of x, and its sample has 2"),
    ],
)
def test_a_text_that_does_not_fit_the_sample_is_refused_in_one_sentence(
    text: str, message: str
) -> None:
    with pytest.raises(UnusableInputs, match=message):
        parse_axes([text], tensors(x=(2, 3)))


def test_an_input_that_is_named_twice_is_refused() -> None:
    with pytest.raises(UnusableInputs, match=r"names the input 'x' twice"):
        parse_axes(["x=batch,_", "x=_,length"], tensors(x=(2, 3)))


def test_two_axes_with_one_name_and_different_sizes_are_refused() -> None:
    with pytest.raises(UnusableInputs, match="axis 'batch' is 2 in x and 3 in y"):
        sizes_of(tensors(x=(2,), y=(3,)), {"x": {0: "batch"}, "y": {0: "batch"}})
