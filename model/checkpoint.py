"""The checkpoint: a finished training as a folder of data files, without code.

    model.safetensors    the weights
    checkpoint.json      the record: the network's shape, front end, labels, metrics, provenance,
                         and the sha256 of the other files
    tokenizer.json       the tokenizer, if the front end is BPE
    held_out.npz         the encoded test rows: flat ids, offsets, labels

The same run on the same machine writes the same bytes: no file contains a time or a path. `load`
refuses a folder that is not a complete classifier, in this order:

1. The record is JSON, of this format, with all keys, and lists only files of a checkpoint.
2. Each listed file is in the folder and has the recorded sha256.
3. The record describes one classifier: shape, front end and labels agree.
4. The tokenizer's ids fit the network's table.
5. The weights have the names, shapes and types of the network, and are finite.
6. The held-out rows are rows that the network can read.

The export room imports this module of the model room and no other.
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
from evalmode.model.exact.network import ExactTransformer
from evalmode.model.metrics import Measures
from evalmode.model.networks import Network, network_of

# Format 2 adds the arithmetic to the network's shape. A float32 network is written in format 1, so
# that earlier versions read it and its bytes stay the same.
FORMATS = (1, 2)
FIELDS_OF_FORMAT_2: dict[str, Any] = {"arithmetic": "float32", "weight_bits": 8}
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.safetensors"
HELD_OUT_FILE = "held_out.npz"
TRAIN_AGAIN = "train again"

# The keys that a record must have, and the type of each value.
REQUIRED_KEYS = {
    "network": dict,
    "frontend": dict,
    "labels": list,
    "metrics": dict,
    "provenance": dict,
    "sample_texts": list,
    "files": dict,
}
_NETWORK: TypeAdapter[TransformerConfig] = TypeAdapter(TransformerConfig)
_FRONTEND: TypeAdapter[FrontEndSpec] = TypeAdapter(FrontEndSpec)


class CheckpointError(EvalmodeError):
    """A folder is not a usable checkpoint, or a checkpoint cannot be written to it.

    `reason` names the file and is the message without the remedy, because each command has another
    remedy.
    """

    def __init__(self, reason: str, *, remedy: str = TRAIN_AGAIN) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The encoded test rows of a training.

    rows      one array for each row, (T,) or (T, G) int64, without padding
    labels    (N,) int64, the label index of each row
    """

    rows: list[Ids]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    module          the trained network, in eval mode
    tokenizer       the text of tokenizer.json; None if the front end has no tokenizer
    sample_texts    texts for which the export computes known answers, the empty text among them
    metrics         "train", "validation" and "test" -> accuracy, macro_f1 and rows; also `classes`
                    and `not_tested` if some classes have no rows
    provenance      versions, seed, data set and training configuration
    """

    module: Network
    frontend: FrontEndSpec
    tokenizer: str | None
    labels: tuple[str, ...]
    held_out: HeldOut
    sample_texts: tuple[str, ...]
    metrics: Mapping[str, Measures]
    provenance: Mapping[str, Any]

    def folded(self) -> Network:
        """The network for the export: all that eval mode does to the weights is done.

        Classic dropout's eval factors are folded into the weights, and those of an exact network
        are rounded. Returns a copy, or the module itself if there is nothing to do. Raises
        CheckpointError for an exact network whose weights are too large to be exact.
        """
        if isinstance(self.module, ExactTransformer):
            exact = copy.deepcopy(self.module).eval()
            try:
                exact.freeze()
            except ValueError as error:
                raise CheckpointError(f"the network is not exact: {error}") from error
            return exact
        if self.module.config.dropout_kind != "classic":
            return self.module
        module = copy.deepcopy(self.module)
        module.fold_classic_dropout()
        return module.eval()

    def open_frontend(self) -> FrontEnd:
        """The front end, which turns texts into rows for this network."""
        return open_frontend(self.frontend, self.tokenizer)


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` into `folder` and replace an earlier one.

    The record is removed first and written last, and contains the sha256 of the other files. A kill
    in between leaves a folder that `load` refuses. Raises CheckpointError if a file cannot be
    written; a full disk leaves the folder as it was.

        save(checkpoint, Path("runs/reviews"))
        checkpoint = load(Path("runs/reviews"))
    """
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in checkpoint.module.state_dict().items()
    }
    held_out = checkpoint.held_out
    lengths = [len(row) for row in held_out.rows]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "ids": np.concatenate(held_out.rows).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": held_out.labels,
    }
    files = {WEIGHTS_FILE: safetensors.torch.save(weights), HELD_OUT_FILE: npz_of(arrays)}
    if checkpoint.tokenizer is not None:
        files[TOKENIZER_FILE] = checkpoint.tokenizer.encode()

    network = asdict(checkpoint.module.config)
    version = FORMATS[-1]
    if checkpoint.module.config.arithmetic == "float32":
        version = 1
        for key in FIELDS_OF_FORMAT_2:
            del network[key]
    record = {
        "format": version,
        "network": network,
        "frontend": checkpoint.frontend.model_dump(mode="json"),
        "labels": checkpoint.labels,
        "metrics": checkpoint.metrics,
        "provenance": checkpoint.provenance,
        "sample_texts": checkpoint.sample_texts,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    # The last entry, because `replace_files` writes in this order.
    files[CHECKPOINT_FILE] = json.dumps(record, ensure_ascii=True, indent=1).encode()
    try:
        replace_files(folder, files)
        if TOKENIZER_FILE not in files:
            # An earlier checkpoint in this folder may have had a tokenizer.
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written to {error.filename or folder} ({error.strerror})",
            remedy="free disk space or make it writable, then continue with --resume",
        ) from error


