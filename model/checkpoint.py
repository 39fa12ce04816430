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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
from pydantic import TypeAdapter

from evalmode.atomic_files import replace_files
from evalmode.bundle.errors import BundleCorrupt
from evalmode.bundle.frontend import (
    TOKENIZER_FILE,
    FrontEnd,
    FrontEndSpec,
    Ids,
    open_frontend,
)
from evalmode.bundle.npz import npz_of
from evalmode.bundle.store import read_file
from evalmode.errors import EvalmodeError
from evalmode.model.config import TransformerConfig
from evalmode.model.metrics import Measures
from evalmode.model.transformer import Transformer

FORMAT = 1
RECORD_FILE, WEIGHTS_FILE, HELD_OUT_FILE = "checkpoint.json", "model.safetensors", "held_out.npz"

_spec: TypeAdapter[FrontEndSpec] = TypeAdapter(FrontEndSpec)


class CheckpointError(EvalmodeError):
    """A folder is not a checkpoint that can be used; the message names the file."""


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
            f"the checkpoint cannot be written to {error.filename or folder} ({error.strerror}):"
            " make room or make it writable, and go on with --resume"
        ) from error


def load(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`. Raises CheckpointError, naming the file that is missing,
    changed or alien.
    """
    record = _record(folder)
    contents = {name: _checked(folder / name, sha256) for name, sha256 in record["files"].items()}
    try:
        module = Transformer(TransformerConfig(**record["network"]))
        module.load_state_dict(safetensors.torch.load(contents[WEIGHTS_FILE]))
        frontend = _spec.validate_python(record["frontend"])
        _require_agreement(
            module.config, frontend, labels=record["labels"], metrics=record["metrics"]
        )
        return Checkpoint(
            module=module.eval(),
            frontend=frontend,
            tokenizer=contents[TOKENIZER_FILE].decode() if TOKENIZER_FILE in contents else None,
            labels=tuple(record["labels"]),
            held_out=_unpack(contents[HELD_OUT_FILE]),
            sample_texts=tuple(record["sample_texts"]),
            metrics=record["metrics"],
            provenance=record["provenance"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / RECORD_FILE} does not describe the files beside it: {error}"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    try:
        record = json.loads(read_file(path))
    except BundleCorrupt as error:
        raise CheckpointError(
            f"{error}: a checkpoint is a folder that `evalmode train` has finished"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON, or only a part of it: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{path} has format {found!r}, and this evalmode reads format {FORMAT}: train again"
        )
    if (
        not isinstance(record.get("files"), dict)
        or not {WEIGHTS_FILE, HELD_OUT_FILE} <= record["files"].keys()
    ):
        raise CheckpointError(
            f"{path} does not list {WEIGHTS_FILE} and {HELD_OUT_FILE}: train again"
        )
    return record


def _require_agreement(
    network: TransformerConfig,
    frontend: FrontEndSpec,
    *,
    labels: Sequence[str],
    metrics: object,
) -> None:
    """Raise ValueError where the record's parts, each sound alone, do not make one classifier."""
    if len(labels) != network.labels:
        raise ValueError(f"{len(labels)} labels, and the network tells {network.labels} apart")
    if frontend.vocabulary > network.vocabulary:
        raise ValueError(
            f"ids up to {frontend.vocabulary}, and the network's table has {network.vocabulary}"
            " rows"
        )
    if frontend.lengths[-1] > network.positions:
        raise ValueError(
            f"rows of {frontend.lengths[-1]} positions, and the network reads {network.positions}"
        )
    if not isinstance(metrics, dict):
        raise ValueError("metrics that are not a table")


def _checked(path: Path, sha256: str) -> bytes:
    try:
        data = read_file(path)
    except BundleCorrupt as error:
        raise CheckpointError(f"{error}, and checkpoint.json lists it") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} was changed or cut short after the training: its sha256 is not the"
            " recorded one"
        )
    return data


def _pack(held_out: HeldOut) -> bytes:
    lengths = [len(row) for row in held_out.rows]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "ids": np.concatenate(held_out.rows).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": held_out.labels,
    }
    return npz_of(arrays)


def _unpack(data: bytes) -> HeldOut:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        ids, offsets, labels = arrays["ids"].astype(np.int64), arrays["offsets"], arrays["labels"]
    return HeldOut(rows=np.split(ids, offsets[1:-1]), labels=labels)
