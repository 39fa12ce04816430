"""Verify ONNX files and bundles by the rules, one or many at a time."""