def load(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`.

    Raises CheckpointError, with the name of the file, if a file is missing or changed. Files that
    do not form one classifier are refused even if each has its recorded sha256.
    """
    path = folder / CHECKPOINT_FILE
    record = _read_record(path)

    contents: dict[str, bytes] = {}
    for name, sha256 in record["files"].items():
        try:
            contents[name] = read_inside(folder, name, description="the checkpoint")
        except FileUnreadable as error:
            raise CheckpointError(error.reason) from error
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise CheckpointError(
                f"{folder / name} was changed or cut short after the training: its sha256 is not"
                " the recorded one"
            )

    try:
        config, frontend = _parse_network_and_frontend(record)
        tokenizer = _parse_tokenizer(contents, frontend)
        module = _load_network(config, contents[WEIGHTS_FILE])
        held_out = _parse_held_out(contents[HELD_OUT_FILE], frontend, label_count=config.labels)
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


def _read_record(path: Path) -> dict[str, Any]:
    """The record in a file: it has REQUIRED_KEYS, and lists only files of a checkpoint."""
    try:
        record = json.loads(read_file(path))
    except FileUnreadable as error:
        raise CheckpointError(
            error.reason, remedy="a checkpoint is a folder that `evalmode train` has finished"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not complete JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not the record of a checkpoint")

    # `type`, because True == 1 and would pass as format 1.
    version = record.get("format")
    if type(version) is not int or version not in FORMATS:
        raise CheckpointError(
            f"{path} has format {str(version)[:40]}, and this evalmode reads the formats 1 and 2"
        )
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(record.get(key), kind):
            raise CheckpointError(f"{path} has no {key} that is a {kind.__name__}")

    files = record["files"]
    if not {WEIGHTS_FILE, HELD_OUT_FILE} <= files.keys():
        raise CheckpointError(f"{path} does not list {WEIGHTS_FILE} and {HELD_OUT_FILE}")
    # The names are a closed set, so a record cannot name a file outside of its folder.
    if unknown := sorted(files.keys() - {WEIGHTS_FILE, HELD_OUT_FILE, TOKENIZER_FILE}):
        raise CheckpointError(
            f"{path} lists {unknown[0][:80]!r}, which is not a file of a checkpoint"
        )
    return record


def _parse_network_and_frontend(
    record: Mapping[str, Any],
) -> tuple[TransformerConfig, FrontEndSpec]:
    """The network's shape and the front end that a record describes.

    Raises ValueError unless they and the labels belong to one classifier.
    """
    # The parser below would fill a missing field with its default, and ignore an unknown one.
    network = record["network"]
    fields_of_network = {field.name for field in fields(TransformerConfig)}
    if record["format"] == 1:
        fields_of_network -= FIELDS_OF_FORMAT_2.keys()
    if mismatched := sorted(fields_of_network ^ network.keys()):
        verb = "lacks" if mismatched[0] in fields_of_network else "holds an unknown"
        raise ValueError(f"network {verb} {mismatched[0][:80]!r}")
    try:
        key = "network"
        config = _NETWORK.validate_json(json.dumps(FIELDS_OF_FORMAT_2 | network), strict=True)
        key = "frontend"
        frontend = _FRONTEND.validate_json(json.dumps(record[key]), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, (key, *first["loc"])))
        raise ValueError(f"{path}: {first['msg']}") from error

    labels = record["labels"]
    if not all(isinstance(text, str) for text in (*labels, *record["sample_texts"])):
        raise ValueError("labels and sample_texts must be texts")
    if not all(isinstance(measures, dict) for measures in record["metrics"].values()):
        raise ValueError("metrics must hold a table for each part of the data")
    if len(labels) != config.labels or len(set(labels)) != len(labels):
        raise ValueError(
            f"it names {len(set(labels))} labels, and the network has {config.labels} outputs"
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

    # An export copies these into its manifest and its answers, which are strict JSON in UTF-8.
    # Python's reader accepts NaN, and "\ud800", which is half of a surrogate pair.
    try:
        exported = [labels, record["metrics"], record["provenance"]]
        json.dumps(exported, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(
            "labels, metrics or provenance hold a number that is not finite, or half of a"
            " surrogate pair"
        ) from error
    return config, frontend


def _parse_tokenizer(contents: Mapping[str, bytes], frontend: FrontEndSpec) -> str | None:
    """The text of the tokenizer's file; None for a front end without a tokenizer.

    Raises ValueError if the tokenizer is not one that this front end can use.
    """
    has_file = TOKENIZER_FILE in contents
    if not isinstance(frontend, BpeSpec):
        if has_file:
            raise ValueError(f"{TOKENIZER_FILE} does not belong to the front end {frontend.kind}")
        return None
    if not has_file:
        raise ValueError(f"{TOKENIZER_FILE} is missing for the front end {frontend.kind}")
    try:
        text = contents[TOKENIZER_FILE].decode()
        ids = Tokenizer.from_str(text).get_vocab().values()
    # The Rust part of tokenizers raises Exception itself.
    except Exception as error:
        raise ValueError(f"{TOKENIZER_FILE} is not a tokenizer ({_one_line(error)})") from error
    highest_id = max((*ids, frontend.start))
    if highest_id >= frontend.vocabulary:
        raise ValueError(
            f"{TOKENIZER_FILE} has ids up to {highest_id}, and the network's table"
            f" has {frontend.vocabulary} rows"
        )
    return text


def _load_network(config: TransformerConfig, data: bytes) -> Network:
    """The network of shape `config` with the weights of a safetensors file.

    Raises ValueError unless the weights are finite, and have the names, shapes and types of such a
    network.
    """
    try:
        weights = safetensors.torch.load(data)
    # SafetensorError derives from Exception directly.
    except Exception as error:
        raise ValueError(
            f"{WEIGHTS_FILE} is not a safetensors file ({_one_line(error)})"
        ) from error

    # A record may describe a network of terabytes. So names and shapes are compared with those of a
    # network on the device "meta", which allocates no memory. Building it takes time for each
    # layer, so the number of layers is compared first.
    if config.layers > len(weights):
        raise ValueError(
            f"network.layers is {config.layers}, and {WEIGHTS_FILE} holds {len(weights)} tensors"
        )
    try:
        with torch.device("meta"):
            expected = network_of(config).state_dict()
    # torch raises these for sizes that need more than 64 bits.
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"no network can have this shape ({_one_line(error)})") from error

    if mismatched := sorted(expected.keys() ^ weights.keys()):
        verb = "lacks" if mismatched[0] in expected else "holds an unknown"
        raise ValueError(f"{WEIGHTS_FILE} {verb} {mismatched[0][:80]!r}")
    for name, tensor in weights.items():
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{name} in {WEIGHTS_FILE} is {tensor.dtype} of the shape {tuple(tensor.shape)},"
                f" and the network's is {dtype} of {shape}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {WEIGHTS_FILE} holds numbers that are not finite")

    module = network_of(config)
    module.load_state_dict(weights)
    return module


def _parse_held_out(data: bytes, frontend: FrontEndSpec, *, label_count: int) -> HeldOut:
    """The rows in an npz file. Raises ValueError unless they are rows that the network can read."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            ids, offsets, labels = arrays["ids"], arrays["offsets"], arrays["labels"]
    # For foreign bytes zipfile and numpy raise a dozen types, which have no common base.
    except Exception as error:
        raise ValueError(f"{HELD_OUT_FILE} cannot be read ({_one_line(error)})") from error

    for name, array, axis_counts in (
        ("ids", ids, (1, 2)),
        ("offsets", offsets, (1,)),
        ("labels", labels, (1,)),
    ):
        if array.dtype.kind != "i" or array.ndim not in axis_counts:
            raise ValueError(
                f"{name} in {HELD_OUT_FILE} is {array.dtype} of the shape {array.shape}"
            )
    # As int64: the difference of two offsets of a narrower type may not fit into that type.
    ids, offsets, labels = (array.astype(np.int64) for array in (ids, offsets, labels))
    if not (
        len(offsets) == len(labels) + 1
        and offsets[0] == 0
        and offsets[-1] == len(ids)
        and (np.diff(offsets) > 0).all()
    ):
        raise ValueError(f"offsets in {HELD_OUT_FILE} do not divide its ids into rows")
    if not len(labels):
        return HeldOut(rows=[], labels=labels)
    rows = np.split(ids, offsets[1:-1])

    # A position has one token, or the n-grams of several characters.
    expected_shape = () if isinstance(frontend, BpeSpec) else (frontend.ids_per_position,)
    if ids.shape[1:] != expected_shape:
        raise ValueError(
            f"a position in {HELD_OUT_FILE} has ids of the shape {ids.shape[1:]}, and the front end"
            f" is {frontend.kind}"
        )
    longest = max(len(row) for row in rows)
    if longest > frontend.lengths[-1]:
        raise ValueError(
            f"{HELD_OUT_FILE} has rows of up to {longest} positions, and the network reads"
            f" {frontend.lengths[-1]}"
        )
    for name, array, limit in (("ids", ids, frontend.vocabulary), ("labels", labels, label_count)):
        if not 0 <= array.min() <= array.max() < limit:
            raise ValueError(f"{name} in {HELD_OUT_FILE} must be from 0 to {limit - 1}")
    return HeldOut(rows=rows, labels=labels)


def _one_line(error: Exception) -> str:
    """The message of a library's error as a part of one sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
