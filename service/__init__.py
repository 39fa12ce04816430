"""Serves certified bundles over HTTP, with ONNX Runtime and FastAPI. It never loads torch."""
