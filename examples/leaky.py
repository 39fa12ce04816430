"""An export that kept its dropout, for `evalmode verify`: `python examples/leaky.py` writes
leaky.onnx.
"""

from __future__ import annotations

import torch
from torch import nn

module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))

# The mistake: `module.eval()` is missing here.
torch.onnx.export(module, (torch.ones(1, 4),), "leaky.onnx", verbose=False)
