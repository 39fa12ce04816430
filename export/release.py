"""From a trained checkpoint to a certified bundle on disk, or to a refusal that names what failed and where.

Knows no rule; puts the parts in order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxscript
import torch

from evalmode.bundle.certificate import Certificate, Record, Verdict
from evalmode.bundle.errors import EvalmodeError
from evalmode.bundle.frontend import TOKENIZER_FILE, collate
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE, Manifest, is_name
from evalmode.bundle.session import Session
from evalmode.bundle.store import digest_of, hashes_of, write_bundle
from evalmode.export.certify import Progress, check_graph, check_module
from evalmode.export.convert import OPSET, convert
from evalmode.export.probes import held_out, probes, rows_by_length
from evalmode.export.subject import Subject, as_tensors
from evalmode.model.checkpoint import Checkpoint

_AXES = {0: "batch", 1: "length"}


class ExportRefused(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ExportRefused"
    """An export whose certificate would not pass; `records` holds what was found."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = tuple(records)
        bad = [record for record in records if record.verdict in (Verdict.FAIL, Verdict.UNPROVEN)]
        said = "; ".join(f"{record.rule}: {record.why}: {', '.join(record.where)}".rstrip(": ") for record in bad)
        super().__init__(f"no bundle was written: {said}")


@dataclass(frozen=True, kw_only=True)
class Released:
    """A bundle that was written, and the certificate in it."""

    path: Path
    certificate: Certificate


def release(checkpoint: Checkpoint, *, root: Path, name: str, version: str, progress: Progress) -> Released:
    """Export, certify and write `root/name/version`; raise ExportRefused, and write nothing, unless all rules pass.

    Raises EvalmodeError at once for a name, a version or a root that no bundle can be written to.
    """
    _require_writable(root, name=name, version=version)
    subject, records = _converted(checkpoint, progress=progress)
    graph_records, row_counts = check_graph(subject, progress=progress)
    records += graph_records
    _refuse_unless_passed(records)
    progress("write")
    contents = _contents(checkpoint, subject)
    manifest = _manifest(checkpoint, subject.served, name=name, version=version, files=hashes_of(contents))
    certificate = Certificate(
        digest=digest_of(manifest), platform=subject.served.platform, records=records, row_counts=row_counts
    ).sealed()
    path = write_bundle(root, manifest=manifest, certificate=certificate, contents=contents)
    return Released(path=path, certificate=certificate)


def _require_writable(root: Path, *, name: str, version: str) -> None:
    """What would only be told by the last step of a long export is told by the first."""
    for flag, given in (("--name", name), ("--version", version)):
        if not is_name(given):
            allowed = "at most 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
            raise EvalmodeError(f"{flag} must be {allowed}, got {given!r}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise EvalmodeError(f"no bundle can be written to {root}: {error.strerror}") from error


def _converted(checkpoint: Checkpoint, *, progress: Progress) -> tuple[Subject, tuple[Record, ...]]:
    """What is to be certified, and the records of the rules that its module has passed."""
    rows, spec = list(checkpoint.held_out.rows), checkpoint.frontend
    if not rows:
        raise EvalmodeError("the checkpoint holds no held-out rows, and without rows nothing can be compared")
    batches = probes(rows, spec)
    module = checkpoint.module
    module.eval()
    records = check_module(module, [as_tensors(batch) for batch in batches], progress=progress)
    _refuse_unless_passed(records)
    progress("convert")
    # Several rows of several positions: an exporter may take a size of 1 for a constant.
    example = collate([row[: spec.lengths[0]] for row in rows[:3]], length=min(spec.lengths[0] + 1, spec.lengths[-1]))
    folded = checkpoint.folded()
    folded.eval()
    model = convert(folded, as_tensors(example), dynamic_axes=dict.fromkeys(example, _AXES), outputs=["logits"])
    subject = Subject(
        module=module,
        model=model,
        probes=batches,
        rows=rows_by_length(rows, spec),
        held_out=held_out(rows, checkpoint.held_out.labels, spec),
    )
    return subject, records


def _refuse_unless_passed(records: Sequence[Record]) -> None:
    if any(record.verdict in (Verdict.FAIL, Verdict.UNPROVEN) for record in records):
        raise ExportRefused(records)


def _contents(checkpoint: Checkpoint, subject: Subject) -> dict[str, bytes]:
    contents = {MODEL_FILE: subject.data, KNOWN_ANSWERS_FILE: pack(_known_answers(checkpoint, subject.served))}
    if checkpoint.tokenizer is not None:
        contents[TOKENIZER_FILE] = checkpoint.tokenizer.encode()
    return contents


def _known_answers(checkpoint: Checkpoint, session: Session) -> tuple[KnownAnswer, ...]:
    frontend = checkpoint.open_frontend()
    answers = []
    for text in checkpoint.sample_texts:
        ids = frontend.encode(text).ids
        inputs = collate([ids], length=frontend.spec.padded_length(len(ids)))
        answers.append(KnownAnswer(inputs=inputs, outputs=session.run(inputs), text=text))
    return tuple(answers)


def _manifest(checkpoint: Checkpoint, session: Session, *, name: str, version: str, files: dict[str, str]) -> Manifest:
    exported = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    return Manifest(
        name=name,
        version=version,
        opset=OPSET,
        inputs=session.inputs,
        outputs=session.outputs,
        labels=checkpoint.labels,
        frontend=checkpoint.frontend,
        metrics=dict(checkpoint.metrics),
        provenance={**checkpoint.provenance, "export": exported},
        files=files,
    )
