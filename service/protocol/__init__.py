"""The Open Inference Protocol v2 over REST, as bytes and tensors. Knows no framework, no model and
no engine.
"""
