"""The report as workflow commands: GitHub shows each finding beside its file, in a run's summary
and in a pull request.

GitHub shows ten annotations of a kind for each step; the log holds the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evalmode.bundle.certificate import Severity
from evalmode.export.report.report import Report, places, plain, relative, told

_COMMANDS = {Severity.ERROR: "error", Severity.UNPROVEN: "warning", Severity.WARNING: "notice"}


def render(report: Report) -> str:
    """A command a finding, one for each unreadable file, and the counts as a line of the log."""
    return "".join(f"{line}\n" for line in (*_commands(report), report.summary))


def _commands(report: Report) -> Iterator[str]:
    for one in report.unreadable:
        yield _command("error", one.path, "unreadable", plain(one.why))
    for file in report.verified:
        for record, finding in places(file):
            yield _command(_COMMANDS[finding.severity], file.file, record.rule, told(finding))


def _command(name: str, path: Path, title: str, message: str) -> str:
    file = _property(plain(relative(path).as_posix()))
    return f"::{name} file={file},line=1,title={_property(f'evalmode: {title}')}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
