"""What files and users say is printed as they say it."""

from __future__ import annotations

from rich.console import Console, RenderableType

from evalmode.bundle.certificate import Record, Verdict
from evalmode.tables import metrics_table, pairs_table, predictions_table, records_table

MARKUP = ("x[/a]", "[red]", "[link=x]", "[")


def shown(table: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_what_looks_like_markup_is_text_in_every_table() -> None:
    for text in MARKUP:
        record = Record(rule=text, verdict=Verdict.FAIL, why=text, measured=text, limit=text, where=(text,))
        assert shown(records_table([record], title=text)).count(text) == 6, text
        assert shown(metrics_table({text: {text: text}, "one": text})).count(text) == 4, text
        assert shown(predictions_table([text], [[(text, 1.0), (text, 0.0)]])).count(text) == 3, text
        assert shown(pairs_table({text: text}, title="any")).count(text) == 2, text


def test_a_rule_that_passed_takes_one_line_and_one_that_did_not_gives_its_reason_and_its_places() -> None:
    places = {"rule": "any-rule", "why": "the reason", "where": ("place one", "place two")}
    passed = shown(records_table([Record(verdict=Verdict.PASS, **places)], title=""))
    assert "the reason" not in passed
    assert "place one" not in passed
    for verdict in (Verdict.FAIL, Verdict.UNPROVEN):
        found = shown(records_table([Record(verdict=verdict, **places)], title=""))
        assert all(part in found for part in (verdict, "the reason", "place one", "place two"))
