"""The bundle of anyone's module: by reference, with sample inputs, and held against an export in
another process.

Knows no rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from evalmode.export.inputs.candidate import Candidate
from evalmode.export.inputs.references import load_in_eval_mode, load_samples
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.release import Description, Released, release, require_writable
from evalmode.export.rules.registry import Progress
from evalmode.export.second_export import exported_elsewhere

_KNOWN_ANSWERS = 8


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
    """Export, certify and write the module of `package.module:factory` in eval mode as
    `root/name/version`.

    Raises EvalmodeError at once for a name, a version or a root that no bundle can be written to
    and for code of the user's that fails, and ExportRefused, having written nothing, unless all
    rules pass.
    """
    require_writable(root, name=name, version=version)
    module, samples = load_in_eval_mode(factory), load_samples(inputs)
    candidate = candidate_of(module, samples, dynamic_axes=dynamic_axes)
    with exported_elsewhere(candidate, factory) as twin:
        return release(
            dataclasses.replace(candidate, twins=(twin,)),
            _description(candidate, factory=factory, inputs=inputs),
            root=root,
            name=name,
            version=version,
            progress=progress,
        )


def _description(candidate: Candidate, *, factory: str, inputs: str) -> Description:
    rows = [row for single in candidate.evidence.rows.values() for row in single]
    return Description(
        samples=[(row, None) for row in (rows or candidate.evidence.probes)[:_KNOWN_ANSWERS]],
        provenance={"module": factory, "inputs": inputs, "left out": list(candidate.left_out)},
    )
