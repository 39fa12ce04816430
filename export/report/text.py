"""The report for people: a line a file, a line a finding, the scope, and the counts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.export.report.report import UNREADABLE, Report, findings_of, plain, told, verdict_of
from evalmode.export.verify.verify import Examined, Unreadable, Verified

MANY = 20  # files from which on a file that passes is one line

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.UNPROVEN: "yellow",
    UNREADABLE: "bold red",
    Severity.ERROR: "red",
    Severity.UNPROVEN: "yellow",
    Severity.WARNING: "cyan",
}


def render(report: Report) -> str:
    """The report without colours, with the reason why a file is unreadable."""
    return "".join(f"{line.plain}\n" for line in lines(report, reasons=True))


def lines(report: Report, *, reasons: bool) -> Iterator[Text]:
    """The report line by line; `reasons` says why a file is unreadable, where nobody said so
    before.
    """
    for one in report.examined:
        yield _word(verdict_of(one), 10) + Text(f"  {plain(str(one.path))}", style="bold")
        yield from _below(one, brief=len(report.examined) >= MANY, reasons=reasons)
    for title, rules in report.scope.items():
        yield Text(plain(f"{title}: {', '.join(rules)}"), style="dim")
    yield Text(report.summary, style="bold")


def _below(one: Examined, *, brief: bool, reasons: bool) -> Iterator[Text]:
    if isinstance(one, Unreadable):
        if reasons:
            yield Text(f"  {plain(one.why)}")
        return
    if not any(record.verdict is not Verdict.NOT_APPLICABLE for record in one.all_records):
        yield _word("  unproven", 10, of=Verdict.UNPROVEN) + Text("  no rule was checked")
    for record in one.all_records:
        if record.verdict is Verdict.PASS and not brief:
            yield _word("  pass", 10, of=Verdict.PASS) + Text(
                f"  {record.rule}  {_passed(record, one)}"
            )
        for finding in findings_of(record):
            yield _word(f"  {finding.severity}", 10, of=finding.severity) + Text(
                f"  {record.rule}  {told(finding)}"
            )


def _passed(record: Record, one: Verified) -> str:
    measured = f" ({record.measured})" if record.measured else ""
    return plain(f"{record.why}{measured}{', at export' if record in one.certified else ''}")


def _word(word: str, width: int, *, of: str = "") -> Text:
    return Text(f"{word:<{width}}", style=_COLOURS.get(of or word, ""))
