"""From samples to evidence: axes, probes, single rows, and references to the code of users."""
