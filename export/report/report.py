"""The report that every format renders: verdicts, findings, and the rules that were checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from evalmode.bundle.certificate import Finding, Record, Severity, Statement, Verdict
from evalmode.export.verify.verify import Examined, Unreadable, Verified

UNREADABLE = "unreadable"
EXCLUDED = "excluded"
VERDICTS = (Verdict.PASS, Verdict.FAIL, Verdict.UNPROVEN, UNREADABLE)

_SEVERITIES = {Verdict.FAIL: Severity.ERROR, Verdict.UNPROVEN: Severity.UNPROVEN}


class FailOn(StrEnum):
    """The lowest severity that makes a verification fail."""

    UNPROVEN = "unproven"
    WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results for all files. `fail_on` and `allow_unproven` decide which findings are bad.

    With `require_exact` a statement that does not hold is bad too.
    """

    examined: tuple[Examined, ...]
    fail_on: FailOn = FailOn.UNPROVEN
    allow_unproven: bool = False
    require_exact: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """How many files have each of VERDICTS."""
        counts = Counter(verdict_of(file) for file in self.examined)
        return {str(verdict): counts[verdict] for verdict in VERDICTS}

    @property
    def summary(self) -> str:
        """The counts as one line: "2 files: 1 pass, 1 fail, 0 unproven, 0 unreadable"."""
        noun = "file" if len(self.examined) == 1 else "files"
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        return f"{len(self.examined)} {noun}: {counts}"

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """The files that could not be examined."""
        return tuple(file for file in self.examined if isinstance(file, Unreadable))

    @property
    def verified(self) -> tuple[Verified, ...]:
        """The files that were examined."""
        return tuple(file for file in self.examined if isinstance(file, Verified))

    @property
    def holds(self) -> bool:
        """Whether no file that was examined has a bad finding."""
        for file in self.verified:
            # If no rule applied to a file, it is unproven without any finding.
            severity = _SEVERITIES.get(file.verdict)
            if severity is not None and self.is_bad(severity):
                return False
            if any(self.is_bad(finding.severity) for _, finding in findings_in(file)):
                return False
            if any(True for _ in self.broken_statements(file)):
                return False
        return True

    def broken_statements(self, file: Verified) -> Iterator[tuple[Statement, Finding]]:
        """The statements that the user requires and that do not hold, each as an error."""
        if not self.require_exact:
            return
        for statement in file.statements:
            if not statement.holds:
                reason = statement.reasons[0]
                yield (
                    statement,
                    Finding(
                        severity=Severity.ERROR, node=reason.node, op=reason.op, why=reason.why
                    ),
                )

    def is_bad(self, severity: Severity) -> bool:
        """Whether a finding of this severity makes the verification fail."""
        if severity is Severity.UNPROVEN:
            return not self.allow_unproven
        return severity is Severity.ERROR or self.fail_on is FailOn.WARNING

    @property
    def scope(self) -> dict[str, list[str]]:
        """The rules of all files, by how each was checked, or why it was not."""
        rules: dict[str, dict[str, None]] = {  # ordered sets of names
            "checked now": {},
            "checked at export, by the certificate": {},
            EXCLUDED: {},
        }
        for file in self.verified:
            for record in file.records:
                title = "checked now"
                if record.verdict is Verdict.NOT_APPLICABLE:
                    title = f"not applicable, since {record.why}"
                rules.setdefault(title, {})[record.rule] = None
            for record in file.certified:
                rules["checked at export, by the certificate"][record.rule] = None
            for name in file.excluded:
                rules[EXCLUDED][name] = None
        return {title: list(names) for title, names in rules.items() if names}


def verdict_of(file: Examined) -> str:
    """One of VERDICTS."""
    return UNREADABLE if isinstance(file, Unreadable) else file.verdict


def findings_of(record: Record) -> tuple[Finding, ...]:
    """The record's findings; if it failed without any, one finding about the whole file."""
    severity = _SEVERITIES.get(record.verdict)
    if record.findings or severity is None:
        return record.findings
    why = record.why
    if record.measured and record.limit:
        why = f"{why} ({record.measured}; the limit is {record.limit})"
    return (Finding(severity=severity, why=why),)


def findings_in(file: Verified) -> Iterator[tuple[Record, Finding]]:
    """Each finding of a file, after its record."""
    for record in file.all_records:
        for finding in findings_of(record):
            yield record, finding


def sentence(finding: Finding) -> str:
    """A finding as one or two sentences: the node and the reason, and what to do about it."""
    text = str(finding).strip().rstrip(".")
    if finding.fix:
        text = f"{text}. What to do: {finding.fix.rstrip('.')}"
    return plain(f"{text}.")


def plain(text: str) -> str:
    """The text with its invisible characters escaped.

    Names come from files, and may contain control sequences for a terminal.
    """
    if text.isprintable():
        return text
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def relative(path: Path) -> Path:
    """The path relative to the working directory, or the absolute path if it is not inside."""
    # Not resolve(): a symbolic link keeps the name that it has in the repository.
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
