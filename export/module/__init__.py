"""Inspect and run a torch module: its parts and dropouts, its random draws, and its outputs."""
