"""The report as JUnit XML, which every CI system shows: a suite a file, a case a rule.

What is unproven is a failure, since it makes the command fail; where it is allowed, it is a skipped
case that says why.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.report.report import EXCLUDED, UNREADABLE, Report, findings_of, plain, told
from evalmode.export.verify.verify import Examined, Unreadable

_COUNTED = ("failure", "error", "skipped")


def render(report: Report) -> str:
    """One XML document."""
    root = Xml.Element("testsuites", name="evalmode verify")
    for one in report.examined:
        root.append(_suite(report, one))
    _count(root)
    Xml.indent(root)
    # Of the characters that XML forbids, none is left by `plain`; text outside of UTF-8 is spelled
    # out by it, too.
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{Xml.tostring(root, encoding="unicode")}\n'


def _suite(report: Report, one: Examined) -> Xml.Element:
    path = plain(str(one.path))
    suite = Xml.Element("testsuite", name=path)
    if isinstance(one, Unreadable):
        _add(_case(suite, path, "readable"), "error", kind=UNREADABLE, message=plain(one.why))
    else:
        for record in one.all_records:
            _tell(report, record, _case(suite, path, record.rule))
        for rule in one.excluded:
            _add(_case(suite, path, rule), "skipped", message=EXCLUDED)
    _count(suite)
    return suite


def _case(suite: Xml.Element, path: str, name: str) -> Xml.Element:
    return Xml.SubElement(suite, "testcase", classname=path, name=plain(name))


def _tell(report: Report, record: Record, case: Xml.Element) -> None:
    findings = findings_of(record)
    text = "\n".join(f"{finding.severity}: {told(finding)}" for finding in findings)
    bad = [finding.severity for finding in findings if report.is_bad(finding.severity)]
    if bad:
        _add(case, "failure", kind=min(bad), message=plain(record.why), text=text)
    elif record.verdict in (Verdict.NOT_APPLICABLE, Verdict.UNPROVEN):
        _add(case, "skipped", message=plain(f"{record.verdict}: {record.why}"))
        text = text and f"{text}\n"
        _say(case, text)
    else:
        _say(case, text)


def _say(case: Xml.Element, text: str) -> None:
    if text:
        Xml.SubElement(case, "system-out").text = text


def _add(case: Xml.Element, name: str, *, message: str, kind: str = "", text: str = "") -> None:
    child = Xml.SubElement(case, name, {"message": message, **({"type": kind} if kind else {})})
    child.text = text or None


def _count(element: Xml.Element) -> None:
    element.set("tests", str(len([*element.iter("testcase")])))
    for name in _COUNTED:
        plural = {"failure": "failures", "error": "errors"}.get(name, name)
        element.set(plural, str(len([*element.iter(name)])))
