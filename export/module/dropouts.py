"""What counts as a dropout.

In a torch module, three things count:

1. a module that only drops: `is_dropout`, by the names of its classes;
2. a module of torch's that has a dropout rate and drops inside: `should_drop`;
3. any code that draws random numbers in a forward in training, whatever its name:
   `evalmode.export.module.randomness.watch`.

In a graph, the operators that drop are listed in `evalmode.export.rules.training_mode`.
"""

from __future__ import annotations

from torch import nn

# A class is a dropout if its name, or that of a class it inherits from, contains one of these in
# any case: nn.Dropout1d, timm's DropPath and DropBlock2d, torchvision's StochasticDepth.
_DROPOUT_NAMES = ("dropout", "droppath", "dropblock", "stochasticdepth")

# Attributes that hold the rate: of nn.Dropout and torchvision, of timm, and of nn.RNNBase and
# nn.MultiheadAttention.
_RATE_NAMES = ("p", "drop_prob", "dropout")


def is_dropout(part: nn.Module) -> bool:
    """Whether a module only drops, judged by the names of its classes.

    A module with parameters computes more than a dropout, whatever its name is.

    >>> is_dropout(nn.Dropout2d(0.1)), is_dropout(nn.LSTM(4, 4))
    (True, False)
    """
    if next(part.parameters(), None) is not None:
        return False
    class_names = [base.__name__.lower() for base in type(part).__mro__]
    return any(name in class_name for name in _DROPOUT_NAMES for class_name in class_names)


def should_drop(part: nn.Module) -> bool:
    """Whether a module of this class should drop in training if its rate is above 0."""
    return is_dropout(part) or isinstance(part, nn.RNNBase | nn.MultiheadAttention)


def declared_rate(module: nn.Module) -> float | None:
    """The drop probability in an attribute of the module; None if it has no such attribute.

    >>> declared_rate(nn.Dropout(0.25)), declared_rate(nn.ReLU())
    (0.25, None)
    """
    for name in _RATE_NAMES:
        rate = getattr(module, name, None)
        if isinstance(rate, int | float):
            return float(rate)
    return None
