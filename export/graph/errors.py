"""Errors about files that hold no valid ONNX model."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class ModelUnreadable(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ModelUnreadable"
    """A file that holds no valid ONNX model; the message names the file, and the node or tensor."""


class Broken(Exception):  # noqa: N818
    """What is not valid in a model. The message lacks the file's name.

    It never leaves this package: `graph` and `suspicious_weights` turn it into ModelUnreadable.
    """
