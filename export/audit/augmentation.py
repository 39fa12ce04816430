"""Which modules augment their data in training, by their names or their configuration.

SpecAugment (Park et al. 2019, arXiv:1904.08779) masks spans of time steps or of features. Where the
masked values become zeros, only the name tells it from a dropout that is not scaled.
"""

from __future__ import annotations

from torch import nn

from evalmode.export.audit import masks
from evalmode.export.audit.noise_tape import Application

# Parts of class names in lower case: torchaudio's TimeMasking, torchvision's RandomErasing, ...
_NAMES = ("augment", "specaug", "timemask", "frequencymask", "maskalong", "cutout", "erasing")


def augments(module: nn.Module) -> bool:
    """Whether a module's class names or its configuration say that it augments its data.

    Hugging Face's speech models have `config.apply_spec_augment`.
    """
    class_names = "\n".join(base.__name__.lower() for base in type(module).__mro__)
    if any(name in class_names for name in _NAMES):
        return True
    config = getattr(module, "config", None)
    return bool(getattr(config, "apply_spec_augment", False))


def masks_spans(application: Application) -> bool:
    """Whether a mask covers whole steps or features. A mask of single elements is a dropout."""
    noise = application.noise
    if noise.dim() < 2 or application.additive:
        return False
    pattern = masks.pattern_of(noise, float(noise.nan_to_num(0.0).max()))
    return 1 in noise.shape[1:] or any(noise.shape[axis] > 1 for axis in pattern.shared)
