"""Errors about files that hold no valid ONNX model."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class ModelUnreadable(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ModelUnreadable"
    """A file that holds no valid ONNX model; the message names the file, and the node or tensor."""


class Broken(Exception):  # noqa: N818
    """A model that is not valid. The message says what is wrong, without the file's name.

    It never leaves this package: `graph` and `suspicious_weights` turn it into ModelUnreadable.
    """
