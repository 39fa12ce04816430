"""The proof that nothing in an ONNX graph rounds, from the file alone.

`values.py` says what is known of a tensor, the files of operators compute it for a node from its
inputs, and `prove.py` walks a graph. `statements.py` makes the certificate's statements of it.

Signs of zero are part of the proof, for the default rounding direction. In another direction all
numbers are the same, but x - x may be -0.0 (ONNX Runtime 1.31: Add, Sub, Sum, ReduceSum, CumSum,
Floor and Ceil when rounding down). So the operators that are followed must make the same numbers of
-0.0 and 0.0: comparisons, casts and lookups do. One that does not, such as Reciprocal, must stay
out, or refuse an input that may be zero. Round alone depends on the direction in its numbers.
"""
