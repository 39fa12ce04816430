"""The report as JUnit XML, which CI systems show: a suite for each file, a case for each rule.

The outcome of a case:

1. A finding that makes the command fail is a failure. This includes an unproven rule.
2. A rule that is not applicable, excluded, or unproven where that is allowed, is skipped.
3. Any other rule passed; its findings (warnings) are the output of the case.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from evalmode.bundle.certificate import Verdict
from evalmode.export.report.report import EXCLUDED, UNREADABLE, Report, findings_of, plain, sentence
from evalmode.export.verify.verify import Examined, Unreadable

# The elements that a case may hold. For each, a suite has an attribute with their number.
_COUNTS = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def render(report: Report) -> str:
    """One XML document."""
    root = Xml.Element("testsuites", name="evalmode verify")
    for file in report.examined:
        root.append(_suite(report, file))
    _count(root)
    Xml.indent(root)
    # `plain` has escaped all characters that XML forbids, and text that UTF-8 cannot encode.
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{Xml.tostring(root, encoding="unicode")}\n'


def _suite(report: Report, file: Examined) -> Xml.Element:
    """The suite of one file; the module's docstring has the order of a rule's outcomes."""
    path = plain(str(file.path))
    suite = Xml.Element("testsuite", name=path)

    def add_case(name: str) -> Xml.Element:
        return Xml.SubElement(suite, "testcase", classname=path, name=plain(name))

    if isinstance(file, Unreadable):
        error = Xml.SubElement(add_case("readable"), "error", message=plain(file.why))
        error.set("type", UNREADABLE)
    else:
        for record in file.all_records:
            case = add_case(record.rule)
            findings = findings_of(record)
            text = "\n".join(f"{finding.severity}: {sentence(finding)}" for finding in findings)
            bad = [finding.severity for finding in findings if report.is_bad(finding.severity)]
            if bad:
                failure = Xml.SubElement(case, "failure", message=plain(record.why))
                failure.set("type", min(bad))  # "error" sorts before "unproven" and "warning"
                failure.text = text
                continue
            if record.verdict in (Verdict.NOT_APPLICABLE, Verdict.UNPROVEN):
                Xml.SubElement(case, "skipped", message=plain(f"{record.verdict}: {record.why}"))
                if text:
                    text += "\n"
            if text:
                Xml.SubElement(case, "system-out").text = text
        for statement, finding in report.broken_statements(file):
            failure = Xml.SubElement(
                add_case(statement.name), "failure", message=plain(statement.why)
            )
            failure.set("type", finding.severity)
            failure.text = f"{finding.severity}: {sentence(finding)}"
        for rule in file.excluded:
            Xml.SubElement(add_case(rule), "skipped", message=EXCLUDED)
    _count(suite)
    return suite


def _count(element: Xml.Element) -> None:
    """Set the attributes of an element that count the cases and their outcomes in it."""
    element.set("tests", str(sum(1 for _ in element.iter("testcase"))))
    for name, attribute in _COUNTS.items():
        element.set(attribute, str(sum(1 for _ in element.iter(name))))
