"""A weight: its name, its type, its shape, and its values, which are read only when they are used.

The values are in one of three places: in the message itself, in the part of the serialised model
that `wire` left out of the message, or in an external file.
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
from evalmode.export.graph.wire import Span, field_head

Array = npt.NDArray[np.generic]

# The types whose elements are smaller than a byte, by their bits. Older versions of onnx lack some
# of these names, and refuse models with such types.
_PACKED_TYPES = {
    2: ("UINT2", "INT2"),
    4: ("UINT4", "INT4", "FLOAT4E2M1"),
    6: ("FLOAT6E2M3", "FLOAT6E3M2"),
}
_PACKED_BITS = {
    TensorProto.DataType.Value(name): bits
    for bits, names in _PACKED_TYPES.items()
    for name in names
    if name in TensorProto.DataType.keys()  # noqa: SIM118 - protobuf's enum is no dictionary
}
# The typed fields that are stored as little-endian arrays. The other typed fields hold varints,
# which protobuf has to read.
_ARRAY_FIELDS = {"float_data": np.dtype("<f4"), "double_data": np.dtype("<f8")}
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# Elements that are read at once: 16 MiB of float32.
_CHUNK = 1 << 22

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of the small file that Git LFS leaves in place of a file it has not fetched."""


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + length) of a file, or of a model in memory."""

    source: Path | memoryview
    offset: int
    length: int

    def view(self) -> npt.NDArray[np.uint8]:
        """The bytes, mapped from the file and not yet read. Raises OSError if the file is gone."""
        if self.length == 0:
            return np.empty(0, np.uint8)
        if isinstance(self.source, Path):
            return np.memmap(self.source, np.uint8, "r", self.offset, (self.length,))
        return np.frombuffer(self.source, np.uint8, self.length, self.offset)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        """A part of the bytes. Of a file it is a copy, so that nothing stays mapped."""
        if isinstance(self.source, Path):
            return np.fromfile(self.source, np.uint8, length, offset=self.offset + start)
        return np.frombuffer(self.source, np.uint8, length, self.offset + start)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the model: an initializer of any graph, or the value of a Constant node.

    `path` is its path, in the form of a node's path. `region` holds its values if they are not in
    `tensor`, and `field` is the field of TensorProto that the region holds.
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
        """The element type: NumPy's, or ml_dtypes' where NumPy has none. Raises Broken for a number
        that is no type.
        """
        try:
            return helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        except KeyError:
            number = self.tensor.data_type
            raise Broken(
                f"the tensor {self.path!r} has element type {number}, which does not exist"
            ) from None

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take in a file, packed types included."""
        bits = _PACKED_BITS.get(self.tensor.data_type, self.dtype.itemsize * 8)
        return (self.size * bits + 7) // 8

    def require_whole(self) -> None:
        """Raise Broken, with the tensor's path, if the number of bytes does not fit its type and
        shape.
        """
        if any(dim < 0 for dim in self.tensor.dims):
            raise Broken(f"the tensor {self.path!r} has shape {list(self.dims)}")
        if self.dtype == object or self._is_external:
            return
        needed = self.nbytes
        stored = needed
        if self.region is not None:
            # The length in bytes does not give the number of varints, so these are not compared.
            if self.field in ("raw_data", *_ARRAY_FIELDS):
                stored = self.region.length
        elif self.tensor.HasField("raw_data"):
            stored = len(self.tensor.raw_data)
        elif self.size and not any(len(getattr(self.tensor, name)) for name in _TYPED_FIELDS):
            stored = 0
        if stored != needed:
            raise Broken(
                f"the tensor {self.path!r} has {stored} bytes, its shape {list(self.dims)} needs"
                f" {needed}"
            )

    def array(self) -> Array:
        """The values in the declared shape, mapped from a file if they are stored as an array.

        Raises Broken if they cannot be read.
        """
        try:
            if self._is_external:
                raise Broken(
                    f"the values of {self.path!r} are in an external file, and the model was not"
                    " opened from a folder"
                )
            if self.region is None:
                return numpy_helper.to_array(self.tensor)
            if self._is_mapped:
                return self.region.view().view(self._stored_dtype).reshape(self.dims)

            # Put the payload back into a message, and let onnx read that.
            payload = self.region.view().tobytes()
            whole = TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
            if self.field == "raw_data":
                whole.raw_data = payload
            else:
                number = TensorProto.DESCRIPTOR.fields_by_name[self.field].number
                whole.MergeFromString(field_head(number, len(payload)) + payload)
            return numpy_helper.to_array(whole)
        except (ValueError, TypeError, KeyError, OSError, EOFError) as error:
            raise Broken(f"the tensor {self.path!r} cannot be read: {error}") from error

    def sample(self, count: int) -> Array:
        """The first `count` elements, and about as many spread evenly over the rest, flat.

        All elements of a tensor that is not larger than that.
        """
        if self.size > 2 * count and self.region is not None and self._is_mapped:
            flat = self.region.view().view(self._stored_dtype)
            return np.concatenate([flat[:count], flat[count :: self.size // count]])
        flat = self.array().reshape(-1)
        if flat.size <= 2 * count:
            return flat
        return np.concatenate([flat[:count], flat[count :: flat.size // count]])

    def chunks(self, elements: int = _CHUNK) -> Iterator[Array]:
        """The values in order, flat, at most `elements` at a time.

        Only one chunk of a weight in a file is in memory. Raises Broken if one cannot be read.
        """
        if self.region is None or not self._is_mapped:
            flat = self.array().reshape(-1)
            for start in range(0, flat.size, elements):
                yield flat[start : start + elements]
            return
        step = elements * self.dtype.itemsize
        for start in range(0, self.region.length, step):
            length = min(step, self.region.length - start)
            try:
                chunk = self.region.read(start, length).view(self._stored_dtype)
            except (ValueError, OSError) as error:
                raise Broken(f"the tensor {self.path!r} cannot be read: {error}") from error
            yield chunk

    @property
    def _is_external(self) -> bool:
        """Whether the values are in a file of unknown folder, because the model is from memory."""
        return self.region is None and self.tensor.data_location == TensorProto.EXTERNAL

    @property
    def _is_mapped(self) -> bool:
        """Whether the bytes in the region are an array of the elements."""
        if self.field in _ARRAY_FIELDS:
            return self.dtype == _ARRAY_FIELDS[self.field]
        is_packed = self.tensor.data_type in _PACKED_BITS
        return self.field == "raw_data" and not is_packed and self.dtype != object

    @property
    def _stored_dtype(self) -> np.dtype[np.generic]:
        """The element type as ONNX stores it: little-endian."""
        # Types of ml_dtypes have no byte order to set.
        return self.dtype.newbyteorder("<") if self.dtype.isbuiltin == 1 else self.dtype


@dataclass(frozen=True)
class Storage:
    """Where the values of a model's tensors are: `data`, its serialised form, and the folder of its
    external files.

    Both are None for a model in memory, whose external files are not read.
    """

    data: Path | memoryview | None = None
    folder: Path | None = None

    def weight(
        self, tensor: onnx.TensorProto, span: Span | None, *, name: str, path: str
    ) -> Weight:
        """The weight of `tensor`; `span` is where its payload is if `wire` left it out.

        Raises Broken, with the tensor's path, if its values are missing or do not fit its shape.
        """
        region: Region | None = None
        field = "raw_data"
        if span is not None:
            assert self.data is not None, "only a serialised model has spans"
            region = Region(self.data, span.offset, span.length)
            field = span.field
        elif tensor.data_location == TensorProto.EXTERNAL and self.folder is not None:
            region = _external_region(self.folder, tensor, path)
        weight = Weight(name=name, path=path, tensor=tensor, region=region, field=field)
        weight.require_whole()
        return weight


def _external_region(folder: Path, tensor: onnx.TensorProto, path: str) -> Region:
    """The bytes of an external file that hold the tensor's values; `path` is the tensor's.

    Only a regular file in or below the model's folder is read.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    subject = f"the tensor {path!r} is in the file {location!r}"
    is_path_below = location and "\0" not in location and not Path(location).is_absolute()
    if not is_path_below or ".." in Path(location).parts:
        raise Broken(f"{subject}, which is not a path below the model's folder")
    file = folder / location
    try:
        resolved = file.resolve()  # a symbolic link may lead anywhere
        if not resolved.is_relative_to(folder.resolve()):
            raise Broken(f"{subject}, which leads out of the model's folder")
        if not resolved.exists():
            raise Broken(f"{subject}, which does not exist")
        if not resolved.is_file():
            raise Broken(f"{subject}, which is not a regular file")
        file_size = resolved.stat().st_size
    except (OSError, RuntimeError) as error:
        raise Broken(f"{subject}, which cannot be read: {error}") from error

    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or -1)
    except ValueError:
        raise Broken(f"the tensor {path!r} has an offset or a length that is no number") from None
    needed = 0
    if min(tensor.dims, default=0) >= 0:
        needed = Weight(name="", path=path, tensor=tensor).nbytes
    if length == -1:
        length = needed
    if offset >= 0 and length >= 0 and offset + length <= file_size:
        return Region(file, offset, length)

    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        is_pointer = False
    if is_pointer:
        raise Broken(
            f"the tensor {path!r} is in {file}, which is a Git LFS pointer and not the weights:"
            " fetch it with `git lfs pull`"
        )
    raise Broken(
        f"the tensor {path!r} needs bytes {offset} to {offset + length} of {file}, which has"
        f" {file_size}"
    )
