"""The report as JSON, for programs: all findings, and the verdict of each rule."""

from __future__ import annotations

import json
from typing import Any

from evalmode import __version__
from evalmode.bundle.certificate import Record
from evalmode.export.report.report import EXCLUDED, UNREADABLE, Report, findings_in, verdict_of
from evalmode.export.verify.verify import Unreadable

SCHEMA = 1
_RULE_FIELDS = ("rule", "verdict", "why", "measured", "limit")


def render(report: Report) -> str:
    """One object; its `files` are in the order of the report."""
    files: list[dict[str, Any]] = []
    for file in report.examined:
        if isinstance(file, Unreadable):
            files.append(
                {
                    "path": str(file.path),
                    "verdict": UNREADABLE,
                    "why": file.why,
                    "findings": [],
                    "rules": [],
                    "certified": [],
                    "statements": [],
                }
            )
            continue
        excluded = {"verdict": EXCLUDED, "why": "nobody asked for it", "measured": "", "limit": ""}
        rules = [_rule(record) for record in file.records]
        rules += [{"rule": name, **excluded} for name in file.excluded]
        files.append(
            {
                "path": str(file.path),
                "verdict": str(verdict_of(file)),
                "findings": [
                    {"rule": record.rule, **finding.model_dump(mode="json")}
                    for record, finding in findings_in(file)
                ],
                "rules": rules,
                "certified": [_rule(record) for record in file.certified],
                "statements": [item.model_dump(mode="json") for item in file.statements],
            }
        )
    content = {
        "version": __version__,
        "schema": SCHEMA,
        "summary": {"files": len(report.examined), **report.counts},
        "files": files,
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _rule(record: Record) -> dict[str, str]:
    fields = record.model_dump(mode="json")
    return {name: fields[name] for name in _RULE_FIELDS}
