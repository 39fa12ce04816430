"""Routes, and what stands around them. Knows no ONNX and no batching."""
