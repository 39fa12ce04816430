"""From a trained checkpoint to a certified bundle on disk, or to a refusal that names what failed and where.

Knows no rule; puts the parts in order.
"""

from __future__ import annotations

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
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE, Manifest
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
    """Export, certify and write `root/name/version`; raise ExportRefused, and write nothing, unless all rules pass."""
    rows, spec = list(checkpoint.held_out.rows), checkpoint.frontend
    batches = probes(rows, spec)
    # The exporter takes a size of 1 for a constant: its example has several rows of several positions.
    example = collate([row[: spec.lengths[0]] for row in rows[:3]], length=spec.lengths[0] + 1)
    module = checkpoint.module.eval()
    records = check_module(module, as_tensors(example), progress=progress)
    _refuse_unless_passed(records)
    progress("convert")
    model = convert(
        checkpoint.folded().eval(),
        as_tensors(example),
        dynamic_axes=dict.fromkeys(example, _AXES),
        outputs=["logits"],
    )
    subject = Subject(
        module=module,
        model=model,
        probes=batches,
        rows=rows_by_length(rows, spec),
        held_out=held_out(rows, checkpoint.held_out.labels, spec),
    )
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
