"""Bundles, opened and ready to run: texts and tensors in, answers out; how versions replace each
other. Knows no HTTP.
"""
