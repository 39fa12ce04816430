"""The report as JSON, for programs: everything that was found, and which rules were looked at."""

from __future__ import annotations

import json
from typing import Any

from evalmode import __version__
from evalmode.bundle.certificate import Record
from evalmode.export.report.report import EXCLUDED, UNREADABLE, Report, places, verdict_of
from evalmode.export.verify.verify import Examined, Unreadable

SCHEMA = 1


def render(report: Report) -> str:
    """One object; its `files` stand in the order of the report."""
    whole = {
        "version": __version__,
        "schema": SCHEMA,
        "summary": {"files": len(report.examined), **report.counts},
        "files": [_file(one) for one in report.examined],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _file(one: Examined) -> dict[str, Any]:
    if isinstance(one, Unreadable):
        nothing: dict[str, Any] = {"findings": [], "rules": [], "certified": []}
        return {"path": str(one.path), "verdict": UNREADABLE, "why": one.why, **nothing}
    return {
        "path": str(one.path),
        "verdict": str(verdict_of(one)),
        "findings": [
            {"rule": record.rule, **finding.model_dump(mode="json")}
            for record, finding in places(one)
        ],
        "rules": [*map(_rule, one.records), *map(_excluded, one.excluded)],
        "certified": [_rule(record) for record in one.certified],
    }


def _rule(record: Record) -> dict[str, str]:
    said = record.model_dump(mode="json")
    return {name: said[name] for name in ("rule", "verdict", "why", "measured", "limit")}


def _excluded(rule: str) -> dict[str, str]:
    return {
        "rule": rule,
        "verdict": EXCLUDED,
        "why": "nobody asked for it",
        "measured": "",
        "limit": "",
    }
