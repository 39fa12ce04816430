"""The report as SARIF 2.1.0, as GitHub code scanning takes it.

GitHub tells alerts apart by `primaryLocationLineHash`, which it would otherwise make of a binary
file's first line. It shows what lies in the repository only, so paths are relative to the working
directory; and of a run with more than 5,000 results the gravest 5,000.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evalmode import __version__
from evalmode.bundle.certificate import Finding, Severity
from evalmode.export.report.report import EXCLUDED, Report, places, plain, relative, told
from evalmode.export.rules.registry import RULES, Rule

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.UNPROVEN: "warning", Severity.WARNING: "note"}


def render(report: Report) -> str:
    """One log with one run. A file that could not be examined is a notification, since no rule
    looked at it.
    """
    unreadable = [
        {
            "level": "error",
            "message": {"text": plain(one.why)},
            "locations": [{"physicalLocation": _physical(one.path)}],
        }
        for one in report.unreadable
    ]
    run = {
        "tool": {
            "driver": {
                "name": "evalmode",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in RULES],
            }
        },
        "invocations": [
            {
                "executionSuccessful": not unreadable,
                "toolExecutionNotifications": unreadable,
                "ruleConfigurationOverrides": [
                    _switched_off(rule) for rule in report.scope.get(EXCLUDED, ())
                ],
                "properties": {"scope": report.scope},
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": _results(report),
    }
    return (
        json.dumps(
            {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, ensure_ascii=False, indent=2
        )
        + "\n"
    )


def _rule(rule: Rule) -> dict[str, Any]:
    statement = f"{rule.statement[:1].upper()}{rule.statement[1:]}."
    help_text = (
        f"The rule holds when this is so: {rule.statement}. It needs {rule.needs}. Each result says"
        " what to do."
    )
    return {
        "id": rule.name,
        "shortDescription": {"text": statement},
        "fullDescription": {"text": statement},
        "help": {"text": help_text},
        "defaultConfiguration": {"level": "error"},
    }


def _switched_off(rule: str) -> dict[str, Any]:
    return {"descriptor": {"id": rule}, "configuration": {"enabled": False}}


def _results(report: Report) -> list[dict[str, Any]]:
    index = {rule.name: place for place, rule in enumerate(RULES)}
    seen = Counter[str]()
    results = []
    for file in report.verified:
        for record, finding in places(file):
            fingerprint = _fingerprint(record.rule, file.file, finding)
            seen[fingerprint] += 1
            result = _result(record.rule, file.file, finding)
            if record.rule in index:  # a certificate may come from a version with other rules
                result["ruleIndex"] = index[record.rule]
            # Alike findings are told apart by a number, as GitHub's own fingerprints do it.
            result["partialFingerprints"] = {
                "primaryLocationLineHash": f"{fingerprint}:{seen[fingerprint]}"
            }
            results.append(result)
    return results


def _result(rule: str, file: Path, finding: Finding) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": _physical(file)}
    if finding.node:
        location["logicalLocations"] = [{"fullyQualifiedName": plain(finding.node)}]
    message = {"text": told(finding)}
    return {
        "ruleId": rule,
        "level": _LEVELS[finding.severity],
        "message": message,
        "locations": [location],
    }


def _physical(path: Path) -> dict[str, Any]:
    # A binary file has no lines, and GitHub shows no result without one.
    return {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": 1}}


def _uri(path: Path) -> str:
    short = relative(path)
    return short.as_uri() if short.is_absolute() else quote(os.fsencode(short.as_posix()))


def _fingerprint(rule: str, file: Path, finding: Finding) -> str:
    told_apart = "\0".join((rule, _uri(file), finding.node, finding.op, finding.why))
    return hashlib.sha256(told_apart.encode("utf-8", "backslashreplace")).hexdigest()[:16]
