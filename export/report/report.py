"""What every format tells: the files, their verdicts and findings, the scope of the rules, and what
counts as bad.

Knows no format.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.export.verify.verify import Examined, Unreadable, Verified

UNREADABLE = "unreadable"
EXCLUDED = "excluded"
VERDICTS = (Verdict.PASS, Verdict.FAIL, Verdict.UNPROVEN, UNREADABLE)

_SEVERITIES = {Verdict.FAIL: Severity.ERROR, Verdict.UNPROVEN: Severity.UNPROVEN}


class FailOn(StrEnum):
    """The least that makes a verification fail."""

    UNPROVEN = "unproven"
    WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in every file, and what its reader wants to be told is bad."""

    examined: tuple[Examined, ...]
    fail_on: FailOn = FailOn.UNPROVEN
    allow_unproven: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """How many files came to each of VERDICTS."""
        found = Counter(verdict_of(one) for one in self.examined)
        return {str(verdict): found[verdict] for verdict in VERDICTS}

    @property
    def summary(self) -> str:
        """The counts as one line."""
        files = f"{len(self.examined)} file{'' if len(self.examined) == 1 else 's'}"
        return (
            f"{files}: {', '.join(f'{count} {verdict}' for verdict, count in self.counts.items())}"
        )

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """The files that could not be examined."""
        return tuple(one for one in self.examined if isinstance(one, Unreadable))

    @property
    def verified(self) -> tuple[Verified, ...]:
        """The files that could."""
        return tuple(one for one in self.examined if isinstance(one, Verified))

    @property
    def holds(self) -> bool:
        """Whether nothing bad was found in the files that could be examined."""
        return all(self._tolerates(one) for one in self.verified)

    def is_bad(self, severity: Severity) -> bool:
        """Whether a finding of this severity makes the verification fail."""
        if severity is Severity.UNPROVEN:
            return not self.allow_unproven
        return severity is Severity.ERROR or self.fail_on is FailOn.WARNING

    def _tolerates(self, one: Verified) -> bool:
        # The verdict says more than the findings: a file to which no rule applied is unproven
        # without any.
        if one.verdict is not Verdict.PASS and self.is_bad(_SEVERITIES[one.verdict]):
            return False
        return not any(
            self.is_bad(finding.severity)
            for record in one.all_records
            for finding in findings_of(record)
        )

    @property
    def scope(self) -> dict[str, list[str]]:
        """What the verdicts rest on: the rules that were checked in any file, and how; those that
        were not, and why.
        """
        now = [record for one in self.verified for record in one.records]
        lacking = [record for record in now if record.verdict is Verdict.NOT_APPLICABLE]
        groups = {
            "checked now": [
                record.rule for record in now if record.verdict is not Verdict.NOT_APPLICABLE
            ],
            "checked at export, by the certificate": [
                record.rule for one in self.verified for record in one.certified
            ],
            EXCLUDED: [rule for one in self.verified for rule in one.excluded],
        }
        for record in lacking:
            groups.setdefault(f"not applicable, since {record.why}", []).append(record.rule)
        return {title: [*dict.fromkeys(rules)] for title, rules in groups.items() if rules}


def verdict_of(one: Examined) -> str:
    """One of VERDICTS."""
    return UNREADABLE if isinstance(one, Unreadable) else one.verdict


def findings_of(record: Record) -> tuple[Finding, ...]:
    """The record's findings; one that did not hold and names no place is a finding about the
    whole.
    """
    if record.findings or record.verdict not in _SEVERITIES:
        return record.findings
    against = (
        f" ({record.measured}; the limit is {record.limit})"
        if record.measured and record.limit
        else ""
    )
    return (Finding(severity=_SEVERITIES[record.verdict], why=record.why + against),)


def told(finding: Finding) -> str:
    """A finding as one or two sentences: where and why, and what to do about it."""
    said = f"{finding}".strip().rstrip(".")
    return plain(f"{said}. What to do: {finding.fix.rstrip('.')}." if finding.fix else f"{said}.")


def plain(text: str) -> str:
    """The text with what cannot be seen spelled out: names come from files, and may try to steer a
    terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def relative(path: Path) -> Path:
    """The path from the working directory where it lies below it, else the absolute one."""
    # and not resolve(): a symbolic link stays what its repository calls it
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


def places(one: Verified) -> Iterator[tuple[Record, Finding]]:
    """Every finding of a file, with the record it belongs to."""
    return ((record, finding) for record in one.all_records for finding in findings_of(record))
