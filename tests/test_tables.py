"""What files and users say is printed as they say it."""

from __future__ import annotations

from rich.console import Console, RenderableType

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.tables import metrics_table, pairs_table, predictions_table, records_table

MARKUP = ("x[/a]", "[red]", "[link=x]", "[")


def shown(table: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def record(*findings: Finding) -> Record:
    return Record.of("any-rule", findings, fine="all is well", otherwise="the reason")


def finding(node: str, fix: str = "", severity: Severity = Severity.ERROR) -> Finding:
    return Finding(severity=severity, node=node, op="Op-1", why="it is so", fix=fix)


def test_what_looks_like_markup_is_text_in_every_table() -> None:
    for text in MARKUP:
        found = Finding(severity=Severity.ERROR, node=text, why=text, fix=text)
        whole = Record.of(text, [found], fine="", otherwise=text, measured=text, limit=text)
        assert shown(records_table([whole], title=text)).count(text) == 8, text
        assert shown(metrics_table({text: {text: text}, "one": text})).count(text) == 4, text
        assert shown(predictions_table([text], [[(text, 1.0), (text, 0.0)]])).count(text) == 3, text
        assert shown(pairs_table({text: text}, title="any")).count(text) == 2, text


def test_a_rule_that_passed_takes_one_line_and_another_gives_its_reason_and_places() -> None:
    passed = shown(records_table([record()], title=""))
    assert "the reason" not in passed
    assert "all is well" not in passed
    for severity, verdict in (
        (Severity.ERROR, Verdict.FAIL),
        (Severity.UNPROVEN, Verdict.UNPROVEN),
    ):
        places = [finding(node, severity=severity) for node in ("one", "two")]
        found = shown(records_table([record(*places)], title=""))
        assert all(
            part in found
            for part in (verdict, "the reason", "one (Op-1): it is so", "two (Op-1): it is so")
        )


def test_what_to_do_stands_once_below_all_the_places_that_it_mends() -> None:
    fixes = ("mend it", "mend it", "change it", "mend it")
    lines = shown(
        records_table([record(*[finding(f"node {fix}", fix) for fix in fixes])], title="")
    ).splitlines()
    said = [line.split("│")[3].strip() for line in lines if line.count("│") == 5]
    assert said[-2:] == ["mend it", "change it"]
    assert sum(line == "mend it" for line in said) == 1


def test_a_warning_is_shown_although_its_rule_passes() -> None:
    found = shown(records_table([record(finding("mask", severity=Severity.WARNING))], title=""))
    assert "mask (Op-1): it is so" in found
    assert "the reason" not in found
