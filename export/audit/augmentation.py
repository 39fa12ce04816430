"""Which modules augment their data in training, to go by their names or their configuration.

SpecAugment (Park et al. 2019, arXiv:1904.08779) masks spans of time steps or of features. Where the
masked values become zeros, nothing but the name tells that from a dropout that is not scaled.
"""

from __future__ import annotations

from torch import nn

from evalmode.export.audit import masks
from evalmode.export.audit.noise_tape import Application

_NAMES = ("augment", "specaug", "timemask", "frequencymask", "maskalong", "cutout", "erasing")


def augments(part: nn.Module) -> bool:
    """Whether a module says that it augments: by its class's name, or as Hugging Face's
    configurations do.
    """
    classes = "\n".join(base.__name__.lower() for base in type(part).__mro__)
    config = getattr(part, "config", None)
    return any(name in classes for name in _NAMES) or bool(
        getattr(config, "apply_spec_augment", False)
    )


def masks_spans(application: Application) -> bool:
    """Whether a mask takes whole steps or features: an element alone is what a dropout takes."""
    noise = application.noise
    if noise.dim() < 2 or application.additive:
        return False
    shape = masks.shape_of(noise, float(noise.nan_to_num(0.0).max()))
    return 1 in noise.shape[1:] or any(noise.shape[axis] > 1 for axis in shape.shared)
