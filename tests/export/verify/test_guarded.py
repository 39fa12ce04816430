"""A file on which the runtime crashes, hangs or takes memory affects only its own verdict."""

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
ONE_SECOND = Options(samples=(), limits=Limits(time_s=1))
SMALL_MEMORY = Options(samples=(), limits=Limits(memory_mib=900))
GENERATED = Options(samples=())


def records_of(path: Path, options: Options = GENERATED) -> dict[str, Record]:
    return {record.rule: record for record in verify(path, options).records}


@pytest.mark.parametrize("breaks", [aborts, violates_memory])
def test_a_file_that_crashes_the_runtime_is_unproven_by_the_rules_that_run_it(
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
        (hangs, ONE_SECOND, "took longer than 1 s", "--time-limit"),
        (
            lambda path: takes_memory(path, 6 << 30),
            SMALL_MEMORY,
            "took more than 900 MiB of memory",
            "--memory-limit",
        ),
    ],
    ids=["time", "memory"],
)
def test_an_exceeded_limit_is_named_with_the_flag_that_raises_it(
    path: Callable[[Path], Path], options: Options, limit: str, flag: str, tmp_path: Path
) -> None:
    records = records_of(path(tmp_path / "any.onnx"), options)
    for name in RUNNING:
        assert records[name].verdict is Verdict.UNPROVEN
        assert limit in records[name].findings[0].why
        assert f"raise {flag}" in records[name].findings[0].fix
    assert records["stochastic-op"].verdict is Verdict.PASS


def test_files_beside_one_that_crashes_the_runtime_are_verified(tmp_path: Path) -> None:
    for name in ("a", "c", "e"):
        quiet(tmp_path / f"{name}.onnx")
    aborts(tmp_path / "b.onnx")
    hangs(tmp_path / "d.onnx")
    examined = examine_all(find_targets([tmp_path]), ONE_SECOND)
    verdicts = [answer.verdict for answer in examined if isinstance(answer, Verified)]
    passed, failed, unproven = Verdict.PASS, Verdict.FAIL, Verdict.UNPROVEN
    assert verdicts == [passed, failed, passed, unproven, passed]


def test_a_file_that_ends_a_used_child_is_run_again_in_a_new_child(tmp_path: Path) -> None:
    """An earlier file may have damaged the child."""
    path = quiet(tmp_path / "quiet.onnx")
    assert verify(path, GENERATED).verdict is Verdict.PASS
    process = guarded._runner.child._process
    assert process is not None
    assert verify(aborts(tmp_path / "aborts.onnx"), GENERATED).verdict is Verdict.FAIL
    assert guarded._runner.child._process is not process
    assert verify(path, GENERATED).verdict is Verdict.PASS


def test_a_nan_weight_is_reported_for_a_file_that_cannot_run(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("limits", [{"time_s": 0}, {"time_s": float("nan")}, {"memory_mib": -1}])
def test_invalid_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(EvalmodeError, match="_limit must be"):
        Limits(**limits)  # type: ignore[arg-type]


def test_the_known_answers_of_a_bundle_are_run_within_the_limits(released: Released) -> None:
    assert verify(released.path).verdict is Verdict.PASS
    one_mib = Options(limits=Limits(memory_mib=1))
    guarded._runner.child.close()
    records = {record.rule: record for record in verify(released.path, one_mib).records}
    assert records["known-answers"].verdict is Verdict.UNPROVEN
    assert "took more than 1 MiB" in records["known-answers"].findings[0].why
    assert records["training-mode"].verdict is Verdict.PASS


USER_CODE = """
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


def test_the_users_module_and_samples_are_loaded_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_of_guarded.py").write_text(USER_CODE)
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
