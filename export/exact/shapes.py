"""The type and the shape of each operator's outputs, from the types and shapes of its inputs.

A rule raises NotExact where the file does not decide the rank. Sizes that depend on the caller are
extents: a range, and the identity of the axis that they came from.
"""

from __future__ import annotations

import numpy as np

from evalmode.export.exact import moved_shapes
from evalmode.export.exact.call import Call, sizes_in
from evalmode.export.exact.outline import Outline, ShapeRule, broadcast, dtype_numbered
from evalmode.export.exact.values import BOOL, INT64, Extent, NotExact, Shape, shape_of


def elementwise(call: Call) -> list[Outline]:
    """One output with the type of the first input."""
    shape: Shape = ()
    for index in range(len(call.inputs)):
        shape = broadcast(shape, call.shape(index))
    return [Outline(dtype=call.input(0).dtype, shape=shape)]


def comparison(call: Call) -> list[Outline]:
    """One boolean output."""
    return [Outline(dtype=BOOL, shape=elementwise(call)[0].shape)]


def like_first(call: Call) -> list[Outline]:
    """One output with the type and the shape of the first input."""
    first = call.input(0)
    return [Outline(dtype=first.dtype, shape=first.shape, sizes=sizes_in(first))]


def like_first_without_sizes(call: Call) -> list[Outline]:
    """One output with the type and the shape of the first input, and other values."""
    first = call.input(0)
    return [Outline(dtype=first.dtype, shape=first.shape)]


def where(call: Call) -> list[Outline]:
    """One output with the type of the second input."""
    shape = broadcast(broadcast(call.shape(0), call.shape(1)), call.shape(2))
    return [Outline(dtype=call.input(1).dtype, shape=shape)]


def cast(call: Call) -> list[Outline]:
    """The shape of the input, and the type of the attribute."""
    dtype = dtype_numbered(call.attribute("to", 0))
    sizes = sizes_in(call.input(0)) if dtype == INT64 else None
    return [Outline(dtype=dtype, shape=call.shape(0), sizes=sizes)]


def shape(call: Call) -> list[Outline]:
    """The axis sizes of the input, or a part of them."""
    sizes = call.shape(0)
    start, end = call.attribute("start", 0), call.attribute("end", None)
    part = sizes[slice(start, end)]
    return [Outline(dtype=INT64, shape=shape_of([len(part)]), sizes=part)]


def size(call: Call) -> list[Outline]:
    """A scalar."""
    return [Outline(dtype=INT64, shape=())]


def matrix_product(call: Call) -> list[Outline]:
    """The shape of NumPy's matmul; MatMulInteger's type is int32."""
    a, b = call.shape(0), call.shape(1)
    if len(a) == 0 or len(b) == 0:
        raise NotExact("an input of a matrix product is a scalar")
    batch = broadcast(a[:-2], b[:-2])
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    dtype = np.dtype(np.int32) if call.op == "MatMulInteger" else call.input(0).dtype
    return [Outline(dtype=dtype, shape=batch + rows + columns)]


def gemm(call: Call) -> list[Outline]:
    """Rows of the first matrix, columns of the second."""
    a, b = call.shape(0), call.shape(1)
    if len(a) != 2 or len(b) != 2:
        raise NotExact("Gemm needs two matrices")
    rows = a[1] if call.attribute("transA", 0) else a[0]
    columns = b[0] if call.attribute("transB", 0) else b[1]
    return [Outline(dtype=call.input(0).dtype, shape=(rows, columns))]


def convolution(call: Call) -> list[Outline]:
    """The batch and the output channels are known, the other sizes are not."""
    x, weights = call.shape(0), call.shape(1)
    spatial = (Extent(0, None),) * (len(x) - 2)
    return [Outline(dtype=call.input(0).dtype, shape=(x[0], weights[0], *spatial))]


def reduction(call: Call) -> list[Outline]:
    """The shape without the axes, or with a size of 1 there. ArgMax and ArgMin have one axis."""
    shape = call.shape(0)
    axes = reduced_axes(call)
    dtype = INT64 if call.op in ("ArgMax", "ArgMin") else call.input(0).dtype
    if not axes:
        return [Outline(dtype=dtype, shape=shape)]
    if call.attribute("keepdims", 1):
        kept = tuple(
            Extent.exactly(1) if axis in axes else extent for axis, extent in enumerate(shape)
        )
    else:
        kept = tuple(extent for axis, extent in enumerate(shape) if axis not in axes)
    return [Outline(dtype=dtype, shape=kept)]


def reduced_axes(call: Call) -> list[int]:
    """The axes that a reduction takes together; an empty list if it does nothing."""
    rank = len(call.shape(0))
    if call.op in ("ArgMax", "ArgMin"):
        return [call.axis("axis", 0, rank)]
    axes = call.axes(rank)
    if axes:
        return axes
    return [] if call.attribute("noop_with_empty_axes", 0) else list(range(rank))


