"""A file on which the runtime ends, hangs or takes memory costs its own verdict and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.errors import EvalmodeError
from evalmode.export.release import Released
from evalmode.export.rules.registry import RULES, Needs
from evalmode.export.verify import guarded
from evalmode.export.verify.in_parallel import examine_all
from evalmode.export.verify.options import Limits, Options
from evalmode.export.verify.targets import find_targets
from evalmode.export.verify.verify import Verified, verify

from .unrunnable import aborts, hangs, quiet, takes_memory, violates_memory

RUNNING = [rule.name for rule in RULES if rule.needs is Needs.RUN]
SECOND = Options(samples=(), limits=Limits(time_s=1))
SMALL = Options(samples=(), limits=Limits(memory_mib=900))
MADE = Options(samples=())


def records_of(path: Path, options: Options = MADE) -> dict[str, Record]:
    return {record.rule: record for record in verify(path, options).records}


@pytest.mark.parametrize("breaks", [aborts, violates_memory])
def test_a_file_on_which_the_runtime_ends_is_unproven_by_the_rules_that_run_it(
    breaks: Callable[[Path], Path], tmp_path: Path
) -> None:
    records = records_of(breaks(tmp_path / "any.onnx"))
    assert {records[name].verdict for name in RUNNING} == {Verdict.UNPROVEN}
    why = records["repeatability"].findings[0].why
    assert why.startswith("the rule could not run: the process that runs the file was ended by SIG")
    assert records["training-mode"].verdict is Verdict.PASS
    draws = breaks is aborts
    assert records["stochastic-op"].verdict is (Verdict.FAIL if draws else Verdict.PASS)


@pytest.mark.parametrize(
    ("path", "options", "limit", "flag"),
    [
        (hangs, SECOND, "took longer than 1 s", "--time-limit"),
        (
            lambda path: takes_memory(path, 6 << 30),
            SMALL,
            "took more than 900 MiB of memory",
            "--memory-limit",
        ),
    ],
    ids=["time", "memory"],
)
def test_a_limit_that_is_met_is_named_with_the_flag_that_raises_it(
    path: Callable[[Path], Path], options: Options, limit: str, flag: str, tmp_path: Path
) -> None:
    records = records_of(path(tmp_path / "any.onnx"), options)
    for name in RUNNING:
        assert records[name].verdict is Verdict.UNPROVEN
        assert limit in records[name].findings[0].why
        assert f"raise {flag}" in records[name].findings[0].fix
    assert records["stochastic-op"].verdict is Verdict.PASS


def test_the_files_beside_one_that_ends_the_runtime_are_judged(tmp_path: Path) -> None:
    for name in ("a", "c", "e"):
        quiet(tmp_path / f"{name}.onnx")
    aborts(tmp_path / "b.onnx")
    hangs(tmp_path / "d.onnx")
    found = examine_all(find_targets([tmp_path]), SECOND)
    verdicts = [answer.verdict for answer in found if isinstance(answer, Verified)]
    passed, failed, unproven = Verdict.PASS, Verdict.FAIL, Verdict.UNPROVEN
    assert verdicts == [passed, failed, passed, unproven, passed]


def test_a_file_runs_once_more_in_a_new_child_where_an_older_one_ends(tmp_path: Path) -> None:
    """The damage may be that of a file before."""
    path = quiet(tmp_path / "quiet.onnx")
    assert verify(path, MADE).verdict is Verdict.PASS
    process = guarded._runner.child._process
    assert process is not None
    assert verify(aborts(tmp_path / "aborts.onnx"), MADE).verdict is Verdict.FAIL
    assert guarded._runner.child._process is not process
    assert verify(path, MADE).verdict is Verdict.PASS


def test_a_weight_that_is_no_number_is_told_of_a_file_that_cannot_run(tmp_path: Path) -> None:
    path = aborts(tmp_path / "any.onnx")
    model = onnx.load(path)
    nan = np.asarray([1, np.nan], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(nan, "w"))
    path.write_bytes(model.SerializeToString())
    record = records_of(path)["non-finite"]
    assert record.verdict is Verdict.FAIL
    assert [finding.severity for finding in record.findings] == [
        Severity.UNPROVEN,
        Severity.ERROR,
    ]


@pytest.mark.parametrize("nonsense", [{"time_s": 0}, {"time_s": float("nan")}, {"memory_mib": -1}])
def test_limits_that_are_none_are_refused(nonsense: dict[str, float]) -> None:
    with pytest.raises(EvalmodeError, match="_limit must be"):
        Limits(**nonsense)  # type: ignore[arg-type]


def test_the_known_answers_of_a_bundle_are_run_within_the_limits(released: Released) -> None:
    assert verify(released.path).verdict is Verdict.PASS
    within = Options(limits=Limits(memory_mib=1))
    guarded._runner.child.close()
    found = {record.rule: record for record in verify(released.path, within).records}
    assert found["known-answers"].verdict is Verdict.UNPROVEN
    assert "took more than 1 MiB" in found["known-answers"].findings[0].why
    assert found["training-mode"].verdict is Verdict.PASS


USERS = """
import os
import torch

class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x

class Relu(torch.nn.Module):
    def forward(self, x):
        return x.relu()

def dies():
    os.abort()

ROWS = {"x": torch.ones(2, 3)}
"""


def test_a_module_and_samples_of_the_users_are_loaded_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_of_guarded.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    guarded._runner.child.close()  # the next one starts in this folder
    path, verdicts = quiet(tmp_path / "any.onnx"), {}
    for name in ("Relu", "Double"):
        options = Options(samples="users_of_guarded:ROWS", module=f"users_of_guarded:{name}")
        verdicts[name] = records_of(path, options)["parity"].verdict
    assert verdicts == {"Relu": Verdict.PASS, "Double": Verdict.FAIL}
    with pytest.raises(EvalmodeError, match="users_of_guarded:dies was ended by SIGABRT"):
        guarded.load(Options(samples=(), module="users_of_guarded:dies"))
    guarded._runner.child.close()
