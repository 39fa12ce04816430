"""Another module of the user's, with a generator of its own that no attribute of a network leads
to.
"""

from __future__ import annotations

import random

_GENERATOR = random.Random(0)


def factor() -> float:
    """Another number each time."""
    return _GENERATOR.random()
