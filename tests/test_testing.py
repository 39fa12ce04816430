"""The assertions for users' tests: silent for a clean module, else an error with the remedy."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.export.inputs.errors import UnusableInputs
from evalmode.testing import assert_export_is_clean, assert_no_expectation_gap

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.25), nn.Linear(6, 3))
        self.leak = leak

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.dropout(self.body(x), self.leak) * scale


class Unscaled(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p) if self.training else x


def test_a_clean_module_passes_and_keeps_its_forward() -> None:
    module = Net().eval()
    assert_export_is_clean(module, {"x": X, "scale": 2.0})
    assert "forward" not in vars(module), "the constant that the sample gave is not left behind"
    assert not module.training


def test_a_leak_is_named_with_its_site_and_the_remedy() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_export_is_clean(Net(leak=0.1).eval(), X)
    message = str(caught.value)
    assert "eager-randomness: fail" in message
    assert "p=0.1" in message
    assert "test_testing.py:" in message
    assert "-> pass training=self.training" in message


def test_a_module_in_training_is_a_finding_and_is_not_put_into_eval() -> None:
    module = Net()
    with pytest.raises(AssertionError, match=r"escaped-module: fail(.|\n)*body\.1 \(Dropout\)"):
        assert_export_is_clean(module, X)
    assert module.training


def test_inputs_that_do_not_fit_are_an_error_and_no_finding() -> None:
    with pytest.raises(UnusableInputs, match="fails on the sample"):
        assert_export_is_clean(Net().eval(), X[:, :2])


def test_dropout_that_keeps_the_expected_scale_passes() -> None:
    module = Net()
    assert_no_expectation_gap(module, X)
    assert module.training


def test_a_lost_scale_is_described_by_site_and_factor() -> None:
    module = Net()
    module.body[1] = Unscaled(0.5)
    with pytest.raises(
        AssertionError,
        match=r"body\.1 \(Unscaled\): unscaled: .* times larger in eval than in training",
    ):
        assert_no_expectation_gap(module, [X, X[:2]])


def test_the_generators_and_the_module_are_left_as_they_were() -> None:
    module = Net()
    module.counted = 0

    def counting(part: nn.Module, _inputs: object) -> None:
        part.counted += 1

    module.register_forward_pre_hook(counting)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert_export_is_clean(module.eval(), X)
    assert_no_expectation_gap(module, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert module.counted == 0
    assert not module.training


@pytest.mark.parametrize("call", [assert_export_is_clean, assert_no_expectation_gap])
def test_an_empty_list_of_samples_is_refused(
    call: Callable[[nn.Module, object], None],
) -> None:
    with pytest.raises(UnusableInputs, match="there is no sample"):
        call(Net().eval(), [])
