"""The report before any format: counts, scope, verdict and the escaping of hostile names."""

from __future__ import annotations

from pathlib import Path

import pytest

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.export.report import text
from evalmode.export.report.report import FailOn, Report, findings_of, plain, sentence
from evalmode.export.verify.verify import Examined, Unreadable, Verified

TORN = Unreadable(path=Path("torn.onnx"), why="torn.onnx is torn")


def finding(severity: Severity, **fields: str) -> Finding:
    return Finding(
        severity=severity,
        **{"node": "a/b", "op": "Op-1", "why": "it is so", "fix": "mend it", **fields},
    )


def file(*severities: Severity, name: str = "any.onnx") -> Verified:
    """A file with one rule, which has a finding of each of these severities."""
    record = Record.of(
        "any-rule", map(finding, severities), fine="all is well", otherwise="all is not"
    )
    return Verified(path=Path(name), file=Path(name), records=(record,))


def report(*examined: Examined, **options: object) -> Report:
    return Report(examined=examined, **options)  # type: ignore[arg-type]


def text_of(*examined: Examined) -> str:
    return text.render(report(*examined))


@pytest.mark.parametrize(
    ("severity", "fail_on", "allow_unproven", "holds"),
    [
        (Severity.ERROR, FailOn.UNPROVEN, False, False),
        (Severity.ERROR, FailOn.UNPROVEN, True, False),
        (Severity.UNPROVEN, FailOn.UNPROVEN, False, False),
        (Severity.UNPROVEN, FailOn.UNPROVEN, True, True),
        (Severity.UNPROVEN, FailOn.WARNING, False, False),
        (Severity.UNPROVEN, FailOn.WARNING, True, True),
        (Severity.WARNING, FailOn.UNPROVEN, False, True),
        (Severity.WARNING, FailOn.WARNING, False, False),
        (Severity.WARNING, FailOn.WARNING, True, False),
    ],
)
def test_a_report_holds_unless_it_has_a_finding_that_the_options_forbid(
    severity: Severity, fail_on: FailOn, allow_unproven: bool, holds: bool
) -> None:
    options = {"fail_on": fail_on, "allow_unproven": allow_unproven}
    assert report(file(), file(severity), **options).holds is holds
    assert report(file(), **options).holds


def test_a_warning_in_a_certificate_counts_too() -> None:
    bundle = Verified(
        path=Path("b"),
        file=Path("b/model.onnx"),
        records=(),
        certified=file(Severity.WARNING).records,
    )
    assert report(bundle).holds
    assert not report(bundle, fail_on=FailOn.WARNING).holds


def test_a_file_that_no_rule_checked_fails_unless_unproven_is_allowed() -> None:
    unchecked = Verified(
        path=Path("x"),
        file=Path("x"),
        records=(Record.not_applicable("any-rule", "it has no say"),),
    )
    assert not report(unchecked).holds
    assert report(unchecked, allow_unproven=True).holds
    assert "unproven    x\n  unproven  no rule was checked\n" in text_of(unchecked)


def test_files_are_counted_by_verdict() -> None:
    summary_report = report(
        file(), file(Severity.WARNING), file(Severity.UNPROVEN), file(Severity.ERROR), TORN
    )
    assert summary_report.summary == "5 files: 2 pass, 1 fail, 1 unproven, 1 unreadable"
    assert report(file()).summary == "1 file: 1 pass, 0 fail, 0 unproven, 0 unreadable"


def test_a_failed_record_without_findings_becomes_one_finding() -> None:
    failed = Record(
        rule="held-out", verdict=Verdict.FAIL, why="less accurate", measured="3 of 4", limit="4"
    )
    (finding,) = findings_of(failed)
    assert (finding.severity, finding.why) == (
        Severity.ERROR,
        "less accurate (3 of 4; the limit is 4)",
    )
    (open_ended,) = findings_of(
        Record(rule="census", verdict=Verdict.UNPROVEN, why="it does not run")
    )
    assert (open_ended.severity, open_ended.why) == (Severity.UNPROVEN, "it does not run")
    assert findings_of(Record(rule="census", verdict=Verdict.PASS, why="fine")) == ()
    assert findings_of(Record.not_applicable("census", "no module")) == ()


def test_the_scope_names_each_rule_once_by_how_it_was_checked_or_why_it_was_not() -> None:
    checked = Record(rule="a", verdict=Verdict.PASS, why="fine")
    lacking = [Record.not_applicable(rule, "it needs more") for rule in ("b", "c")]
    bare = Verified(path=Path("m"), file=Path("m"), records=(checked, *lacking), excluded=("d",))
    bundle = Verified(
        path=Path("n"), file=Path("n/model.onnx"), records=(checked,), certified=(checked, checked)
    )
    assert report(bare, bare, bundle, TORN).scope == {
        "checked now": ["a"],
        "checked at export, by the certificate": ["a"],
        "excluded": ["d"],
        "not applicable, since it needs more": ["b", "c"],
    }


@pytest.mark.parametrize("is_long", [False, True])
def test_a_passing_file_lists_its_rules_only_in_a_report_of_fewer_than_20_files(
    is_long: bool,
) -> None:
    output = text_of(*[file(name=f"{index}.onnx") for index in range(20 if is_long else 19)])
    assert ("  pass      any-rule  all is well\n" in output) is not is_long
    assert output.count("pass        ") == (20 if is_long else 19)


def test_a_finding_is_one_line_with_severity_rule_node_reason_and_fix() -> None:
    files = [file(severity, name=f"{severity}.onnx") for severity in Severity]
    for more in (0, 20):
        output = text_of(*files, *[file()] * more)
        for severity in Severity:
            assert (
                f"  {severity:<8}  any-rule  a/b (Op-1): it is so. What to do: mend it.\n" in output
            )


def test_the_text_says_why_a_file_is_unreadable_unless_stderr_does() -> None:
    assert "unreadable  torn.onnx\n  torn.onnx is torn\n" in text_of(TORN)
    assert "is torn" not in "".join(line.plain for line in text.lines(report(TORN), reasons=False))


def test_a_finding_without_a_fix_or_a_node_is_a_sentence() -> None:
    assert sentence(finding(Severity.ERROR, node="", fix="")) == "(Op-1): it is so."
    assert sentence(finding(Severity.ERROR, node="", op="", why="it is so.", fix="")) == "it is so."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("été [/red] 日本", "été [/red] 日本"),
        ("a\nb\x1b[2J\x00\x7f", r"a\nb\x1b[2J\x00\x7f"),
        ("\u202eonnx.\ufeff\uffff", r"\u202eonnx.\ufeff\uffff"),
        ("caf\udce9", r"caf\udce9"),
    ],
    ids=["letters", "control", "invisible", "no UTF-8"],
)
def test_invisible_and_control_characters_are_escaped(name: str, expected: str) -> None:
    assert plain(name) == expected
    assert plain(name).encode()
