"""A finished training as a folder: weights, front end, labels, metrics, provenance. Data, no code.

    model.safetensors    the weights
    checkpoint.json      the network's shape, front end, labels, metrics, provenance, and the
                         sha256 of the other files
    tokenizer.json       where the front end is BPE
    held_out.npz         the encoded test rows: flat ids, offsets, labels

The same run on the same machine writes the same bytes: there is no clock and no path in them. The
export room imports this module of the model room and no other.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer

from evalmode.atomic_files import replace_files
from evalmode.bundle.errors import FileUnreadable
from evalmode.bundle.frontend import (
    TOKENIZER_FILE,
    BpeSpec,
    FrontEnd,
    FrontEndSpec,
    Ids,
    open_frontend,
)
from evalmode.bundle.npz import npz_of
from evalmode.bundle.store import read_file, read_inside
from evalmode.errors import EvalmodeError
from evalmode.model.config import TransformerConfig
from evalmode.model.metrics import Measures
from evalmode.model.transformer import Transformer

FORMAT = 1
RECORD_FILE, WEIGHTS_FILE, HELD_OUT_FILE = "checkpoint.json", "model.safetensors", "held_out.npz"

TRAIN_AGAIN = "train again"
# What the record must hold to be looked at.
KEYS = {
    "network": dict,
    "frontend": dict,
    "labels": list,
    "metrics": dict,
    "provenance": dict,
    "sample_texts": list,
    "files": dict,
}
_network: TypeAdapter[TransformerConfig] = TypeAdapter(TransformerConfig)
_frontend: TypeAdapter[FrontEndSpec] = TypeAdapter(FrontEndSpec)


class CheckpointError(EvalmodeError):
    """A folder is not a checkpoint that can be used, or cannot become one.

    `reason` names the file, without the way out, which differs between commands.
    """

    def __init__(self, reason: str, *, remedy: str = TRAIN_AGAIN) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Encoded test rows, each (T,) or (T, G) int64 without padding, and the label index of each,
    (N,) int64.
    """

    rows: list[Ids]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    module          the trained network, in eval mode
    metrics         train, validation and test -> accuracy, macro_f1, rows, and where classes have
                    no rows `classes` and `not_tested`
    provenance      versions, seed, data set and training configuration
    sample_texts    held-out and odd texts, the empty one among them, to know answers for
    """

    module: Transformer
    frontend: FrontEndSpec
    tokenizer: str | None
    labels: tuple[str, ...]
    held_out: HeldOut
    sample_texts: tuple[str, ...]
    metrics: Mapping[str, Measures]
    provenance: Mapping[str, Any]

    def folded(self) -> Transformer:
        """The network with classic dropout's eval factors folded into its weights; the module
        itself when inverted.
        """
        if self.module.config.dropout_kind != "classic":
            return self.module
        module = copy.deepcopy(self.module)
        module.fold_classic_dropout()
        return module.eval()

    def open_frontend(self) -> FrontEnd:
        """What turns texts into this network's rows."""
        return open_frontend(self.frontend, self.tokenizer)


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` into `folder`, over the one that may stand there.

    The record is written last and names every other file's hash, so a folder is either a whole
    checkpoint or none. Raises CheckpointError, and leaves the folder as it was, without room.
    """
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in checkpoint.module.state_dict().items()
    }
    files = {
        WEIGHTS_FILE: safetensors.torch.save(weights),
        HELD_OUT_FILE: _pack(checkpoint.held_out),
    }
    if checkpoint.tokenizer is not None:
        files[TOKENIZER_FILE] = checkpoint.tokenizer.encode()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    record = {
        "format": FORMAT,
        "network": asdict(checkpoint.module.config),
        "frontend": checkpoint.frontend.model_dump(mode="json"),
        "labels": checkpoint.labels,
        "metrics": checkpoint.metrics,
        "provenance": checkpoint.provenance,
        "sample_texts": checkpoint.sample_texts,
        "files": hashes,
    }
    files[RECORD_FILE] = json.dumps(record, ensure_ascii=True, indent=1).encode()
    try:
        replace_files(folder, files)
        if TOKENIZER_FILE not in files:  # an earlier checkpoint's
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written to {error.filename or folder} ({error.strerror})",
            remedy="make room or make it writable, and go on with --resume",
        ) from error


def load(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`.

    Raises CheckpointError, naming the file, when one is missing or changed, and when they do not
    make one classifier, whatever their sha256.
    """
    path = folder / RECORD_FILE
    record = _record(path)
    contents = {name: _checked(folder, name, sha256) for name, sha256 in record["files"].items()}
    try:
        config, frontend = _described(record)
        tokenizer = _tokenizer(contents, frontend)
        module = _restored(config, contents[WEIGHTS_FILE])
        held_out = _unpack(contents[HELD_OUT_FILE])
        _require_rows_fit(held_out, frontend, labels=config.labels)
    except ValueError as error:
        raise CheckpointError(f"{path} does not describe the files beside it: {error}") from error
    return Checkpoint(
        module=module.eval(),
        frontend=frontend,
        tokenizer=tokenizer,
        labels=tuple(record["labels"]),
        held_out=held_out,
        sample_texts=tuple(record["sample_texts"]),
        metrics=record["metrics"],
        provenance=record["provenance"],
    )


def _record(path: Path) -> dict[str, Any]:
    """The record with `KEYS`, which lists the files of a checkpoint and no other."""
    try:
        record = json.loads(read_file(path))
    except FileUnreadable as error:
        raise CheckpointError(
            error.reason, remedy="a checkpoint is a folder that `evalmode train` has finished"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON, or only a part of it: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not the record of a checkpoint")
    version = record.get("format")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{path} has format {str(version)[:40]}, and this evalmode reads format {FORMAT}"
        )
    for key, kind in KEYS.items():
        if not isinstance(record.get(key), kind):
            raise CheckpointError(f"{path} has no {key} that is a {kind.__name__}")
    files = record["files"]
    if not {WEIGHTS_FILE, HELD_OUT_FILE} <= files.keys():
        raise CheckpointError(f"{path} does not list {WEIGHTS_FILE} and {HELD_OUT_FILE}")
    # No other name is a checkpoint's, so none can lead out of the folder.
    if strangers := sorted(files.keys() - {WEIGHTS_FILE, HELD_OUT_FILE, TOKENIZER_FILE}):
        raise CheckpointError(
            f"{path} lists {strangers[0][:80]!r}, which is no file of a checkpoint"
        )
    return record


def _described(record: Mapping[str, Any]) -> tuple[TransformerConfig, FrontEndSpec]:
    """The network's shape and the front end of a record. Raises ValueError where its parts do not
    make one classifier.
    """
    # A field that is missing must not become its default, and one too many must not be ignored.
    names = {field.name for field in fields(TransformerConfig)}
    if odd := sorted(names ^ record["network"].keys()):
        verb = "lacks" if odd[0] in names else "holds an unknown"
        raise ValueError(f"network {verb} {odd[0][:80]!r}")
    try:
        part = "network"
        config = _network.validate_json(json.dumps(record[part]), strict=True)
        part = "frontend"
        frontend = _frontend.validate_json(json.dumps(record[part]), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join((part, *map(str, first["loc"])))
        raise ValueError(f"{key}: {first['msg']}") from error

    labels = record["labels"]
    if not all(isinstance(text, str) for text in (*labels, *record["sample_texts"])):
        raise ValueError("labels and sample_texts must be texts")
    if not all(isinstance(measures, dict) for measures in record["metrics"].values()):
        raise ValueError("metrics must hold a table for each part of the data")
    if len(labels) != config.labels or len(set(labels)) != len(labels):
        raise ValueError(
            f"it names {len(set(labels))} labels, and the network tells {config.labels} apart"
        )
    for key in ("vocabulary", "ids_per_position"):
        if getattr(frontend, key) != getattr(config, key):
            raise ValueError(
                f"the front end's {key} is {getattr(frontend, key)}, and the network's is"
                f" {getattr(config, key)}"
            )
    if frontend.lengths[-1] != config.positions:
        raise ValueError(
            f"the front end's rows have up to {frontend.lengths[-1]} positions, and the network"
            f" reads {config.positions}"
        )
    try:
        described = [labels, record["metrics"], record["provenance"]]
        json.dumps(described, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(
            "labels, metrics or provenance hold a number that is not finite or half a character"
        ) from error
    return config, frontend


def _tokenizer(contents: Mapping[str, bytes], frontend: FrontEndSpec) -> str | None:
    """The text of the tokenizer's file, None for a front end without one. Raises ValueError for a
    tokenizer that is not the front end's.
    """
    if isinstance(frontend, BpeSpec) != (TOKENIZER_FILE in contents):
        verb = "is missing for" if isinstance(frontend, BpeSpec) else "does not belong to"
        raise ValueError(f"{TOKENIZER_FILE} {verb} the front end {frontend.kind}")
    if not isinstance(frontend, BpeSpec):
        return None
    try:
        text = contents[TOKENIZER_FILE].decode()
        ids = Tokenizer.from_str(text).get_vocab().values()
    except Exception as error:  # the Rust side raises Exception itself
        raise ValueError(f"{TOKENIZER_FILE} is not a tokenizer ({_short(error)})") from error
    if max((*ids, frontend.start)) >= frontend.vocabulary:
        raise ValueError(
            f"{TOKENIZER_FILE} has ids up to {max((*ids, frontend.start))}, and the network's table"
            f" has {frontend.vocabulary} rows"
        )
    return text


def _restored(config: TransformerConfig, data: bytes) -> Transformer:
    """The network with the weights in a safetensors file. Raises ValueError unless the weights are
    those of such a network, and finite.
    """
    try:
        weights = safetensors.torch.load(data)
    except Exception as error:  # SafetensorError has no other base
        raise ValueError(f"{WEIGHTS_FILE} is not a safetensors file ({_short(error)})") from error
    # Shapes are compared before memory is taken: a record may speak of terabytes.
    if config.layers > len(weights):
        raise ValueError(
            f"network.layers is {config.layers}, and so many are not in {WEIGHTS_FILE}"
        )
    try:
        with torch.device("meta"):
            expected = Transformer(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise ValueError(f"no network has such a shape ({_short(error)})") from error
    if odd := sorted(expected.keys() ^ weights.keys()):
        verb = "lacks" if odd[0] in expected else "holds an unknown"
        raise ValueError(f"{WEIGHTS_FILE} {verb} {odd[0][:80]!r}")
    for name, tensor in weights.items():
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{name} in {WEIGHTS_FILE} is {tensor.dtype} of the shape {tuple(tensor.shape)},"
                f" and the network's is {dtype} of {shape}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {WEIGHTS_FILE} holds numbers that are not finite")
    module = Transformer(config)
    module.load_state_dict(weights)
    return module


def _require_rows_fit(held_out: HeldOut, frontend: FrontEndSpec, *, labels: int) -> None:
    """Raise ValueError where a held-out row is none that the network reads."""
    if not held_out.rows:
        return
    shape = held_out.rows[0].shape[1:]
    if shape != (() if isinstance(frontend, BpeSpec) else (frontend.ids_per_position,)):
        raise ValueError(
            f"a position in {HELD_OUT_FILE} has ids of the shape {shape}, and the front end is"
            f" {frontend.kind}"
        )
    lengths = [len(row) for row in held_out.rows]
    if max(lengths) > frontend.lengths[-1]:
        raise ValueError(
            f"{HELD_OUT_FILE} has rows of up to {max(lengths)} positions, and the network reads"
            f" {frontend.lengths[-1]}"
        )
    for name, values, limit in (
        ("ids", held_out.rows, frontend.vocabulary),
        ("labels", [held_out.labels], labels),
    ):
        for value in values:
            if value.size and not 0 <= value.min() <= value.max() < limit:
                raise ValueError(f"{name} in {HELD_OUT_FILE} must be from 0 to {limit - 1}")


def _checked(folder: Path, name: str, sha256: object) -> bytes:
    try:
        data = read_inside(folder, name, called="the checkpoint")
    except FileUnreadable as error:
        raise CheckpointError(error.reason) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{folder / name} was changed or cut short after the training: its sha256 is not the"
            " recorded one"
        )
    return data


def _short(error: Exception) -> str:
    """What a library says of a file, as a part of one sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _pack(held_out: HeldOut) -> bytes:
    lengths = [len(row) for row in held_out.rows]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "ids": np.concatenate(held_out.rows).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": held_out.labels,
    }
    return npz_of(arrays)


def _unpack(data: bytes) -> HeldOut:
    """The rows in a file. Raises ValueError for bytes that are not such a file."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            ids, offsets, labels = (arrays[name] for name in ("ids", "offsets", "labels"))
    # zipfile and numpy raise a dozen kinds, without a common base, for bytes not theirs
    except Exception as error:
        raise ValueError(f"{HELD_OUT_FILE} cannot be read ({_short(error)})") from error
    for name, array, axes in (
        ("ids", ids, (1, 2)),
        ("offsets", offsets, (1,)),
        ("labels", labels, (1,)),
    ):
        if array.dtype.kind != "i" or array.ndim not in axes:
            raise ValueError(
                f"{name} in {HELD_OUT_FILE} is {array.dtype} of the shape {array.shape}"
            )
    if not (
        len(offsets) == len(labels) + 1
        and offsets[0] == 0
        and offsets[-1] == len(ids)
        and (np.diff(offsets) > 0).all()
    ):
        raise ValueError(f"offsets in {HELD_OUT_FILE} do not divide its ids into rows")
    rows = np.split(ids.astype(np.int64), offsets[1:-1]) if len(labels) else []
    return HeldOut(rows=rows, labels=labels.astype(np.int64))
