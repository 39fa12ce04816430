"""The report for people: a line for each file and each finding, the scope, and the counts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.export.report.report import (
    UNREADABLE,
    Report,
    findings_of,
    plain,
    sentence,
    verdict_of,
)
from evalmode.export.verify.verify import Unreadable

# A report on so many files or more does not list the rules that passed: a line for each of them
# would hide the findings.
MANY = 20

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
    """The report line by line.

    Without `reasons` it does not say why a file is unreadable, for a caller that prints the reason
    itself.
    """
    is_brief = len(report.examined) >= MANY
    for file in report.examined:
        verdict = verdict_of(file)
        yield _cell(verdict, verdict) + Text(f"  {plain(str(file.path))}", style="bold")
        if isinstance(file, Unreadable):
            if reasons:
                yield Text(f"  {plain(file.why)}")
            continue

        # The lines below the file's own: its passed rules and its findings.
        if all(record.verdict is Verdict.NOT_APPLICABLE for record in file.all_records):
            yield _cell("  unproven", Verdict.UNPROVEN) + Text("  no rule was checked")
        for record in file.all_records:
            if record.verdict is Verdict.PASS and not is_brief:
                why = record.why
                if record.measured:
                    why = f"{why} ({record.measured})"
                if record in file.certified:
                    why = f"{why}, at export"
                yield _cell("  pass", Verdict.PASS) + Text(f"  {record.rule}  {plain(why)}")
            for finding in findings_of(record):
                yield _cell(f"  {finding.severity}", finding.severity) + Text(
                    f"  {record.rule}  {sentence(finding)}"
                )

        if not is_brief or report.require_exact:
            for statement in file.statements:
                why = statement.why
                if statement.holds and statement.measured:
                    why = f"{why} ({statement.measured})"
                is_bad = report.require_exact and not statement.holds
                kind = Severity.ERROR if is_bad else ""
                word = "  error" if is_bad else "  note"
                yield _cell(word, kind) + Text(f"  {statement.name}  {plain(why)}")

    for title, rules in report.scope.items():
        yield Text(plain(f"{title}: {', '.join(rules)}"), style="dim")
    yield Text(report.summary, style="bold")


def _cell(word: str, kind: str) -> Text:
    """The first column: a word in the colour of a verdict or a severity."""
    return Text(f"{word:<10}", style=_COLOURS.get(kind, ""))
