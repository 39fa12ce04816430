"""The rules that a graph alone decides, in their order. Loads no torch: a file is verified without
it.
"""

from __future__ import annotations

from types import ModuleType

from evalmode.export.rules import opaque_op, stochastic_op, training_mode

STRUCTURE: tuple[ModuleType, ...] = (stochastic_op, training_mode, opaque_op)
