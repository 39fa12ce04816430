"""The example in the docstring of `evalmode.model.exact` runs and is proved."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest

from evalmode.model import exact
from evalmode.model.exact.formats import (
    ATTENTION,
    HIDDEN,
    LARGEST,
    MASKED,
    MOST_HEAD_WIDTH,
    NORMED,
    PROJECTED,
    largest_weight,
)


def example() -> str:
    """The code between the sentence that introduces it and the next sentence."""
    text = inspect.getdoc(exact) or ""
    code = text.partition("frozen for the export:\n")[2].partition("\nWhat the layers allow")[0]
    return textwrap.dedent(code)


def test_the_example_of_a_network_of_ones_own_is_proved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {}
    exec(compile(example(), "the example", "exec"), names)
    assert capsys.readouterr().out == "proved\n"
    assert names["loss"] < 0.6, "it learns: a guess has 0.69"


def test_the_limits_of_the_docstring_are_those_of_the_formats() -> None:
    text = inspect.getdoc(exact) or ""
    weight = largest_weight(8)
    for count, noun in (
        (LARGEST // (NORMED.largest * weight), "inputs of the format NORMED"),
        (LARGEST // (HIDDEN.largest * weight), "inputs of the format HIDDEN"),
        (LARGEST // (ATTENTION.largest * PROJECTED.largest), "positions"),
        (MOST_HEAD_WIDTH, "numbers a head"),
    ):
        assert f"{count:,} {noun}" in text
    assert 2 * MOST_HEAD_WIDTH * PROJECTED.largest**2 < -MASKED
