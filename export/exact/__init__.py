"""The proof that nothing in an ONNX graph rounds, from the file alone.

`values.py` says what is known of a tensor, the files of operators compute it for a node from its
inputs, and `prove.py` walks a graph. `statements.py` makes the certificate's statements of it.
"""
