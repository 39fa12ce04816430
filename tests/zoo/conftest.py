"""The table of the zoo's verdicts, printed at the end of `make zoo`."""

from __future__ import annotations

import pytest

_REASON = 90  # characters of a reason that fit beside the other columns


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.markexpr:  # a part of the zoo needs no table
        return
    rows = [
        (dict(report.user_properties), report.duration)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "zoo" in dict(report.user_properties)
    ]
    if not rows:
        return
    terminalreporter.section("zoo")
    for properties, seconds in sorted(rows, key=lambda row: (row[0]["family"], row[0]["zoo"])):
        terminalreporter.write_line(
            f"{properties['family']:17} {properties['zoo']:24} {properties['verdict']:20}"
            f" {seconds:6.1f} s  {' '.join(properties['reason'].split())[:_REASON]}"
        )
