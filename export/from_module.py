"""The bundle of any module, named by references to its factory and its sample inputs.

The export is compared with a second one in another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.references import load_in_eval_mode, load_samples
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.release import Description, Released, release, require_writable
from evalmode.export.rules.registry import Progress
from evalmode.export.second_export import exported_elsewhere

_KNOWN_ANSWERS = 8  # that the bundle has at most


def release_module(
    factory: str,
    inputs: str,
    *,
    dynamic_axes: Sequence[str] = (),
    root: Path,
    name: str,
    version: str,
    progress: Progress,
) -> Released:
    """Export the module of `package.module:factory` in eval mode, certify it, and write
    `root/name/version`.

    Raises EvalmodeError at once if that folder cannot be written or the user's code fails, and
    ExportRefused unless all rules pass. Nothing is written then.
    """
    require_writable(root, name=name, version=version)
    module, samples = load_in_eval_mode(factory), load_samples(inputs)
    candidate = candidate_of(module, samples, dynamic_axes=dynamic_axes)
    # The known answers: one row each, if the inputs have rows.
    known_inputs: list[Tensors] = []
    for single_rows in candidate.evidence.rows.values():
        known_inputs += single_rows
    if not known_inputs:
        known_inputs += candidate.evidence.probes
    description = Description(
        samples=[(sample, None) for sample in known_inputs[:_KNOWN_ANSWERS]],
        provenance={"module": factory, "inputs": inputs, "left out": list(candidate.left_out)},
    )
    with exported_elsewhere(candidate, factory) as twin:
        return release(
            dataclasses.replace(candidate, twins=(twin,)),
            description,
            root=root,
            name=name,
            version=version,
            progress=progress,
        )
