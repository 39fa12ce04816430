"""The export room: eval-mode export to ONNX, and the rules that certify it."""
