"""The error for inputs on which a module or a graph cannot run."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class UnusableInputs(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnusableInputs"
    """Sample inputs, or axes, that cannot be used for an export. The message names the input."""
