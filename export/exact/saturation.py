"""Products of bytes that may saturate on x86 processors without VNNI instructions.

There `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs of products in 16 bits, where
a sum beyond 32,767 becomes 32,767. Processors with VNNI, and ARM's, add in 32 bits. A signed left
operand is made unsigned first, by adding 128. Unsigned weights are widened to 16 bits, which is
safe. ONNX Runtime avoids the instruction if `session.x64quantprecision` is set to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Reason
from evalmode.export.exact.prove import Proof
from evalmode.export.exact.values import NotExact, Tensor
from evalmode.export.graph import Graph, NodeAt, Weight
from evalmode.export.graph.errors import Broken
from evalmode.export.graph.scope import Initializer

LARGEST_PAIR = 2**15 - 1
_LARGEST_BYTE = 255
_SIGNED_BYTE = np.dtype(np.int8)

# Domain and operator -> the inputs with the left operand and with the weights. None: the operator
# quantises its left operand itself.
_PRODUCTS: dict[tuple[str, str], tuple[int | None, int]] = {
    ("", "ConvInteger"): (0, 1),
    ("", "MatMulInteger"): (0, 1),
    ("", "QLinearConv"): (0, 3),
    ("", "QLinearMatMul"): (0, 3),
    ("com.microsoft", "DynamicQuantizeLSTM"): (None, 1),
    ("com.microsoft", "DynamicQuantizeMatMul"): (None, 1),
    ("com.microsoft", "MatMulIntegerToFloat"): (0, 1),
    ("com.microsoft", "QAttention"): (0, 1),
    ("com.microsoft", "QGemm"): (0, 3),
    ("com.microsoft", "QLinearConv"): (0, 3),
}


def saturating_products(graph: Graph, proof: Proof) -> tuple[int, tuple[Reason, ...]]:
    """How many products of bytes the graph has, and those whose sums of pairs may saturate.

    What the proof knows of the left operand counts; else it may be any byte.
    """
    followed = {id(call.at.node): call for call in proof.calls}
    quantises = any(_makes_bytes_of_activations(at) for at in graph.nodes)
    count, reasons = 0, []
    for at in graph.nodes:
        places = _PRODUCTS.get((at.domain, at.node.op_type))
        # Between these a runtime makes integer products: MatMulIntegerToFloat and QLinearMatMul.
        is_weight_of_a_pair = (
            at.domain == "" and at.node.op_type == "DequantizeLinear" and quantises
        )
        if at.is_dead or (places is None and not is_weight_of_a_pair):
            continue
        left, right = places or (None, 0)
        call = followed.get(id(at.node))
        weights = _stored_bytes(at, right)
        if is_weight_of_a_pair and (weights is None or weights.ndim < 2):
            continue  # an activation or a bias
        count += 1
        largest = float(_LARGEST_BYTE)
        if call is not None and left is not None:
            largest = _largest_unsigned(call.input(left))
        if weights is not None:
            if weights.dtype != _SIGNED_BYTE:
                continue
            is_kernel = at.node.op_type in ("ConvInteger", "QLinearConv")
            pair = largest * _largest_pair(weights, is_kernel=is_kernel)
        else:
            tensor = call.input(right) if call is not None else None
            pair = largest * 2 * _largest_signed(tensor)
        if pair > LARGEST_PAIR:
            why = (
                f"a sum of two products of bytes may reach {pair:,.0f}, and x86 processors without"
                f" VNNI keep at most {LARGEST_PAIR:,}"
            )
            reasons.append(Reason(node=at.path, op=at.op, why=why))
    return count, tuple(reasons)


def _makes_bytes_of_activations(at: NodeAt) -> bool:
    """Whether it is a QuantizeLinear, or a DequantizeLinear of what is computed or comes from
    outside.
    """
    if at.domain or at.node.op_type != "DequantizeLinear":
        return at.node.op_type == "QuantizeLinear"
    return not isinstance(at.scope.argument(at.node, 0), Initializer)


def _stored_bytes(at: NodeAt, index: int) -> npt.NDArray[Any] | None:
    """The bytes of an initializer; None for anything else."""
    value = at.scope.argument(at.node, index)
    if not isinstance(value, Initializer) or not isinstance(value.weight, Weight):
        return None
    try:
        array = value.weight.array()
    except Broken:
        return None
    if array.dtype in (_SIGNED_BYTE, np.dtype(np.uint8)):
        return array
    return None


def _largest_unsigned(tensor: Tensor) -> float:
    """The largest value of a left operand when it is an unsigned byte."""
    try:
        high = float(tensor.bounds.high.max())
    except NotExact:
        return float(_LARGEST_BYTE)
    return high + 128 if tensor.dtype == _SIGNED_BYTE else high


def _largest_signed(tensor: Tensor | None) -> float:
    """The largest magnitude of a signed right operand; 0 for unsigned bytes."""
    if tensor is None:
        return 128.0
    if tensor.dtype != _SIGNED_BYTE:
        return 0.0
    try:
        return float(tensor.bounds.largest.max())
    except NotExact:
        return 128.0


def _largest_pair(weights: npt.NDArray[Any], *, is_kernel: bool) -> int:
    """The largest magnitude of a sum of two weights that one output adds up.

    `weights` are (..., K, N), or those of a convolution: (outputs, ...). Any two weights of an
    output are taken, because how a kernel pairs them depends on it.
    """
    if is_kernel:
        weights = weights.reshape(weights.shape[0], -1).T
    if weights.ndim < 2:
        return 2 * 128
    largest = 0
    for matrix in weights.reshape(-1, *weights.shape[-2:]):
        if len(matrix) == 1:
            largest = max(largest, int(np.abs(matrix.astype(np.int32)).max(initial=0)))
            continue
        top = np.partition(matrix, len(matrix) - 2, axis=0)[-2:].astype(np.int32)
        bottom = np.partition(matrix, 1, axis=0)[:2].astype(np.int32)
        largest = max(largest, int(top.clip(min=0).sum(axis=0).max(initial=0)))
        largest = max(largest, -int(bottom.clip(max=0).sum(axis=0).min(initial=0)))
    return largest
