"""A weight: its name, type and shape at once, its values only when someone asks for them. Knows no
rule.

The values lie in the message itself, in the serialised model (what `wire` left out), or in a file
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.wire import Span

Array = npt.NDArray[np.generic]

# Of what is packed tighter than a byte each; a name that this version of onnx lacks is in no model
# that it reads.
_PACKED = {
    2: ("UINT2", "INT2"),
    4: ("UINT4", "INT4", "FLOAT4E2M1"),
    6: ("FLOAT6E2M3", "FLOAT6E3M2"),
}
_BITS = {
    TensorProto.DataType.Value(name): bits
    for bits, names in _PACKED.items()
    for name in names
    if name in TensorProto.DataType.keys()  # noqa: SIM118 - protobuf's enum is no dictionary
}
# Little-endian as they are written; the other typed fields hold varints, which protobuf has to
# read.
_PLAIN = {"float_data": np.dtype("<f4"), "double_data": np.dtype("<f8")}
_CHUNK = 1 << 22  # elements

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git LFS leaves where it has not fetched the real one."""


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + length) of a file, or of a model in memory."""

    source: Path | memoryview
    offset: int
    length: int

    def view(self) -> npt.NDArray[np.uint8]:
        """The bytes, mapped from the file and not yet read. Raises OSError where the file is no
        longer there.
        """
        if self.length == 0:
            return np.empty(0, np.uint8)
        if isinstance(self.source, Path):
            return np.memmap(self.source, np.uint8, "r", self.offset, (self.length,))
        return np.frombuffer(self.source, np.uint8, self.length, self.offset)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        """A copy of part of the bytes, which leaves nothing mapped: what is read in pieces needs no
        more than one.
        """
        if isinstance(self.source, Path):
            return np.fromfile(self.source, np.uint8, length, offset=self.offset + start)
        return np.frombuffer(self.source, np.uint8, length, self.offset + start)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the model: an initializer of any graph, or the value of a Constant node.

    `path` says where it stands, as a node's does; `dtype` is NumPy's (ml_dtypes' for what NumPy
    lacks).
    """

    name: str
    path: str
    tensor: onnx.TensorProto
    region: Region | None = None
    field: str = "raw_data"

    @property
    def dims(self) -> tuple[int, ...]:
        """The declared shape; () for a scalar."""
        return tuple(self.tensor.dims)

    @cached_property
    def size(self) -> int:
        """How many elements the declared shape has."""
        total = 1
        for dim in self.tensor.dims:
            total *= dim
        return total

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The element type. Raises Broken for a number that no type has."""
        try:
            return helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        except KeyError:
            number = self.tensor.data_type
            raise Broken(
                f"the tensor {self.path!r} has element type {number}, which is none"
            ) from None

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take up when they are written out."""
        return (self.size * _BITS.get(self.tensor.data_type, self.dtype.itemsize * 8) + 7) // 8

    def check(self) -> None:
        """Raise Broken, naming the tensor, where its values cannot be those of its type and
        shape.
        """
        if any(dim < 0 for dim in self.tensor.dims):
            raise Broken(f"the tensor {self.path!r} has shape {list(self.dims)}")
        if self.dtype == object or self._is_external:
            return
        found, wanted = self._stored()
        if found != wanted:
            raise Broken(
                f"the tensor {self.path!r} has {found} bytes, its shape {list(self.dims)} wants"
                f" {wanted}"
            )

    @property
    def _is_external(self) -> bool:
        return self.region is None and self.tensor.data_location == TensorProto.EXTERNAL

    def _stored(self) -> tuple[int, int]:
        """How many bytes there are, and how many there should be."""
        if self.region is not None and self.field in ("raw_data", *_PLAIN):
            return self.region.length, self.nbytes
        if self.region is not None:  # varints: their number is not seen from their length
            return self.nbytes, self.nbytes
        if self.tensor.HasField("raw_data"):
            return len(self.tensor.raw_data), self.nbytes
        typed = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        return (
            0
            if self.size and not any(len(getattr(self.tensor, name)) for name in typed)
            else self.nbytes
        ), (self.nbytes)

    def array(self) -> Array:
        """The values, mapped from the file where they lie in one as they are. Raises Broken where
        that fails.
        """
        try:
            if self._is_external:
                raise Broken(f"the values of {self.path!r} are in a file that is not at hand")
            if self.region is None:
                return numpy_helper.to_array(self.tensor)
            if self._is_mapped:
                return self.region.view().view(self._written).reshape(self.dims)
            return numpy_helper.to_array(self._whole(self.region))
        except (ValueError, TypeError, KeyError, OSError, EOFError) as error:
            raise Broken(f"the tensor {self.path!r} cannot be read: {error}") from error

    @property
    def _is_mapped(self) -> bool:
        """Whether the bytes in the region are the elements, one after another."""
        if self.field in _PLAIN:
            return self.dtype == _PLAIN[self.field]
        return (
            self.field == "raw_data" and self.tensor.data_type not in _BITS and self.dtype != object
        )

    @property
    def _written(self) -> np.dtype[np.generic]:
        return self.dtype.newbyteorder("<") if self.dtype.isbuiltin == 1 else self.dtype

    def _whole(self, region: Region) -> onnx.TensorProto:
        """The message with its payload back in it."""
        whole = TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
        payload = region.view().tobytes()
        if self.field == "raw_data":
            whole.raw_data = payload
            return whole
        carrier = TensorProto.DESCRIPTOR.fields_by_name[self.field].number << 3 | 2
        head, length = bytearray([carrier]), len(payload)
        while length > 127:
            head.append(length & 127 | 128)
            length >>= 7
        whole.MergeFromString(bytes([*head, length]) + payload)
        return whole

    def sample(self, count: int) -> Array:
        """The first `count` elements and `count` more from evenly over the rest, flat; all of a
        small tensor.
        """
        if self.size <= 2 * count or self.region is None or not self._is_mapped:
            flat = self.array().reshape(-1)
            return (
                flat
                if flat.size <= 2 * count
                else np.concatenate([flat[:count], flat[count :: flat.size // count]])
            )
        values = self.region.view().view(self._written)
        return np.concatenate([values[:count], values[count :: self.size // count]])

    def chunks(self, elements: int = _CHUNK) -> Iterator[Array]:
        """The values in order, flat, a piece at a time: of a weight in a file no more than one
        piece is in memory.
        """
        if self.region is None or not self._is_mapped:
            flat = self.array().reshape(-1)
            yield from (flat[start : start + elements] for start in range(0, flat.size, elements))
            return
        step = elements * self.dtype.itemsize
        for start in range(0, self.region.length, step):
            try:
                piece = self.region.read(start, min(step, self.region.length - start)).view(
                    self._written
                )
            except (ValueError, OSError) as error:
                raise Broken(f"the tensor {self.path!r} cannot be read: {error}") from error
            yield piece


@dataclass(frozen=True)
class Source:
    """Where the values of a model's tensors lie: its serialised form, and the folder of its
    external files.

    `folder` is None for a model that came from no file; its external values are not at hand, and
    are not looked for.
    """

    data: Path | memoryview | None = None
    folder: Path | None = None

    def weight(
        self, tensor: onnx.TensorProto, span: Span | None, *, name: str, path: str
    ) -> Weight:
        """The weight that `tensor` is. Raises Broken, naming the tensor, where its values are not
        there.
        """
        if span is not None:
            assert self.data is not None, "only a serialised model has spans"
            region = Region(self.data, span.offset, span.length)
            weight = Weight(name=name, path=path, tensor=tensor, region=region, field=span.field)
        else:
            weight = Weight(
                name=name, path=path, tensor=tensor, region=self._external(tensor, path)
            )
        weight.check()
        return weight

    def _external(self, tensor: onnx.TensorProto, path: str) -> Region | None:
        if tensor.data_location != TensorProto.EXTERNAL or self.folder is None:
            return None
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file, size = _file(self.folder, entries.get("location", ""), path)
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or -1)
        except ValueError:
            raise Broken(
                f"the tensor {path!r} has an offset or a length that is no number"
            ) from None
        wanted = (
            Weight(name="", path=path, tensor=tensor).nbytes
            if min(tensor.dims, default=0) >= 0
            else 0
        )
        length = wanted if length == -1 else length
        if offset < 0 or length < 0 or offset + length > size:
            if _is_pointer(file):
                said = (
                    f"the tensor {path!r} is in {file}, which is a Git LFS pointer and not the"
                    " weights"
                )
                raise Broken(f"{said}: fetch it with `git lfs pull`")
            raise Broken(
                f"the tensor {path!r} wants bytes {offset} to {offset + length} of {file}, which"
                f" has {size}"
            )
        return Region(file, offset, length)


def _file(folder: Path, location: str, path: str) -> tuple[Path, int]:
    """The external file and its size; only a regular file in or below the model's own folder."""
    said = f"the tensor {path!r} is in the file {location!r}"
    if (
        not location
        or "\0" in location
        or Path(location).is_absolute()
        or ".." in Path(location).parts
    ):
        raise Broken(f"{said}, which is not a path below the model's folder")
    file = folder / location
    try:
        found = file.resolve()
        if not found.is_relative_to(folder.resolve()):
            raise Broken(f"{said}, which leads out of the model's folder")
        if not found.is_file():
            raise Broken(
                f"{said}, which is not there" if not found.exists() else f"{said}, which is no file"
            )
        return file, found.stat().st_size
    except (OSError, RuntimeError) as error:
        raise Broken(f"{said}, which cannot be read: {error}") from error


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False
