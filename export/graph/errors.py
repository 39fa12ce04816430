"""What is wrong with a file that holds no ONNX model, or a broken one."""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class ModelUnreadable(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ModelUnreadable"
    """A file that is no ONNX model, or a broken one; the message names the file, and the node or
    tensor.
    """


class Broken(Exception):  # noqa: N818
    """What is broken, by someone who does not know the file's name; never leaves this package."""
