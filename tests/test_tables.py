"""Tables print texts from files and users unchanged."""

from __future__ import annotations

from rich.console import Console, RenderableType

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.model.data_set import DataSet, Reading, Texts
from evalmode.tables import (
    data_tables,
    metrics_table,
    pairs_table,
    predictions_table,
    records_table,
)

MARKUP = ("x[/a]", "[red]", "[link=x]", "[")


def rendered(table: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def record(*findings: Finding) -> Record:
    return Record.of("any-rule", findings, fine="all is well", otherwise="the reason")


def finding(node: str, fix: str = "", severity: Severity = Severity.ERROR) -> Finding:
    return Finding(severity=severity, node=node, op="Op-1", why="it is so", fix=fix)


def data_set(counts: dict[str, int], *, tested: set[str]) -> DataSet:
    rows = [(f"{label} {n}", label) for label, count in counts.items() for n in range(count)]
    train = Texts(*zip(*rows, strict=True))
    held_out = Texts(tuple(tested), tuple(tested))
    return DataSet(
        name="d",
        labels=tuple(sorted(counts)),
        train=train,
        validation=held_out,
        test=held_out,
        reading=Reading(
            source="d.csv",
            rows=5_000,
            text_column="text",
            label_column="[label]",
            left_out={"duplicate": 1_234},
            notes=("it was so",),
        ),
    )


def test_of_many_classes_the_ten_largest_are_named() -> None:
    counts = {f"class {n}": 100 - n for n in range(13)}
    text = rendered(data_tables(data_set(counts, tested=set(counts))))
    assert "class 9" in text
    assert "class 10" not in text
    (rest,) = (line for line in text.splitlines() if "... 3 more" in line)
    assert rest.replace("│", "").split() == ["...", "3", "more", "273", "267", "3", "3"]
    assert "[label]" in text
    assert "left out: duplicate │ 1,234" in text
    assert "warning: it was so" in text
    assert "too few rows" not in text


def test_classes_missing_in_the_test_part_are_a_warning() -> None:
    counts = {"[a]": 9, "b": 2, **{f"c{n:02}": 1 for n in range(12)}}
    text = rendered(data_tables(data_set(counts, tested={"[a]"})))
    warning = "13 of 14 classes have too few rows for the test part and are missing in it: b, c00, "
    assert warning in " ".join(text.split())
    assert "c08, ... 3 more" in text


def test_classes_that_look_alike_are_named_with_their_rows() -> None:
    counts = {"Pos": 30, "pos": 1_029, "caf\u00e9": 5, "cafe\u0301": 4, "漢\u200b": 3, "漢": 2}
    text = " ".join(rendered(data_tables(data_set(counts, tested=set()))).split())
    assert "differ only in capitals, blanks, composition or invisible characters" in text
    assert "'Pos' (30 rows), 'pos' (1,029 rows): spell them alike" in text
    assert r"'cafe\u0301' (4 rows), 'caf\xe9' (5 rows): spell them alike" in text
    assert r"'漢' (2 rows), '漢\u200b' (3 rows): spell them alike" in text
    many = {f"{name}{n}": 1 for n in range(13) for name in ("a", "A")}
    text = " ".join(rendered(data_tables(data_set(many, tested=set()))).split())
    assert text.count("spell them alike") == 10
    assert "3 more groups of classes differ in such ways only" in text


def test_untested_classes_are_named_beside_the_macro_f1() -> None:
    part = {"accuracy": 1.0, "macro_f1": 0.5, "classes": 2, "not_tested": ["[rare]"]}
    text = rendered(metrics_table({"test": part, "train": {"accuracy": 1.0, "macro_f1": 1.0}}))
    assert "0.5000 (1 of 2 classes not tested: [rare])" in text
    assert "not_tested" not in text
    assert "classes │" not in text
    odd = {
        "test": {"not_tested": "x", "classes": None, "macro_f1": "y"}
    }  # a bundle may say anything
    assert "not_tested" in rendered(metrics_table(odd))


def test_markup_is_printed_as_text_in_every_table() -> None:
    for text in MARKUP:
        finding_of_text = Finding(severity=Severity.ERROR, node=text, why=text, fix=text)
        failed = Record.of(
            text, [finding_of_text], fine="", otherwise=text, measured=text, limit=text
        )
        assert rendered(records_table([failed], title=text)).count(text) == 8, text
        assert rendered(metrics_table({text: {text: text}, "one": text})).count(text) == 4, text
        assert rendered(predictions_table([text], [[(text, 1.0), (text, 0.0)]])).count(text) == 3, (
            text
        )
        assert rendered(pairs_table({text: text}, title="any")).count(text) == 2, text


def test_a_rule_that_passed_is_one_line_and_any_other_has_its_reason_and_findings() -> None:
    passed = rendered(records_table([record()], title=""))
    assert "the reason" not in passed
    assert "all is well" not in passed
    for severity, verdict in (
        (Severity.ERROR, Verdict.FAIL),
        (Severity.UNPROVEN, Verdict.UNPROVEN),
    ):
        findings = [finding(node, severity=severity) for node in ("one", "two")]
        output = rendered(records_table([record(*findings)], title=""))
        assert all(
            part in output
            for part in (verdict, "the reason", "one (Op-1): it is so", "two (Op-1): it is so")
        )


def test_a_remedy_is_printed_once_below_all_findings() -> None:
    fixes = ("mend it", "mend it", "change it", "mend it")
    lines = rendered(
        records_table([record(*[finding(f"node {fix}", fix) for fix in fixes])], title="")
    ).splitlines()
    cells = [line.split("│")[3].strip() for line in lines if line.count("│") == 5]
    assert cells[-2:] == ["mend it", "change it"]
    assert sum(line == "mend it" for line in cells) == 1


def test_a_warning_is_shown_although_its_rule_passes() -> None:
    output = rendered(records_table([record(finding("mask", severity=Severity.WARNING))], title=""))
    assert "mask (Op-1): it is so" in output
    assert "the reason" not in output
