"""The service room: predictions over HTTP from a certified bundle. Knows ONNX Runtime and FastAPI;
never torch.
"""
