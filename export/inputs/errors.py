"""The error of inputs that a module, or a graph, cannot be run on."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class UnusableInputs(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnusableInputs"
    """Sample inputs, or axes of them, that no module can be exported with.

    The message names the input.
    """
