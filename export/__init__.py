"""The export room: eval-mode export to ONNX and the checks that certify it. Knows torch and onnx;
knows no HTTP.
"""
