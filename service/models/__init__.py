"""Bundles, opened and ready to run: texts and tensors in, answers out.

Also which versions are open, and how they replace each other. This folder knows no HTTP.
"""
