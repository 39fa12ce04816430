"""The bounds of a module's integer inputs: where an input is an index into a table, its values must
be rows of that table.

They are read from the traced program, where it is still known which of torch's operators indexes.
`embedding` refuses a negative index and `table[ids]` counts it from the end; ONNX's Gather, which
both become, counts all of them from the end.
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
# Of the constants that are added to an index; a longer one would mean as many bounds.
_LARGEST_CONSTANT = 256
_TO_THE_END = 2**63 - 1  # how torch writes a slice without an end

# Operators that pass every value on. The axes stay, with new ones before them.
_SAME_AXES = {
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.detach.default,
    _ATEN.detach_.default,
    _ATEN.expand.default,
    _ATEN.lift_fresh_copy.default,
}
_OF_CONSTANTS = {
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
# These make other axes of them.
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

# Operators with an index into the first axis, and into one that is named: they refuse negative
# indices.
_OF_ROWS = {
    _ATEN.embedding.default,
    _ATEN.embedding_bag.default,
    _ATEN.embedding_bag.padding_idx,
    _ATEN._embedding_bag.default,
    _ATEN._embedding_bag_forward_only.default,
}
_ALONG_AN_AXIS = {
    _ATEN.gather.default,
    _ATEN.index_select.default,
    _ATEN.scatter.src,
    _ATEN.scatter.value,
    _ATEN.scatter.reduce,
    _ATEN.scatter.value_reduce,
    _ATEN.scatter_add.default,
    _ATEN.scatter_reduce.two,
}
_FROM_THE_END_TOO = {_ATEN.index.Tensor, _ATEN._unsafe_index.Tensor, _ATEN.index_put.default}
# Comparisons with a number, and how far the least and the largest value that pass are from it.
_COMPARISONS: dict[object, tuple[int | None, int | None]] = {
    _ATEN.ge.Scalar: (0, None),
    _ATEN.gt.Scalar: (1, None),
    _ATEN.le.Scalar: (None, 0),
    _ATEN.lt.Scalar: (None, -1),
}


@dataclass(frozen=True)
class _Ids:
    """Values of the input `name`, each plus `offset`.

    `axes` are the axes of the input that those of the tensor are, None for an axis of another kind;
    no tuple at all once they are not known. `part` holds what was selected of the input's axes.
    """

    name: str
    axes: tuple[int | None, ...] | None
    offset: int = 0
    part: Mapping[int, tuple[int, int | None]] = field(default_factory=dict)


_Values = dict[fx.Node, tuple[_Ids, ...]]
_Part = tuple[PartOfAxis, ...]


def index_bounds(program: torch.export.ExportedProgram) -> dict[str, tuple[Bound, ...]]:
    """The bounds of each integer input of a traced program that is an index, by the input's name.

    Only what passes values on is followed, and sums with whole numbers: an index that is computed
    otherwise gives no bound, and neither does one inside a branch or a loop.
    """
    values: _Values = {}
    bounds: dict[tuple[str, _Part], Bound] = {}

    def limit(index: object, minimum: int | None, maximum: int | None) -> None:
        for ids in values.get(index, ()) if isinstance(index, fx.Node) else ():
            part = tuple(
                PartOfAxis(axis=axis, start=start, stop=stop)
                for axis, (start, stop) in sorted(ids.part.items())
            )
            bound = bounds.get((ids.name, part), Bound(part=part))
            least = [] if minimum is None else [minimum - ids.offset]
            largest = [] if maximum is None else [maximum - ids.offset]
            least += [] if bound.minimum is None else [bound.minimum]
            largest += [] if bound.maximum is None else [bound.maximum]
            bounds[ids.name, part] = Bound(
                minimum=max(least, default=None), maximum=min(largest, default=None), part=part
            )

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
        if target in _OF_ROWS:
            limit(arguments[1], 0, _last(arguments[0], 0))
        elif target in _ALONG_AN_AXIS:
            limit(arguments[2], 0, _last(arguments[0], arguments[1]))
        elif target in _FROM_THE_END_TOO:
            for axis, index in enumerate(arguments[1]):
                if index is not None and index.meta["val"].dtype is torch.bool:
                    break  # a mask may stand for several axes
                if (last := _last(arguments[0], axis)) is not None:
                    limit(index, -last - 1, last)
        elif target is _ATEN.all.default and not node.users:
            limit(*_asserted(node))
        if passed_on := _passed_on(node, values, constants):
            values[node] = passed_on
    named: dict[str, tuple[Bound, ...]] = {}
    for (name, _), bound in bounds.items():
        named[name] = (*named.get(name, ()), bound)
    return named


def _constants(program: torch.export.ExportedProgram) -> dict[fx.Node, Tensor]:
    """The small whole numbers that the program adds to something, by the node that holds them."""
    signature = program.graph_signature
    held = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    contents = {**program.state_dict, **program.constants}
    constants: dict[fx.Node, Tensor] = {}
    for node in program.graph.nodes:
        arguments: Any = node.args
        constant = None
        if node.op == "placeholder":
            constant = contents.get(held.get(node.name, ""))
        elif node.target is _ATEN.scalar_tensor.default:
            # The number may be a size that varies.
            constant = torch.tensor(arguments[0]) if isinstance(arguments[0], int) else None
        elif node.target in _OF_CONSTANTS and arguments[0] in constants:
            constant = node.target(constants[arguments[0]], *arguments[1:])
        if (
            isinstance(constant, Tensor)
            and _is_integer(constant)
            and constant.numel() <= _LARGEST_CONSTANT
        ):
            constants[node] = constant
    return constants


def _passed_on(
    node: fx.Node, values: _Values, constants: Mapping[fx.Node, Tensor]
) -> tuple[_Ids, ...]:
    """What a node passes on of the inputs; nothing where its values are others."""
    target = node.target
    arguments: Any = node.args
    if target in _JOINS:
        joined = [ids for part in arguments[0] for ids in values.get(part, ())]
        return tuple(replace(ids, axes=None) for ids in joined)
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
    """What an operator of one tensor passes on."""
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
        # torch itself moves the axes of a tensor without values, of which each has its own size.
        numbered = torch.empty([*range(2, len(ids.axes) + 2)], device="meta")
        moved = target(numbered, *more).shape
        axes = [None if size == 1 else ids.axes[size - 2] for size in moved]
        return replace(ids, axes=tuple(axes))
    if target is _ATEN.select.int and isinstance(more[1], int):
        return _without(_chosen(ids, more[0], more[1], more[1] + 1 or None), more[0])
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
            return _chosen(ids, axis, begin, None if stop is None or stop >= last else stop)
    return None


def _piece(ids: _Ids, split: fx.Node, index: int) -> _Ids | None:
    """One of the pieces that a tensor was split into."""
    more: Any = split.args[1:]
    if split.target is _ATEN.unbind.int:
        axis = more[0] if more else 0
        return _without(_chosen(ids, axis, index, index + 1), axis)
    sizes, axis = more[0], more[1] if len(more) > 1 else 0
    if isinstance(sizes, int):
        return _chosen(ids, axis, index * sizes, (index + 1) * sizes)
    if isinstance(sizes, fx.Node) or not all(isinstance(size, int) for size in sizes[: index + 1]):
        return None  # sizes that vary
    return _chosen(ids, axis, sum(sizes[:index]), sum(sizes[: index + 1]))


def _chosen(ids: _Ids, place: int, start: int, stop: int | None) -> _Ids | None:
    """The part [start, stop) of an axis; None for a part of a part, which is not followed."""
    if (start, stop) == (0, None):
        return ids
    axis = None if ids.axes is None else ids.axes[place]
    if axis is None or axis in ids.part:
        return None
    return replace(ids, part={**ids.part, axis: (start, stop)})


def _without(ids: _Ids | None, place: int) -> _Ids | None:
    """The same without one axis of the tensor."""
    if ids is None or ids.axes is None:
        return None
    axes = list(ids.axes)
    del axes[place]
    return replace(ids, axes=tuple(axes))


def _sum(node: fx.Node, values: _Values, constants: Mapping[fx.Node, Tensor]) -> tuple[_Ids, ...]:
    """The sum or difference of an input and whole numbers: one number, or one for each place of the
    last axis (columns that share a table, each with its own rows).
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
        for place, offset in enumerate(offsets):
            if (column := _chosen(ids, -1, place, place + 1)) is not None:
                columns.append(replace(column, offset=ids.offset + offset))
    return tuple(columns)


def _asserted(node: fx.Node) -> tuple[object, int | None, int | None]:
    """What an assertion demands of all values: the node they are of, the least and the largest.

    The exporter takes assertions out and leaves what they ask behind, which nothing reads then:
    `one_hot` asserts that its classes exist.
    """
    comparison: Any = node.args[0]
    if comparison.target in _COMPARISONS:
        index, number = comparison.args
        if isinstance(number, int):
            above, below = _COMPARISONS[comparison.target]
            minimum = None if above is None else number + above
            return index, minimum, None if below is None else number + below
    return None, None, None


def _last(source: Any, axis: Any) -> int | None:
    """The last index of an axis; None where its size varies."""
    size = source.meta["val"].shape[axis]
    return size - 1 if isinstance(size, int) else None


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
