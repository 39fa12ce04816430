"""Samples whose elements count up, so that the value identifies the element."""

from __future__ import annotations

import torch

from evalmode.export.inputs.axes import Sample


def tensors(**shapes: tuple[int, ...]) -> Sample:
    """Float tensors of these shapes, by name."""
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        for name, shape in shapes.items()
    }
