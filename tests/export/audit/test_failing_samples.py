"""Samples that a forward rejects: in one mode, in both, or some of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import audit
from evalmode.export.inputs.errors import UnusableInputs

X = {"x": torch.randn(32, 8, 16, generator=torch.Generator().manual_seed(0))}


def test_a_forward_that_fails_in_training_mode_is_unproven_and_says_so() -> None:
    result = audit(
        nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2)), [{"input": torch.randn(1, 4)}]
    )
    assert result.record.verdict == "unproven"
    assert "does not run in training mode" in result.record.findings[0].why


@pytest.mark.parametrize(
    "sample", [{"inputs": X["x"]}, {"input": X["x"][:, :, :3]}], ids=["wrong name", "wrong shape"]
)
def test_samples_that_the_module_cannot_take_in_either_mode_are_unusable(
    sample: dict[str, Tensor],
) -> None:
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16))
    with pytest.raises(
        UnusableInputs, match="Sequential fails on every sample, in eval mode too: "
    ) as caught:
        audit(module, [sample, sample])
    assert "\n" not in str(caught.value)
    assert audit(module, [sample, {"input": X["x"]}]).record.verdict == "pass"


class OnlyTrains(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no eval")
        return F.dropout(x, 0.2)


def test_a_forward_that_fails_in_eval_mode_alone_is_unproven() -> None:
    result = audit(OnlyTrains(), [X])
    assert result.record.verdict == "unproven"
    assert "does not run in eval mode" in result.record.findings[0].why


def test_a_sample_that_fails_beside_one_that_runs_is_a_warning() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2))
    result = audit(module, [{"input": torch.randn(1, 4)}, {"input": torch.randn(64, 4)}])
    assert result.record.verdict == "pass"
    assert [finding.severity for finding in result.record.findings] == [Severity.WARNING]
