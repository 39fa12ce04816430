"""Helpers for the tests of your own project: each raises an AssertionError that says what was found
and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.export.audit.audit import audit
from evalmode.export.certify import certify
from evalmode.export.inputs.samples import bind_samples, candidate_of
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import own_forward
from evalmode.export.module.untouched import untouched

__all__ = ["assert_export_is_clean", "assert_no_expectation_gap"]


def assert_export_is_clean(
    module: nn.Module,
    inputs: object,
    *,
    dynamic_axes: Sequence[str] = (),
    allow_unproven: bool = False,
) -> None:
    """Export `module` as `evalmode export` does, in memory, and fail unless every rule that applies
    passes.

    `inputs` is a sample (a mapping of input names, a tuple, a tensor) or a list of several, whose
    sizes show which axes vary; `dynamic_axes` says so otherwise ("ids=batch,length"). Never calls
    `.eval()`: a module in training is a finding. Raises EvalmodeError for what cannot be exported
    at all.
    """
    with own_forward(module), untouched(Network.of(module)):
        certified = certify(
            candidate_of(module, _as_list(inputs), dynamic_axes=dynamic_axes), progress=_silent
        )
    bad = (Verdict.FAIL,) if allow_unproven else (Verdict.FAIL, Verdict.UNPROVEN)
    _raise_for([record for record in certified.records if record.verdict in bad])


def assert_no_expectation_gap(
    module: nn.Module, inputs: object, *, draws: int | None = None, alpha: float = 0.01
) -> None:
    """Audit every site that is random in training, and fail unless eval mode keeps what is expected
    in training.

    `draws` a site are chosen by the size of the smallest gap that matters, unless given; `alpha`
    bounds the probability of a false alarm over all sites together. The module is left as it was.
    """
    with own_forward(module), untouched(Network.of(module)):
        samples, _ = bind_samples(module, _as_list(inputs))
        found = audit(module, samples, draws=draws, alpha=alpha, progress=_silent)
    _raise_for([found.record] if found.record.verdict in (Verdict.FAIL, Verdict.UNPROVEN) else [])


def _raise_for(records: Iterable[Record]) -> None:
    lines = []
    for record in records:
        lines.append(f"{record.rule}: {record.verdict}: {record.why}")
        for finding in record.findings:
            if finding.severity is not Severity.WARNING:
                lines += (
                    [f"  {finding}", f"    -> {finding.fix}"] if finding.fix else [f"  {finding}"]
                )
    if lines:
        raise AssertionError("\n".join(lines))


def _as_list(inputs: object) -> list[object]:
    return inputs if isinstance(inputs, list) else [inputs]


def _silent(_step: str) -> None:
    pass
