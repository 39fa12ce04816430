"""The model room: dropout, the transformer, its data and its training.

Knows torch; knows neither ONNX nor HTTP.
"""
