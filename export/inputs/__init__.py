"""From a user's samples to evidence: axes, probes and single rows, and how user code is loaded."""
