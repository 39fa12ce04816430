"""What counts as a dropout, and the rate that it declares."""

from __future__ import annotations

from torch import nn

# The names that dropouts go by.
_DROPOUTS = ("dropout", "droppath", "dropblock", "stochasticdepth")


def is_dropout(part: nn.Module) -> bool:
    """Whether a module is nothing but a dropout, to go by the names of its class and of those that
    it inherits.
    """
    classes = "\n".join(base.__name__.lower() for base in type(part).__mro__)
    # Whether there is a parameter, and not whether one is true.
    has_parameters = next(part.parameters(), None) is not None
    return any(name in classes for name in _DROPOUTS) and not has_parameters


def should_drop(part: nn.Module) -> bool:
    """Whether a module declares that it drops: one that is a dropout, or one of torch's that has
    one inside.
    """
    return is_dropout(part) or isinstance(part, nn.RNNBase | nn.MultiheadAttention)


def declared_rate(module: nn.Module) -> float | None:
    """The drop probability that a module holds, under one of the names that they go by."""
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "dropout")]
    return next((float(rate) for rate in rates if isinstance(rate, int | float)), None)
