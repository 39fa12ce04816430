"""The error of inputs that no module, or no graph, can be run on."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class UnusableInputs(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnusableInputs"
    """Sample inputs, or axes of them, that no module can be exported with; the message names the
    input.
    """
