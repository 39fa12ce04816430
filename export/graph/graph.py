"""The graph that a rule is given, and how it is opened: a file, bytes or a model in memory. Knows
no rule.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from evalmode.export.graph.errors import Broken, ModelUnreadable
from evalmode.export.graph.scope import domain_of
from evalmode.export.graph.walk import NodeAt, Walker
from evalmode.export.graph.weight import LFS_POINTER, Source, Weight
from evalmode.export.graph.wire import Skimmed, skim

_LAST_OPSET = 2**31 - 1  # a runtime holds no larger number
_IMPORTS_SINCE = 3  # IR version; a model of before has opset 1


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A model, every node of it, and its weights; `name` is what a message calls it.

    `nodes` holds those of subgraphs, and those of local functions once for each call. The `proto`
    of a graph that was opened from a file or from bytes lacks the values of large weights;
    `weights` has them all, and reads none before it is asked to.
    """

    proto: onnx.ModelProto
    name: str
    nodes: tuple[NodeAt, ...]
    weights: tuple[Weight, ...]


def graph_of(model: onnx.ModelProto, *, name: str = "model") -> Graph:
    """The graph of a model in memory; the files beside it, if it has any, are not looked for.

    Raises ModelUnreadable, naming the model and the node or tensor, where the model is broken.
    """
    return _graph(model, Source(), None, name)


def read_graph(data: bytes, *, name: str) -> Graph:
    """The graph of a serialised model. Raises ModelUnreadable, naming the file, for bytes that hold
    none.
    """
    return _read(memoryview(data), memoryview(data), None, name)


def serialise(model: onnx.ModelProto) -> bytes:
    """The model's bytes: the same for the same model."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def open_graph(path: Path) -> Graph:
    """The graph in the file `path`, whose large weights, and the files beside it, are not read.

    Raises ModelUnreadable, naming the file and the node or tensor, for a file that holds no model
    or a broken one, and where a file that it names is missing, too short, or out of its own folder.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise ModelUnreadable(f"{path} cannot be read: it is no regular file")
        if found.st_size == 0:
            raise ModelUnreadable(f"{path} is not an ONNX model: it is empty")
        with path.open("rb") as file:
            # Closed when nothing refers to it: an exception's frames may hold parts of it.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read(memoryview(mapped), path, path.parent, str(path))
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror or error}") from error


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds as attributes: branches, and what a loop repeats."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that a graph's nodes and outputs read, those of bodies included, in order."""
    for node in graph.node:
        yield from node.input
        for body in bodies_of(node):
            yield from names_read(body)
    yield from (item.name for item in graph.output)


def module_of(node_name: str) -> str:
    """The path of the module that a converted model's node came from."""
    return node_name.rpartition("/")[0]


def _read(data: memoryview, where: Path | memoryview, folder: Path | None, name: str) -> Graph:
    if data[: len(LFS_POINTER)] == LFS_POINTER:
        raise ModelUnreadable(
            f"{name} is a Git LFS pointer and not the model: fetch it with `git lfs pull`"
        )
    try:
        skimmed = skim(data)
        model = onnx.load_model_from_string(skimmed.model)
    except (Broken, DecodeError) as error:
        raise ModelUnreadable(f"{name} is not an ONNX model: {error}") from error
    return _graph(model, Source(data=where, folder=folder), skimmed, name)


def _graph(model: onnx.ModelProto, source: Source, skimmed: Skimmed | None, name: str) -> Graph:
    if not model.HasField("graph"):
        raise ModelUnreadable(f"{name} is not an ONNX model: it has no graph")
    imports = list(model.opset_import)
    if not imports and 0 < model.ir_version < _IMPORTS_SINCE:
        imports = [onnx.OperatorSetIdProto(version=1)]
    if not imports:
        raise ModelUnreadable(f"{name} is not an ONNX model: it names no opset")
    for group in (imports, *(function.opset_import for function in model.functions)):
        for item in group:
            if not -_LAST_OPSET <= item.version <= _LAST_OPSET:
                raise ModelUnreadable(
                    f"{name} is not an ONNX model: opset {item.version} of domain {item.domain!r}"
                )
        # Beside another opset of the domain, 0 is one on which readers differ; see `opsets_of`.
        own = [item.version for item in group if domain_of(item.domain) == ""]
        if own and max(own) <= 0:
            raise ModelUnreadable(f"{name} is not an ONNX model: opset {max(own)} of domain ''")
    try:
        walker = Walker(model, imports, source, skimmed)
        walker.walk(model)
    except Broken as error:
        raise ModelUnreadable(f"{name} is not a valid ONNX model: {error}") from error
    return Graph(proto=model, name=name, nodes=tuple(walker.nodes), weights=tuple(walker.weights))
