"""The rule escaped-module: modules that `root.eval()` does not reach, or that ignore it."""

from __future__ import annotations

import functools
from collections import deque

import pytest
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.rules import escaped_module
from tests.export.rules.small_graphs import subject_of_module


class HasAttribute(nn.Module):
    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.child = nn.Dropout(0.1)
        setattr(self, name, value)


class PlainObject:
    def __init__(self) -> None:
        self.drop = nn.Dropout(0.5)


class IgnoresEval(nn.Dropout):
    def train(self, mode: bool = True) -> IgnoresEval:
        return super().train(True)


def closure_over(drop: nn.Module) -> object:
    def call(x: Tensor) -> Tensor:
        return drop(x)

    return call


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("_hidden", [nn.Dropout(0.5)], "_hidden[0] (Dropout)"),
        ("queue", deque([nn.Dropout(0.5)]), "queue[0] (Dropout)"),
        ("call", functools.partial(nn.Dropout(0.5)), "call.func (Dropout)"),
        ("call", functools.partial(print, nn.Dropout(0.5)), "call.args[0] (Dropout)"),
        ("call", functools.partial(print, end=nn.Dropout(0.5)), "call.keywords['end'] (Dropout)"),
        ("call", closure_over(nn.Dropout(0.5)), "call.<drop> (Dropout)"),
        ("plain", PlainObject(), "plain.drop (Dropout)"),
        ("other", IgnoresEval(0.5), "other (IgnoresEval)"),
    ],
)
def test_a_module_that_eval_leaves_in_training_is_named(
    name: str, value: object, path: str
) -> None:
    root = nn.Sequential(HasAttribute(name, value)).eval()
    record = escaped_module.check(subject_of_module(root))
    assert record.verdict is Verdict.FAIL
    assert [f"{finding.node} ({finding.op})" for finding in record.findings] == [f"0.{path}"]
    assert record.measured == "1 of 4 modules"


def test_the_root_itself_is_named() -> None:
    (finding,) = escaped_module.check(subject_of_module(nn.Dropout(0.5))).findings
    assert str(finding) == "(root) (Dropout): it is still in training mode"


def test_hidden_modules_that_were_put_into_eval_by_hand_pass() -> None:
    record = escaped_module.check(
        subject_of_module(HasAttribute("_hidden", [nn.Dropout(0.5).eval()]).eval())
    )
    assert record.verdict is Verdict.PASS
    assert record.measured == "0 of 3 modules"
