"""The bounds of a module's integer inputs: an input that indexes a table must hold valid indices.

The bounds are read from the traced program, which still has torch's own operators. The graph does
not show them: `embedding` refuses a negative index, `table[ids]` counts it from the end, and both
become ONNX's Gather, which counts from the end.

How the bounds of the program are found, node by node:

1. An integer input is an index of its own values (`_Ids`).
2. Operators that only move values, or add whole numbers to them, pass the index on.
3. An operator that indexes, or an assertion, bounds the index that it reads.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from evalmode.bundle.manifest import Bound, PartOfAxis

_ATEN = torch.ops.aten
# Elements of a constant that is added to an index. Each element means a bound.
_MAX_CONSTANT = 256
_TO_THE_END = 2**63 - 1  # how torch writes a slice without an end

# Operators that pass all values on and keep the axes; `expand` may add axes in front.
_SAME_AXES = {
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.detach.default,
    _ATEN.detach_.default,
    _ATEN.expand.default,
    _ATEN.lift_fresh_copy.default,
}
_CONSTANT_OPERATORS = {
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.detach_.default,
    _ATEN.lift_fresh_copy.default,
    _ATEN.unsqueeze.default,
}
_MOVED_AXES = {
    _ATEN.permute.default,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.unsqueeze.default,
}
# These pass all values on, but an axis of the output is no single axis of the input.
_OTHER_AXES = {
    _ATEN._unsafe_view.default,
    _ATEN.flatten.using_ints,
    _ATEN.repeat.default,
    _ATEN.reshape.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.tile.default,
    _ATEN.view.default,
}
_JOINS = {_ATEN.cat.default, _ATEN.stack.default}
_SPLITS = {_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int}
_SUMS = {_ATEN.add.Tensor, _ATEN.add.Scalar, _ATEN.sub.Tensor, _ATEN.sub.Scalar}
_CASTS = {_ATEN._to_copy.default, _ATEN.to.dtype}
_WIDE = {torch.int32, torch.int64}

# Operators that index the first axis, and a named axis. They refuse negative indices.
_ROW_LOOKUPS = {
    _ATEN.embedding.default,
    _ATEN.embedding_bag.default,
    _ATEN.embedding_bag.padding_idx,
    _ATEN._embedding_bag.default,
    _ATEN._embedding_bag_forward_only.default,
}
_AXIS_LOOKUPS = {
    _ATEN.gather.default,
    _ATEN.index_select.default,
    _ATEN.scatter.src,
    _ATEN.scatter.value,
    _ATEN.scatter.reduce,
    _ATEN.scatter.value_reduce,
    _ATEN.scatter_add.default,
    _ATEN.scatter_reduce.two,
}
# These count negative indices from the end.
_SIGNED_LOOKUPS = {_ATEN.index.Tensor, _ATEN._unsafe_index.Tensor, _ATEN.index_put.default}
# Comparisons with a number. The pair is what to add to the number for the smallest and for the
# largest value that passes; None where there is no such bound.
_COMPARISONS: dict[object, tuple[int | None, int | None]] = {
    _ATEN.ge.Scalar: (0, None),
    _ATEN.gt.Scalar: (1, None),
    _ATEN.le.Scalar: (None, 0),
    _ATEN.lt.Scalar: (None, -1),
}


@dataclass(frozen=True)
class _Ids:
    """Values of the input `name`, each plus `offset`.

    `axes` has the input's axis for each axis of the tensor, or None for a new axis. If the axes are
    not known, `axes` itself is None. `part` maps an axis of the input to the range [start, stop)
    that was selected from it.
    """

    name: str
    axes: tuple[int | None, ...] | None
    offset: int = 0
    part: Mapping[int, tuple[int, int | None]] = field(default_factory=dict)


_Values = dict[fx.Node, tuple[_Ids, ...]]
_Part = tuple[PartOfAxis, ...]


def index_bounds(program: torch.export.ExportedProgram) -> dict[str, tuple[Bound, ...]]:
    """The bounds of each integer input of a traced program that is an index, by the input's name.

    Only operators that pass values on, and sums with whole numbers, are followed. An index that is
    computed in another way gives no bound, and neither does one inside of a branch or a loop.
    """
    values: _Values = {}
    bounds: dict[tuple[str, _Part], Bound] = {}

    def limit(index: object, minimum: int | None, maximum: int | None) -> None:
        """Bound an index that a node reads, by the stricter of the earlier bounds and these."""
        if not isinstance(index, fx.Node):
            return
        for ids in values.get(index, ()):
            part = tuple(
                PartOfAxis(axis=axis, start=start, stop=stop)
                for axis, (start, stop) in sorted(ids.part.items())
            )
            earlier = bounds.get((ids.name, part), Bound(part=part))
            lowest, highest = earlier.minimum, earlier.maximum
            # In values of the input itself, to which the module adds the offset.
            if minimum is not None and (lowest is None or minimum - ids.offset > lowest):
                lowest = minimum - ids.offset
            if maximum is not None and (highest is None or maximum - ids.offset < highest):
                highest = maximum - ids.offset
            bounds[ids.name, part] = Bound(minimum=lowest, maximum=highest, part=part)

    constants = _constants(program)
    user_inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in user_inputs:
            tensor = node.meta.get("val")
            if isinstance(tensor, Tensor) and _is_integer(tensor):
                values[node] = (_Ids(node.name, tuple(range(tensor.ndim))),)
        if node.op != "call_function":
            continue
        target = node.target
        arguments: Any = node.args
        if target in _ROW_LOOKUPS:
            limit(arguments[1], 0, _last_index(arguments[0], 0))
        elif target in _AXIS_LOOKUPS:
            limit(arguments[2], 0, _last_index(arguments[0], arguments[1]))
        elif target in _SIGNED_LOOKUPS:
            for axis, index in enumerate(arguments[1]):
                if index is not None and index.meta["val"].dtype is torch.bool:
                    break  # a mask may stand for several axes
                if (last := _last_index(arguments[0], axis)) is not None:
                    limit(index, -last - 1, last)
        elif target is _ATEN.all.default and not node.users:
            # The condition of an assertion, such as that of `one_hot` that its classes exist. The
            # exporter removes the assertion, and then no node reads its condition.
            comparison: Any = node.args[0]
            if comparison.target in _COMPARISONS:
                index, number = comparison.args
                if isinstance(number, int):
                    above, below = _COMPARISONS[comparison.target]
                    minimum = None if above is None else number + above
                    maximum = None if below is None else number + below
                    limit(index, minimum, maximum)
        passed_on = _passed_on(node, values, constants)
        if passed_on:
            values[node] = passed_on

    bounds_by_input: dict[str, tuple[Bound, ...]] = {}
    for (name, _), bound in bounds.items():
        bounds_by_input[name] = (*bounds_by_input.get(name, ()), bound)
    return bounds_by_input


def _constants(program: torch.export.ExportedProgram) -> dict[fx.Node, Tensor]:
    """The constants of whole numbers that a sum may add to an index, by the node that holds them.

    Constants of many elements are left out.
    """
    signature = program.graph_signature
    sources = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    contents = {**program.state_dict, **program.constants}
    constants: dict[fx.Node, Tensor] = {}
    for node in program.graph.nodes:
        arguments: Any = node.args
        constant = None
        if node.op == "placeholder":
            constant = contents.get(sources.get(node.name, ""))
        elif node.target is _ATEN.scalar_tensor.default:
            # The number may also be a size that varies.
            if isinstance(arguments[0], int):
                constant = torch.tensor(arguments[0])
        elif node.target in _CONSTANT_OPERATORS and arguments[0] in constants:
            constant = node.target(constants[arguments[0]], *arguments[1:])
        if (
            isinstance(constant, Tensor)
            and _is_integer(constant)
            and constant.numel() <= _MAX_CONSTANT
        ):
            constants[node] = constant
    return constants


def _passed_on(
    node: fx.Node, values: _Values, constants: Mapping[fx.Node, Tensor]
) -> tuple[_Ids, ...]:
    """The values of inputs that a node passes on; empty if its output has other values."""
    target = node.target
    arguments: Any = node.args
    if target in _JOINS:
        joined: list[_Ids] = []
        for part in arguments[0]:
            joined += [replace(ids, axes=None) for ids in values.get(part, ())]
        return tuple(joined)
    if target in _SUMS:
        return _sum(node, values, constants)
    first = arguments[0] if arguments else None
    if not isinstance(first, fx.Node):
        return ()
    passed_on: list[_Ids | None]
    if target is operator.getitem and first.target in _SPLITS:
        whole: Any = first.args[0]
        passed_on = [_piece(ids, first, arguments[1]) for ids in values.get(whole, ())]
    else:
        passed_on = [_moved(ids, node) for ids in values.get(first, ())]
    return tuple(ids for ids in passed_on if ids is not None)


def _moved(ids: _Ids, node: fx.Node) -> _Ids | None:
    """The values that an operator of one tensor passes on."""
    target: Any = node.target
    more: tuple[Any, ...] = node.args[1:]
    if target in _CASTS:
        return ids if node.meta["val"].dtype in _WIDE else None
    if target in _OTHER_AXES:
        return replace(ids, axes=None)
    if ids.axes is None:
        return ids if target in _SAME_AXES | _MOVED_AXES else None
    if target in _SAME_AXES:
        added = node.meta["val"].ndim - len(ids.axes)
        return replace(ids, axes=(None,) * added + ids.axes)
    if target in _MOVED_AXES:
        # torch itself moves the axes, of a tensor without values whose sizes are all different:
        # axis 0 has size 2, axis 1 size 3, and so on. A new axis has size 1.
        marked = torch.empty([*range(2, len(ids.axes) + 2)], device="meta")
        sizes = target(marked, *more).shape
        axes = [None if size == 1 else ids.axes[size - 2] for size in sizes]
        return replace(ids, axes=tuple(axes))
    if target is _ATEN.select.int and isinstance(more[1], int):
        return _drop_axis(_select(ids, more[0], more[1], more[1] + 1 or None), more[0])
    if target is _ATEN.slice.Tensor:
        defaults: tuple[Any, ...] = (0, None, None, 1)
        axis, start, stop, step = more + defaults[len(more) :]
        if step == 1 and isinstance(start, int | None) and isinstance(stop, int | None):
            whole: Any = node.args[0]
            size = whole.meta["val"].shape[axis]
            begin = start or 0
            if isinstance(size, int) and begin < 0:
                begin = max(begin + size, 0)
            last = size if isinstance(size, int) else _TO_THE_END
            return _select(ids, axis, begin, None if stop is None or stop >= last else stop)
    return None


def _piece(ids: _Ids, split: fx.Node, index: int) -> _Ids | None:
    """One of the pieces that a tensor was split into."""
    more: Any = split.args[1:]
    if split.target is _ATEN.unbind.int:
        axis = more[0] if more else 0
        return _drop_axis(_select(ids, axis, index, index + 1), axis)
    sizes, axis = more[0], more[1] if len(more) > 1 else 0
    if isinstance(sizes, int):
        return _select(ids, axis, index * sizes, (index + 1) * sizes)
    # The sizes of the pieces may vary.
    if isinstance(sizes, fx.Node) or not all(isinstance(size, int) for size in sizes[: index + 1]):
        return None
    return _select(ids, axis, sum(sizes[:index]), sum(sizes[: index + 1]))


def _select(ids: _Ids, dim: int, start: int, stop: int | None) -> _Ids | None:
    """The part [start, stop) of axis `dim`; None for a part of a part, which is not followed."""
    if (start, stop) == (0, None):
        return ids
    axis = None if ids.axes is None else ids.axes[dim]
    if axis is None or axis in ids.part:
        return None
    return replace(ids, part={**ids.part, axis: (start, stop)})


def _drop_axis(ids: _Ids | None, dim: int) -> _Ids | None:
    """The same values in a tensor without axis `dim`."""
    if ids is None or ids.axes is None:
        return None
    axes = list(ids.axes)
    del axes[dim]
    return replace(ids, axes=tuple(axes))


def _sum(node: fx.Node, values: _Values, constants: Mapping[fx.Node, Tensor]) -> tuple[_Ids, ...]:
    """The values of a sum or a difference of an input and constant whole numbers.

    The constant is one number, or one for each position of the last axis. The latter is used where
    columns share a table, and the rows of each column begin at its own offset.
    """
    arguments: Any = node.args
    first, second = arguments[:2]
    is_sum = node.target in (_ATEN.add.Tensor, _ATEN.add.Scalar)
    if is_sum and second in values:
        first, second = second, first
    if first not in values or len(arguments) > 2 or node.kwargs.get("alpha", 1) != 1:
        return ()
    if isinstance(second, int):
        constant = torch.tensor(second)
    elif second in constants:
        constant = constants[second]
    else:
        return ()
    offsets = (constant if is_sum else -constant).flatten().tolist()
    shape = first.meta["val"].shape
    if node.meta["val"].ndim != len(shape):
        return ()
    if len(offsets) == 1:
        return tuple(replace(ids, offset=ids.offset + offsets[0]) for ids in values[first])
    if constant.shape[-1:] != (len(offsets),) or shape[-1] != len(offsets):
        return ()
    columns = []
    for ids in values[first]:
        for position, offset in enumerate(offsets):
            column = _select(ids, -1, position, position + 1)
            if column is not None:
                columns.append(replace(column, offset=ids.offset + offset))
    return tuple(columns)


def _last_index(source: Any, axis: Any) -> int | None:
    """The last index of an axis; None where its size varies."""
    size = source.meta["val"].shape[axis]
    return size - 1 if isinstance(size, int) else None


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
