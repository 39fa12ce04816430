"""Networks whose forward changes them: each step of the audit starts from the original."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind

X = {"x": torch.ones(8, 16)}


class Unscaled(nn.Module):
    """A dropout that forgot to divide by the keep rate."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > self.p) if self.training else x


class Rebuild(nn.Module):
    """Replaces its dropout after every training step, as schedules of the rate do."""

    def __init__(self, make: Callable[[], nn.Module], *, lock: bool = False) -> None:
        super().__init__()
        self.linear, self.drop, self.make = nn.Linear(16, 16), make(), make
        if lock:  # what cannot be copied is audited itself
            self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.linear(x))
        if self.training:
            self.drop = self.make()
        return y


class Iterated(nn.Module):
    """The forward uses up an iterator, so that it runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.steps = nn.Dropout(0.5), iter((1.0,))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) * next(self.steps)


@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize(
    ("make", "kind", "verdict"),
    [
        (lambda: Unscaled(0.4), Kind.UNSCALED, Verdict.FAIL),
        (lambda: nn.Dropout(0.4), Kind.INVERTED, Verdict.PASS),
    ],
)
def test_a_dropout_that_is_exchanged_while_training_is_judged(
    make: Callable[[], nn.Module], kind: Kind, verdict: Verdict, lock: bool
) -> None:
    result = audit(Rebuild(make, lock=lock), [X])
    assert [(site.path, site.kind) for site in result.sites] == [("drop", kind)]
    assert result.record.verdict is verdict


def test_a_forward_that_runs_once_is_judged() -> None:
    result = audit(Iterated(), [X])
    assert [(site.path, site.kind) for site in result.sites] == [("drop", Kind.INVERTED)]
