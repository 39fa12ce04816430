"""Assertions for a project's tests. Each raises AssertionError with the findings and their sites.

from evalmode.testing import assert_export_is_clean, assert_no_expectation_gap

def test_the_export_is_deterministic():
    assert_export_is_clean(make_model().eval(), torch.randn(4, 16))

def test_eval_mode_answers_what_training_taught():
    assert_no_expectation_gap(make_model(), torch.randn(4, 16))
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Assert that `module`, exported in memory as `evalmode export` does, passes every rule.

    `inputs` is a sample (a mapping of input names, a tuple or a tensor), or a list of several whose
    sizes show which axes vary. `dynamic_axes` names these instead: "ids=batch,length". The module
    is not put into eval mode: one in training mode is a finding. Raises EvalmodeError for a module
    that cannot be exported at all.
    """
    with own_forward(module), untouched(Network.of(module)):
        certified = certify(
            candidate_of(module, _as_list(inputs), dynamic_axes=dynamic_axes), progress=_silent
        )
    failing = {Verdict.FAIL} if allow_unproven else {Verdict.FAIL, Verdict.UNPROVEN}
    _raise_for([record for record in certified.records if record.verdict in failing])


def assert_no_expectation_gap(
    module: nn.Module, inputs: object, *, draws: int | None = None, alpha: float = 0.01
) -> None:
    """Assert that eval mode computes what training computes on average, at every random site.

    `draws` is the number of training forwards per site; None takes as many as find the smallest gap
    that matters. `alpha` bounds the probability of a false alarm over all sites together. The
    module is left as it was.
    """
    with own_forward(module), untouched(Network.of(module)):
        samples, _ = bind_samples(module, _as_list(inputs))
        result = audit(module, samples, draws=draws, alpha=alpha, progress=_silent)
    if result.record.verdict in (Verdict.FAIL, Verdict.UNPROVEN):
        _raise_for([result.record])


def _raise_for(records: Sequence[Record]) -> None:
    """Raise AssertionError unless `records` is empty, with each finding and its remedy."""
    lines = []
    for record in records:
        lines.append(f"{record.rule}: {record.verdict}: {record.why}")
        for finding in record.findings:
            if finding.severity is Severity.WARNING:
                continue
            lines.append(f"  {finding}")
            if finding.fix:
                lines.append(f"    -> {finding.fix}")
    if lines:
        raise AssertionError("\n".join(lines))


def _as_list(inputs: object) -> list[object]:
    return inputs if isinstance(inputs, list) else [inputs]


def _silent(_step: str) -> None:
    pass
