"""The operators that the proof follows: the bounds of each, and why others are not followed."""

from __future__ import annotations

from evalmode.export.exact import arithmetic, movement, products, reductions
from evalmode.export.exact.arithmetic import BoundsRule

OPERATORS: dict[str, BoundsRule] = {
    "Abs": arithmetic.absolute,
    "Add": arithmetic.add,
    "ArgMax": reductions.arg_extreme,
    "ArgMin": reductions.arg_extreme,
    "Cast": arithmetic.cast,
    "Ceil": arithmetic.ceiling,
    "Clip": arithmetic.clip,
    "Concat": movement.concat,
    "ConstantOfShape": movement.constant_of_shape,
    "Conv": products.convolution,
    "CumSum": reductions.cumulative_sum,
    "Div": arithmetic.divide,
    "Dropout": movement.dropout,
    "Einsum": products.einsum,
    "Expand": movement.same,
    "Flatten": movement.reshape,
    "Floor": arithmetic.floor,
    "Gather": movement.gather,
    "GatherElements": movement.gather_elements,
    "GatherND": movement.gather_nd,
    "Gemm": products.gemm,
    "Identity": movement.same,
    "MatMul": products.matrix_product,
    "MatMulInteger": products.integer_matrix_product,
    "Max": arithmetic.maximum,
    "Min": arithmetic.minimum,
    "Mod": arithmetic.modulo,
    "Mul": arithmetic.multiply,
    "Neg": arithmetic.negate,
    "OneHot": movement.one_hot,
    "Pad": movement.pad,
    "Range": arithmetic.range_,
    "ReduceL1": reductions.reduce_l1,
    "ReduceMax": reductions.reduce_extreme,
    "ReduceMean": reductions.reduce_mean,
    "ReduceMin": reductions.reduce_extreme,
    "ReduceSum": reductions.reduce_sum,
    "ReduceSumSquare": reductions.reduce_sum_square,
    "Relu": arithmetic.relu,
    "Reshape": movement.reshape,
    "Round": arithmetic.round_,
    "Shape": arithmetic.shape_sizes,
    "Sign": arithmetic.sign,
    "Size": arithmetic.element_count,
    "Slice": movement.slice_,
    "Split": movement.split,
    "Squeeze": movement.with_other_axes,
    "Sub": arithmetic.subtract,
    "Sum": arithmetic.total,
    "Tile": movement.tile,
    "Transpose": movement.transpose,
    "Trilu": movement.triangle,
    "Unsqueeze": movement.with_other_axes,
    "Where": arithmetic.where,
    **dict.fromkeys(
        ("And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        arithmetic.boolean,
    ),
}

SHAPE_READERS = frozenset({"Shape", "Size"})
"""These read no numbers, so nothing need be known of them."""

FOLDABLE = frozenset(
    {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"}
)
"""These make stored numbers of stored numbers: see `movement.fold`."""

# Functions that no float32 result is exact for, and averages that divide.
ROUNDING = frozenset(
    (
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Attention",
        "AveragePool",
        "BatchNormalization",
        "Celu",
        "ConvTranspose",
        "Cos",
        "Cosh",
        "DFT",
        "DynamicQuantizeLinear",
        "Elu",
        "Erf",
        "Exp",
        "GRU",
        "Gelu",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "InstanceNormalization",
        "LRN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "LpPool",
        "MeanVarianceNormalization",
        "Mish",
        "PRelu",
        "Pow",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
        "RMSNormalization",
        "RNN",
        "Reciprocal",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceProd",
        "Resize",
        "RotaryEmbedding",
        "STFT",
        "Selu",
        "Sigmoid",
        "Sin",
        "Sinh",
        "Softmax",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
    )
)


_OTHER_REASONS = {
    # Exact by itself, but ONNX Runtime 1.31 makes MatMulNBits of it and of a MatMul that reads it,
    # which quantises the other operand to 8 bits. Behind an int32 it inserts a QuantizeLinear to
    # uint8, where a Reshape or a Transpose follows.
    "DequantizeLinear": "runtimes quantise anew what stands beside it",
    # ONNX Runtime 1.31 makes one of two (DoubleQDQPairsRemover). Where two round 5.6 to 6 and 6 / 4
    # to 2, one rounds 5.6 / 4 to 1.
    "QuantizeLinear": "it rounds, and runtimes make one of two, which rounds otherwise",
    "Loop": "what a loop computes is not followed",
    "Scan": "what a loop computes is not followed",
}


def why_not_followed(op: str) -> str:
    """Why an operator that is not in OPERATORS is not followed."""
    if op in _OTHER_REASONS:
        return _OTHER_REASONS[op]
    if op in ROUNDING:
        return "its results round"
    return "the proof does not follow this operator"
