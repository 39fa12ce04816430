"""The engine: its queue, its batches and its online proof. It knows neither HTTP nor ONNX."""
