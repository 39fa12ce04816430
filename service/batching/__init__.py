"""The engine: its queue, its batches and its proof. Rows of one bucket share a batch. Knows no HTTP
and no ONNX.
"""