def range_(call: Call) -> list[Outline]:
    """A list from start to limit; only integers are followed."""
    sizes = [sizes_in(call.input(index)) for index in range(3)]
    start, limit, step = (None if part is None else part[0] for part in sizes)
    extent = Extent(0, None)
    if start is not None and limit is not None and step is not None and (step.exact or 0) > 0:
        if start.exact == 0 and step.exact == 1 and limit.lowest >= 0:
            extent = limit
        elif limit.largest is not None and step.exact is not None:
            extent = Extent(0, max(0, -(-(limit.largest - start.lowest) // step.exact)))
    return [Outline(dtype=call.input(0).dtype, shape=(extent,))]


def one_hot(call: Call) -> list[Outline]:
    """A new axis of the depth."""
    indices = list(call.shape(0))
    depth = call.extents(1)[0]
    indices.insert(call.axis("axis", -1, len(indices) + 1), depth)
    return [Outline(dtype=call.input(2).dtype, shape=tuple(indices))]


def einsum(call: Call) -> list[Outline]:
    """The extents of the output's letters."""
    inputs, output = equation(call)
    extents: dict[str, Extent] = {}
    for index, letters in enumerate(inputs):
        for letter, extent in zip(letters, call.shape(index), strict=True):
            extents[letter] = broadcast((extents.get(letter, extent),), (extent,))[0]
    return [Outline(dtype=call.input(0).dtype, shape=tuple(extents[letter] for letter in output))]


def equation(call: Call) -> tuple[list[str], str]:
    """The letters of an Einsum's inputs and of its output. An ellipsis is not followed."""
    text = str(call.attribute("equation", "")).replace(" ", "")
    left, arrow, output = text.partition("->")
    inputs = left.split(",")
    if not arrow or not (left.replace(",", "") + output).isalpha():
        raise NotExact(f"its equation {text!r} is not followed: it needs letters and an arrow")
    ranks_fit = len(inputs) == len(call.inputs) and all(
        len(letters) == len(call.shape(index)) for index, letters in enumerate(inputs)
    )
    repeats = any(len(set(letters)) < len(letters) for letters in (*inputs, output))
    if not ranks_fit or repeats or not set(output) <= set("".join(inputs)):
        raise NotExact(f"its equation {text!r} does not fit its inputs")
    return inputs, output


SHAPES: dict[str, ShapeRule] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min", "Sum"), elementwise),
    **dict.fromkeys(("And", "Or", "Xor"), comparison),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), comparison),
    **dict.fromkeys(
        ("Neg", "Abs", "Floor", "Ceil", "Round", "Sign", "Relu", "Clip", "CumSum", "Trilu"),
        like_first_without_sizes,
    ),
    **dict.fromkeys(("Sqrt", "Exp", "Erf", "Tanh", "Sigmoid", "Softmax"), like_first_without_sizes),
    **dict.fromkeys(("Identity", "Dropout"), like_first),
    **dict.fromkeys(
        (
            "ReduceSum",
            "ReduceSumSquare",
            "ReduceL1",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ArgMax",
            "ArgMin",
        ),
        reduction,
    ),
    "Not": like_first_without_sizes,
    "Where": where,
    "Cast": cast,
    "Shape": shape,
    "Size": size,
    "MatMul": matrix_product,
    "MatMulInteger": matrix_product,
    "Gemm": gemm,
    "Conv": convolution,
    "Einsum": einsum,
    "Reshape": moved_shapes.reshape,
    "Transpose": moved_shapes.transpose,
    "Squeeze": moved_shapes.squeeze,
    "Unsqueeze": moved_shapes.unsqueeze,
    "Flatten": moved_shapes.flatten,
    "Gather": moved_shapes.gather,
    "GatherElements": moved_shapes.gather_elements,
    "GatherND": moved_shapes.gather_nd,
    "Concat": moved_shapes.concat,
    "Slice": moved_shapes.slice_,
    "Split": moved_shapes.split,
    "Expand": moved_shapes.expand,
    "Tile": moved_shapes.tile,
    "Pad": moved_shapes.pad,
    "ConstantOfShape": moved_shapes.constant_of_shape,
    "Range": range_,
    "OneHot": one_hot,
}


# What NumPy and Python raise for inputs that do not fit one another. Nothing is known then.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    StopIteration,
    TypeError,
    ValueError,
)


def outlines(call: Call) -> list[Outline]:
    """The outlines of a node's outputs; of an operator that is not listed, nothing is known."""
    rule = SHAPES.get(call.op)
    unknown = [Outline(dtype=None, shape=None)] * call.output_count
    if rule is None:
        return unknown
    try:
        outputs = rule(call)
    except (NotExact, *MALFORMED):
        return unknown
    return outputs[: call.output_count] + unknown[len(outputs) :]
