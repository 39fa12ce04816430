"""From a candidate to a certified bundle on disk, or to a refusal that names what failed and where.

The steps are the same for a checkpoint and for any other module.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxscript
import torch
from pydantic import JsonValue

from evalmode.bundle.certificate import (
    Certificate,
    Record,
    Verdict,
    certificate_schema_version,
)
from evalmode.bundle.frontend import TOKENIZER_FILE, BpeSpec, NgramSpec
from evalmode.bundle.known_answers import KnownAnswer, Tensors, pack
from evalmode.bundle.manifest import (
    KNOWN_ANSWERS_FILE,
    MODEL_FILE,
    Manifest,
    is_name,
    lowest_schema_version,
)
from evalmode.bundle.operators import check_operators
from evalmode.bundle.store import digest_of, hashes_of, write_bundle
from evalmode.errors import EvalmodeError
from evalmode.export.certify import certify
from evalmode.export.convert import OPSET
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.statements import statements_of
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.rules.registry import Progress


class ExportRefused(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ExportRefused"
    """An export that does not pass all rules; `records` has the results."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = tuple(records)
        reasons = [
            f"{record.rule}: {record.why}: {', '.join(map(str, record.findings))}"
            for record in records
            if record.verdict in (Verdict.FAIL, Verdict.UNPROVEN)
        ]
        super().__init__(f"no bundle was written: {'; '.join(reasons)}")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a bundle contains besides its model.

    `samples` are the inputs of its known answers, each with the text that it came from, or None. If
    the inputs have an axis of rows, a sample has one row.
    """

    samples: Sequence[tuple[Tensors, str | None]]
    labels: tuple[str, ...] | None = None
    frontend: NgramSpec | BpeSpec | None = None
    tokenizer: str | None = None
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Released:
    """A bundle that was written, and the certificate in it."""

    path: Path
    certificate: Certificate


def release(
    candidate: Candidate,
    description: Description,
    *,
    root: Path,
    name: str,
    version: str,
    progress: Progress,
) -> Released:
    """Export a candidate, certify it, and write the bundle `root/name/version`.

    Raises ExportRefused unless all rules pass, and BundleNotCertified for a graph that the service
    would not open. Nothing is written then.
    """
    # 1. Certify.
    certified = certify(candidate, progress=progress)
    if not certified.passed or certified.subject is None:
        raise ExportRefused(certified.records)
    progress("write")
    subject = certified.subject
    # The service reads the graph again before it serves it. It accepts less than the rules do: a
    # training mode must be off by a plain constant, and nothing is computed to find that out.
    check_operators(subject.data)

    # 2. The files of the bundle, with the answers of the session as the service opens it.
    answers = [
        KnownAnswer(inputs=inputs, outputs=subject.served.run(inputs), text=text)
        for inputs, text in description.samples
    ]
    contents = {MODEL_FILE: subject.data, KNOWN_ANSWERS_FILE: pack(tuple(answers))}
    if description.tokenizer is not None:
        contents[TOKENIZER_FILE] = description.tokenizer.encode()

    # 3. The manifest, with the hashes of the files.
    inputs = subject.served.inputs
    # A front end makes the ids itself, from its own vocabulary: they need no bounds.
    if description.frontend is None:
        bounds = subject.export.index_bounds
        inputs = tuple(
            item.model_copy(update={"bounds": bounds.get(item.name, ())}) for item in inputs
        )
    versions: JsonValue = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }
    manifest = Manifest(
        schema_version=lowest_schema_version(inputs),
        name=name,
        version=version,
        opset=OPSET,
        inputs=inputs,
        outputs=subject.served.outputs,
        labels=description.labels,
        frontend=description.frontend,
        metrics=dict(description.metrics),
        provenance={**description.provenance, "export": versions},
        files=hashes_of(contents),
    )
    progress("prove")
    statements = statements_of(subject.graph, Limits.of(manifest))

    # 4. The certificate, which names the digest of the manifest.
    certificate = Certificate(
        schema_version=certificate_schema_version(statements),
        digest=digest_of(manifest),
        platform=subject.served.platform,
        records=certified.records,
        row_counts=subject.row_counts,
        statements=statements,
    )
    bundle = write_bundle(root, manifest=manifest, certificate=certificate, contents=contents)
    assert bundle.certificate is not None, "a bundle is written with its certificate"
    return Released(path=bundle.path, certificate=bundle.certificate)


def require_writable(root: Path, *, name: str, version: str) -> None:
    """Raise EvalmodeError if `root/name/version` cannot be written.

    Called before a long export, whose last step would otherwise fail.
    """
    for flag, value in (("--name", name), ("--version", version)):
        if not is_name(value):
            allowed = "at most 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
            raise EvalmodeError(f"{flag} must be {allowed}, got {value!r}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise EvalmodeError(f"no bundle can be written to {root}: {error.strerror}") from error
