"""The report as SARIF 2.1.0, for GitHub code scanning.

GitHub identifies an alert by its `primaryLocationLineHash`. Without one it would compute the hash
from the first line of a binary file, so it is set here. GitHub shows only files of the repository,
so paths are relative to the working directory. It shows the 5,000 most severe results of a run.
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
from evalmode.bundle.certificate import Severity
from evalmode.export.report.report import (
    EXCLUDED,
    Report,
    findings_in,
    plain,
    relative,
    sentence,
)
from evalmode.export.rules.registry import RULES

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.UNPROVEN: "warning", Severity.WARNING: "note"}


def render(report: Report) -> str:
    """One log with one run.

    A file that could not be examined is a notification: it is the result of no rule.
    """
    notifications = [
        {
            "level": "error",
            "message": {"text": plain(file.why)},
            "locations": [{"physicalLocation": _physical_location(file.path)}],
        }
        for file in report.unreadable
    ]
    overrides = [
        {"descriptor": {"id": name}, "configuration": {"enabled": False}}
        for name in report.scope.get(EXCLUDED, ())
    ]
    rules = []
    for rule in RULES:
        statement = f"{rule.statement[:1].upper()}{rule.statement[1:]}."
        help_text = (
            f"The rule holds if {rule.statement}. It needs {rule.needs}. Each result says what to"
            " do."
        )
        rules.append(
            {
                "id": rule.name,
                "shortDescription": {"text": statement},
                "fullDescription": {"text": statement},
                "help": {"text": help_text},
                "defaultConfiguration": {"level": "error"},
            }
        )
    run = {
        "tool": {
            "driver": {
                "name": "evalmode",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": rules,
            }
        },
        "invocations": [
            {
                "executionSuccessful": not notifications,
                "toolExecutionNotifications": notifications,
                "ruleConfigurationOverrides": overrides,
                "properties": {"scope": report.scope},
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": _results(report),
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, ensure_ascii=False, indent=2) + "\n"


def _results(report: Report) -> list[dict[str, Any]]:
    rule_indices = {rule.name: index for index, rule in enumerate(RULES)}
    fingerprints = Counter[str]()
    results = []
    for file in report.verified:
        pairs = [(record.rule, finding) for record, finding in findings_in(file)]
        pairs += [(item.name, finding) for item, finding in report.broken_statements(file)]
        for rule, finding in pairs:
            location: dict[str, Any] = {"physicalLocation": _physical_location(file.file)}
            if finding.node:
                location["logicalLocations"] = [{"fullyQualifiedName": plain(finding.node)}]
            result: dict[str, Any] = {
                "ruleId": rule,
                "level": _LEVELS[finding.severity],
                "message": {"text": sentence(finding)},
                "locations": [location],
            }
            # A certificate may come from a version with other rules, and statements are no rules.
            if rule in rule_indices:
                result["ruleIndex"] = rule_indices[rule]
            # The hash of a finding must be the same in each run. Equal findings get a number, as in
            # GitHub's own fingerprints.
            identity = "\0".join((rule, _uri(file.file), finding.node, finding.op, finding.why))
            digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace"))
            fingerprint = digest.hexdigest()[:16]
            fingerprints[fingerprint] += 1
            result["partialFingerprints"] = {
                "primaryLocationLineHash": f"{fingerprint}:{fingerprints[fingerprint]}"
            }
            results.append(result)
    return results


def _physical_location(path: Path) -> dict[str, Any]:
    # A binary file has no lines, but GitHub shows no result without a line.
    return {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": 1}}


def _uri(path: Path) -> str:
    short = relative(path)
    return short.as_uri() if short.is_absolute() else quote(os.fsencode(short.as_posix()))
