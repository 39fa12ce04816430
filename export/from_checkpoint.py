"""The bundle of a trained checkpoint: its module, its texts as evidence, and its description."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from evalmode.bundle.frontend import collate
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.row_counts import rows_by_length
from evalmode.errors import EvalmodeError
from evalmode.export.exact.integer_kernels import with_integer_kernels
from evalmode.export.exact.lean_graph import lean_graph
from evalmode.export.exact.limits import Limits
from evalmode.export.inputs.axes import BATCH
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.inputs.evidence import Evidence
from evalmode.export.inputs.text_probes import held_out, probes
from evalmode.export.module.forward import as_tensors
from evalmode.export.release import Description, Released, release, require_writable
from evalmode.export.rules.registry import Progress
from evalmode.model.checkpoint import Checkpoint

KERNELS = ("float", "integer")

_AXES = {0: BATCH, 1: "length"}


def release_checkpoint(
    checkpoint: Checkpoint,
    *,
    root: Path,
    name: str,
    version: str,
    progress: Progress,
    kernels: str = "float",
) -> Released:
    """Export a checkpoint's module in eval mode, certify it, and write `root/name/version`.

    `kernels` is "float", or "integer" for an exact network whose products are those of bytes.

    Raises EvalmodeError at once if that folder cannot be written or the checkpoint has no held-out
    rows or no network for these kernels, and ExportRefused unless all rules pass. Nothing is
    written then.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be {' or '.join(KERNELS)}, got {kernels!r}")
    is_exact = checkpoint.module.config.arithmetic == "exact"
    if kernels == "integer" and not is_exact:
        raise EvalmodeError(
            "--kernels integer is for exact networks, and this checkpoint has"
            f" arithmetic={checkpoint.module.config.arithmetic!r}: train with --arithmetic exact,"
            " or export with --kernels float"
        )
    require_writable(root, name=name, version=version)
    spec = checkpoint.frontend
    rows = list(checkpoint.held_out.rows)
    if not rows:
        raise EvalmodeError(
            "the checkpoint holds no held-out rows, and without rows nothing can be compared"
        )

    # The inputs of the trace. Several rows of several positions: an exporter may take a size of 1
    # for a constant. One position more than the shortest padded length, so that the trace does not
    # fix that length.
    shortest, longest = spec.lengths[0], spec.lengths[-1]
    example = collate([row[:shortest] for row in rows[:3]], length=min(shortest + 1, longest))

    def rewrite(model: ModelProto) -> ModelProto:
        model = lean_graph(model)
        if kernels == "integer":
            model = with_integer_kernels(model, Limits.of_frontend(spec, example))
        return model

    candidate = Candidate(
        module=checkpoint.module.eval(),
        exported=checkpoint.folded().eval(),
        fresh=checkpoint.folded().eval(),
        example=as_tensors(example),
        outputs=("logits",),
        evidence=Evidence(
            probes=probes(rows, spec),
            rows=rows_by_length(rows, spec),
            dynamic_axes=dict.fromkeys(example, _AXES),
            labelled=True,
            held_out=held_out(rows, checkpoint.held_out.labels, spec),
        ),
        rewrite=rewrite if is_exact else None,
    )

    # The known answers are those of the sample texts, each alone in its batch.
    frontend = checkpoint.open_frontend()
    samples: list[tuple[Tensors, str | None]] = []
    for text in checkpoint.sample_texts:
        ids = frontend.encode(text).ids
        samples.append((collate([ids], length=spec.padded_length(len(ids))), text))
    description = Description(
        samples=samples,
        labels=checkpoint.labels,
        frontend=spec,
        tokenizer=checkpoint.tokenizer,
        metrics={part: {**measures} for part, measures in checkpoint.metrics.items()},
        provenance=checkpoint.provenance,
    )
    return release(candidate, description, root=root, name=name, version=version, progress=progress)
