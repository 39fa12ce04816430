"""Open a graph for the rules: from a file, from bytes, or from a model in memory."""

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
from evalmode.export.graph.weight import LFS_POINTER, Storage, Weight
from evalmode.export.graph.wire import Skimmed, skim

_MAX_OPSET = 2**31 - 1  # ONNX Runtime stores an opset in 32 bits
_IMPORTS_SINCE = 3  # IR version; an older model imports nothing and has opset 1


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A model, its nodes and its weights. Messages use `name`.

    `nodes` includes those of subgraphs, and those of local functions once for each call. `weights`
    has the values of all weights, and reads them only when they are used. If the graph was opened
    from a file or from bytes, its `proto` lacks the values of large weights.
    """

    proto: onnx.ModelProto
    name: str
    nodes: tuple[NodeAt, ...]
    weights: tuple[Weight, ...]


def graph_of(model: onnx.ModelProto, *, name: str = "model") -> Graph:
    """The graph of a model in memory. External files are not read.

    Raises ModelUnreadable, with the model and the node or tensor, if the model is not valid.
    """
    return _walk(model, Storage(), None, name)


def read_graph(data: bytes, *, name: str) -> Graph:
    """The graph of a serialised model. Raises ModelUnreadable, which begins with `name`, if the
    bytes are not a valid model.
    """
    return _parse(memoryview(data), Storage(data=memoryview(data)), name)


def serialise(model: onnx.ModelProto) -> bytes:
    """The model's bytes: equal models have equal bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def open_graph(path: Path) -> Graph:
    """The graph in the file `path`. Large weights, and external files, are not read yet.

    Raises ModelUnreadable, with the file and the node or tensor, for a file that holds no valid
    model. It is also raised if an external file is missing, too short or outside the model's
    folder.

    Example:
        graph = open_graph(Path("model.onnx"))
        dropouts = [node.path for node in graph.nodes if node.op == "Dropout"]
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
            raise ModelUnreadable(f"{path} cannot be read: it is not a regular file")
        if status.st_size == 0:
            raise ModelUnreadable(f"{path} is not an ONNX model: it is empty")
        with path.open("rb") as file:
            # Never closed explicitly: the frames of an exception may still refer to parts of it.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(memoryview(mapped), Storage(data=path, folder=path.parent), str(path))
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror or error}") from error


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        else:
            yield from attribute.graphs


def names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that a graph's nodes and outputs read, those in bodies included, in order."""
    for node in graph.node:
        yield from node.input
        for body in bodies_of(node):
            yield from names_read(body)
    for output in graph.output:
        yield output.name


def module_of(node_name: str) -> str:
    """The path of the torch module that a node of a converted model came from."""
    return node_name.rpartition("/")[0]


def _parse(data: memoryview, storage: Storage, name: str) -> Graph:
    if data[: len(LFS_POINTER)] == LFS_POINTER:
        raise ModelUnreadable(
            f"{name} is a Git LFS pointer and not the model: fetch it with `git lfs pull`"
        )
    try:
        skimmed = skim(data)
        model = onnx.load_model_from_string(skimmed.model)
    except (Broken, DecodeError) as error:
        raise ModelUnreadable(f"{name} is not an ONNX model: {error}") from error
    return _walk(model, storage, skimmed, name)


def _walk(model: onnx.ModelProto, storage: Storage, skimmed: Skimmed | None, name: str) -> Graph:
    if not model.HasField("graph"):
        raise ModelUnreadable(f"{name} is not an ONNX model: it has no graph")
    imports = list(model.opset_import)
    if not imports and 0 < model.ir_version < _IMPORTS_SINCE:
        imports = [onnx.OperatorSetIdProto(version=1)]
    if not imports:
        raise ModelUnreadable(f"{name} is not an ONNX model: it names no opset")

    for group in (imports, *(function.opset_import for function in model.functions)):
        for item in group:
            if not -_MAX_OPSET <= item.version <= _MAX_OPSET:
                raise ModelUnreadable(
                    f"{name} is not an ONNX model: opset {item.version} of domain {item.domain!r}"
                )
        # An opset of 0 beside another one of the domain is let through: runtimes differ on it, and
        # `opsets_of` marks it as not known.
        versions = [item.version for item in group if domain_of(item.domain) == ""]
        if versions and max(versions) <= 0:
            raise ModelUnreadable(
                f"{name} is not an ONNX model: opset {max(versions)} of domain ''"
            )

    try:
        walker = Walker(model, imports, storage, skimmed)
        walker.walk(model)
    except Broken as error:
        raise ModelUnreadable(f"{name} is not a valid ONNX model: {error}") from error
    return Graph(proto=model, name=name, nodes=tuple(walker.nodes), weights=tuple(walker.weights))
