"""Rows of one bucket share a batch: the engine's queue, its batches and its proof. Knows no HTTP
and no ONNX.
"""
