"""The report as workflow commands of GitHub Actions, which show each finding beside its file.

GitHub shows them in the summary of a run and in a pull request: at most ten errors, ten warnings
and ten notices for each step. The log has the others too.
"""

from __future__ import annotations

from pathlib import Path

from evalmode.bundle.certificate import Severity
from evalmode.export.report.report import Report, findings_in, plain, relative, sentence

_COMMANDS = {Severity.ERROR: "error", Severity.UNPROVEN: "warning", Severity.WARNING: "notice"}


def render(report: Report) -> str:
    """A command for each unreadable file and for each finding. The counts are a line of the log."""
    lines = [
        _command("error", file.path, "unreadable", plain(file.why)) for file in report.unreadable
    ]
    for verified in report.verified:
        for record, finding in findings_in(verified):
            name = _COMMANDS[finding.severity]
            lines.append(_command(name, verified.file, record.rule, sentence(finding)))
        for statement, finding in report.broken_statements(verified):
            lines.append(_command("error", verified.file, statement.name, sentence(finding)))
    lines.append(report.summary)
    return "".join(f"{line}\n" for line in lines)


def _command(name: str, path: Path, title: str, message: str) -> str:
    file = _escape_property(plain(relative(path).as_posix()))
    title = _escape_property(f"evalmode: {title}")
    return f"::{name} file={file},line=1,title={title}::{_escape(message)}"


def _escape(text: str) -> str:
    """The escapes of GitHub's own toolkit (actions/toolkit, packages/core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
