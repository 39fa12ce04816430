"""The rule expectation-gap: the record of an audit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.audit.audit import audit
from evalmode.export.rules import expectation_gap
from evalmode.export.rules.registry import check_all
from evalmode.export.rules.subject import Subject


class Unscaled(nn.Module):
    """A dropout that forgot to divide by the keep rate."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= 0.5) if self.training else x


@pytest.mark.parametrize(
    ("module", "verdict"), [(nn.Dropout(0.5), Verdict.PASS), (Unscaled(), Verdict.FAIL)]
)
def test_the_record_is_that_of_the_audit(module: nn.Module, verdict: Verdict) -> None:
    subject = Subject(audit=audit(module, [{"input" if verdict is Verdict.PASS else "x": X}]))
    record = expectation_gap.check(subject)
    assert record.verdict is verdict
    assert len(record.sites) == 1
    assert check_all(subject) == (record,)


X = torch.ones(4, 64)
