"""Bundles, opened and ready to run: texts and tensors in, answers out; how they are swapped. Knows
no HTTP.
"""
