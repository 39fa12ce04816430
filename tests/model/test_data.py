"""Files of users: formats, columns and refusals; rows that are left out; the split into parts."""

from __future__ import annotations

import hashlib
import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evalmode.model.data import composed, open_data, read_file, tell_apart
from evalmode.model.data_set import DataError, DataSet, Texts

ROWS = [
    (f"this is text number {n}, {'good' if n % 2 else 'bad'}", "good" if n % 2 else "bad")
    for n in range(200)
]


def csv_of(folder: Path, rows=ROWS, *, header="text,label", name="rows.csv", separator=",") -> Path:
    quoted = [separator.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    path = folder / name
    path.write_text("\n".join([header.replace(",", separator), *quoted]) + "\n", encoding="utf-8")
    return path


def all_pairs(data) -> list[tuple[str, str]]:
    return sorted(
        pair
        for part in (data.train, data.validation, data.test)
        for pair in zip(part.texts, part.labels, strict=True)
    )


def keys_of(data: DataSet, key: Callable[[str], str]) -> dict[str, list[str]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: [key(text) for text in part.texts] for name, part in parts.items()}


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, format):
    if format == "csv":
        path = csv_of(tmp_path)
    elif format == "tsv":
        path = tmp_path / "rows.tsv"
        path.write_text("".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *ROWS]))
    elif format == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
        )
    else:
        path = tmp_path / "rows.parquet"
        texts, labels = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    data = read_file(path)
    assert all_pairs(data) == sorted(ROWS)
    assert data.labels == ("bad", "good")
    assert data.name == f"rows.{format}"


def test_every_value_of_a_csv_is_a_text(tmp_path):
    rows = [(f"NA null {n}", ("007", "NA")[n % 2]) for n in range(100)]
    assert read_file(csv_of(tmp_path, rows)).labels == ("007", "NA")


def test_booleans_can_be_labels(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": text, "label": n % 2 == 1}) + "\n"
            for n, (text, _) in enumerate(ROWS)
        )
    )
    assert read_file(path).labels == ("false", "true")


@pytest.mark.parametrize("header", ["Sentence,Lang", "review,category", "sentiment,content"])
def test_the_usual_names_of_columns_are_found_in_any_capitals(tmp_path, header):
    rows = [pair[::-1] for pair in ROWS] if header.startswith("sentiment") else ROWS
    assert all_pairs(read_file(csv_of(tmp_path, rows, header=header))) == sorted(ROWS)


def test_columns_can_be_named(tmp_path):
    path = csv_of(tmp_path, [(label, text) for text, label in ROWS], header="text,label")
    assert all_pairs(read_file(path, text_column="label", label_column="text")) == sorted(ROWS)


def test_the_part_of_a_row_depends_on_its_text_alone(tmp_path):
    data = read_file(csv_of(tmp_path))
    fewer_rows = read_file(csv_of(tmp_path, ROWS[:150][::-1], name="fewer.csv"))
    for part in ("train", "validation", "test"):
        assert set(getattr(fewer_rows, part).texts) <= set(getattr(data, part).texts)
    assert 0.05 < len(data.test.texts) / len(ROWS) < 0.2
    assert 0.05 < len(data.validation.texts) / len(ROWS) < 0.2


def test_no_text_occurs_twice_or_with_two_labels(tmp_path):
    data = read_file(csv_of(tmp_path, [*ROWS, *ROWS[:50], (ROWS[7][0], "bad")]))
    assert all_pairs(data) == sorted(row for row in ROWS if row != ROWS[7])


def test_all_rows_of_a_rare_label_are_in_train(tmp_path):
    # The hashes of some of these texts belong to the test or the validation part.
    for number in range(10):
        data = read_file(csv_of(tmp_path, [*ROWS, (f"rare {number}", "rare")]))
        assert "rare" in data.train.labels
        assert "rare" not in (*data.validation.labels, *data.test.labels)


def test_the_sha256_depends_on_the_content_and_not_on_the_name(tmp_path):
    first, same = read_file(csv_of(tmp_path)), read_file(csv_of(tmp_path, name="other.csv"))
    changed = read_file(csv_of(tmp_path, [("another text", "good"), *ROWS]))
    assert first.sha256 == same.sha256 != changed.sha256


@pytest.mark.parametrize("text", ["", "x" * 200_000, '😀\n\\"é' * 40_000, "\ud800" * 65_537])
def test_the_sha256_of_long_texts_is_that_of_their_json(text):
    parts = [Texts(("a", text), ("é", '"')), Texts((), ()), Texts((text,), ("é",))]
    data = DataSet(name="d", labels=("é", '"'), train=parts[0], validation=parts[1], test=parts[2])
    lines = [json.dumps([part.texts, part.labels]) for part in (*parts, Texts((), ()))]
    assert data.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_nothing_is_left_in_the_users_folders(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_file(csv_of(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ROWS,
            {"text_column": "words"},
            r"no column 'words': --text-column can be one of 'text', 'label'",
        ),
        ([("", label) for _, label in ROWS], {}, r"no row is left .*200 empty text left out"),
        ([(text, " ") for text, _ in ROWS], {}, r"no row is left .*200 empty label left out"),
        (
            [*ROWS, *((text, "other") for text, _ in ROWS)],
            {},
            r"no row is left to train on: 0 of 400 rows are used \(400 contradictory left out\)",
        ),
        ([(text, "one") for text, _ in ROWS], {}, r"column 'label' holds one class, 'one'"),
        (
            [(text, f"class {n}") for n, (text, _) in enumerate(ROWS)],
            {},
            r"column 'label' holds 200 classes in 200 rows, so each class has one row",
        ),
        (
            [(text, f"class {max(1, n)}") for n, (text, _) in enumerate(ROWS[:41])],
            {},
            r"41 usable rows of 40 classes leave none to test with, as the largest .* has 2",
        ),
        ([*ROWS[:12], *ROWS[:3]], {}, r"has 12 usable rows, .*12 of 15 rows .*3 duplicate left"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_one_sentence(
    tmp_path, rows, options, message
):
    path = csv_of(tmp_path, rows)
    with pytest.raises(DataError, match=message) as refusal:
        read_file(path, **options)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", ["", "   ", "\u00a0"])
def test_rows_without_a_text_or_a_label_are_left_out_and_counted(tmp_path, missing):
    rows = [*ROWS, (missing, "good"), (missing, missing), ("a text", missing)]
    data = read_file(csv_of(tmp_path, rows))
    assert all_pairs(data) == sorted(ROWS)
    assert data.reading.rows == 203
    assert data.reading.left_out == {"empty text": 2, "empty label": 1}
    assert str(data.reading) == ("200 of 203 rows are used (2 empty text, 1 empty label left out)")


def test_null_and_nan_in_json_are_missing_values(tmp_path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    lines += ['{"text": null, "label": "x"}', '{"text": "b", "label": NaN}', '{"text": "c"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = read_file(path)
    assert data.labels == ("bad", "good")
    assert data.reading.left_out == {"empty text": 1, "empty label": 2}


def test_half_of_a_surrogate_pair_is_replaced_in_a_text_and_refused_in_a_label(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"\ud800 {text}", "label": label}) for text, label in ROWS]
    path.write_text("\n".join(lines))
    assert all_pairs(read_file(path)) == sorted((f"\ufffd {text}", label) for text, label in ROWS)
    path.write_text("\n".join([*lines, '{"text": "a", "label": "\\udc00"}']))
    with pytest.raises(DataError, match="line 201: column 'label' holds half of a surrogate pair"):
        read_file(path)


def test_texts_in_different_unicode_forms_are_one_text(tmp_path):
    rows = [(f"déjà vu number {n}", ("bad", "good")[n % 2]) for n in range(200)]
    twins = [(unicodedata.normalize("NFD", text), label) for text, label in rows]
    data = read_file(csv_of(tmp_path, [*rows, *twins]))
    assert all_pairs(data) == sorted(rows)
    assert data.reading.left_out == {"duplicate": 200}
    reversed_data = read_file(csv_of(tmp_path, [*twins[::-1], *rows[::-1]]))
    assert [
        set(map(composed, part.texts)) for part in (data.train, data.validation, data.test)
    ] == [
        set(map(composed, part.texts))
        for part in (reversed_data.train, reversed_data.validation, reversed_data.test)
    ]
    contradiction = [(unicodedata.normalize("NFD", rows[7][0]), "bad")]
    data = read_file(csv_of(tmp_path, [*rows, *contradiction]))
    assert all_pairs(data) == sorted(row for row in rows if row != rows[7])
    assert data.reading.left_out == {"contradictory": 2}


def test_texts_that_a_front_end_reads_alike_are_one_text(tmp_path):
    rows = [(f"{word} {n}", label) for word, label in ROWS for n in ("one", "ONE", "One")]
    data = read_file(csv_of(tmp_path, rows), identity=lambda text: text.lower().encode())
    assert len(all_pairs(data)) == 200
    assert data.reading.left_out == {"duplicate": 400}


def test_texts_that_a_tokenizer_reads_alike_are_in_one_part(tmp_path):
    data = read_file(csv_of(tmp_path))
    assert tell_apart(data, keys_of(data, lambda text: text)) is data
    test_text, train_text = data.test.texts[0], data.train.texts[0]
    same_label = next(
        text
        for text, label in zip(data.train.texts, data.train.labels, strict=True)
        if label == data.test.labels[0]
    )
    other_label = next(
        text
        for text, label in zip(data.train.texts, data.train.labels, strict=True)
        if label != data.test.labels[0]
    )
    twins = tell_apart(data, keys_of(data, lambda text: same_label if text == test_text else text))
    assert set(all_pairs(data)) - set(all_pairs(twins)) == {(test_text, data.test.labels[0])}
    assert twins.reading.left_out == {"duplicate": 1}
    contradicted = tell_apart(
        data, keys_of(data, lambda text: other_label if text == test_text else text)
    )
    lost = {text for text, _ in set(all_pairs(data)) - set(all_pairs(contradicted))}
    assert lost == {test_text, other_label}
    assert contradicted.reading.left_out == {"contradictory": 2}
    with pytest.raises(DataError, match=r"no row is left to train on.*200 contradictory"):
        tell_apart(data, keys_of(data, lambda text: train_text))


def test_a_long_run_of_combining_marks_is_read_in_seconds(tmp_path):
    started = time.monotonic()
    rows = [("a" + "\u0316\u0301" * 200_000, "good"), *ROWS]
    assert len(all_pairs(read_file(csv_of(tmp_path, rows)))) == 201
    # Unicode normalisation of the whole run would take minutes.
    assert time.monotonic() - started < 20


def test_a_separator_can_be_set_for_a_file_only(tmp_path):
    path = csv_of(tmp_path, separator=";")
    assert all_pairs(read_file(path, separator=";")) == sorted(ROWS)
    with pytest.raises(DataError, match="separator=';' applies to files only"):
        open_data("languages", text_column=None, label_column=None, separator=";", cache=tmp_path)


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,label\n" + "".join(f"{a},{b},{b}\n" for a, b in ROWS))
    with pytest.raises(DataError, match="has 2 columns 'label': give each a different name"):
        read_file(path)


def test_the_error_about_a_missing_column_lists_the_columns(tmp_path):
    with pytest.raises(DataError, match=r"name one with --label-column: 'text', 'stars'"):
        read_file(csv_of(tmp_path, header="text,stars"))


def test_an_unknown_ending_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.xlsx has the ending '\.xlsx', .*\.csv"):
        read_file(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"absent\.csv does not exist"):
        read_file(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b'text,label\n"x,1\n'), ("a.jsonl", b"{"), ("a.parquet", b"no")]
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}"):
        read_file(tmp_path / name)


def test_a_column_cannot_be_set_for_the_default_data_set(tmp_path):
    with pytest.raises(DataError, match="text_column='x' applies to files only"):
        open_data("languages", text_column="x", label_column=None, cache=tmp_path)


def test_a_repeated_header_is_left_out_and_counted(tmp_path):
    path = csv_of(tmp_path)
    path.write_text(path.read_text() + "text,label\nanother text,good\n")
    data = read_file(path)
    assert data.labels == ("bad", "good")
    assert str(data.reading) == "201 of 202 rows are used (1 header again left out)"


@pytest.mark.parametrize(
    "twins",
    [
        ("caf\u00e9", "cafe\u0301"),
        ("Pos", "pos"),
        ("STRASSE", "stra\u00dfe"),
        ("\u01c5", "\u01c6"),
        ("pos", "\u200bpos"),
        ("pos", "po\u00ads"),
        ("pos", "\ufeffpos"),
        ("new york", "new\u00a0york"),
        ("new  york", "new york"),
        ("\u2764", "\u2764\ufe0f"),
        ("CAFE\u0301", "caf\u00e9\u200d"),
    ],
    ids=ascii,
)
def test_labels_that_look_alike_are_separate_classes_and_are_reported(tmp_path, twins):
    rows = [(text, (*twins, "other")[n % 3]) for n, (text, _) in enumerate(ROWS)]
    data = read_file(csv_of(tmp_path, rows))
    assert data.labels == tuple(sorted((*twins, "other")))
    assert data.similar_labels == [tuple(sorted(twins))]


def test_labels_that_look_different_are_not_similar(tmp_path):
    names = ("pos", "pos.", "positive", "p os", "1", "1.0", "e", "\u00e9", "a" * 5_000, "A" * 5_000)
    rows = [(text, names[n % len(names)]) for n, (text, _) in enumerate(ROWS)]
    assert read_file(csv_of(tmp_path, rows)).similar_labels == []


@pytest.mark.parametrize("marks", ["''", "``", '""', "\u201c\u201d", "\u00ab\u00bb"])
def test_a_column_whose_values_are_all_in_quotation_marks_gets_a_note(tmp_path, marks):
    rows = [(text, marks[0] + label + marks[1]) for text, label in ROWS]
    data = read_file(csv_of(tmp_path, rows))
    (note,) = data.reading.notes
    assert f"all 200 values of column 'label' are enclosed in {marks[0]} and {marks[1]}" in note
    assert read_file(csv_of(tmp_path, [*rows, ("a text", "plain")])).reading.notes == ()


def test_quotation_marks_in_a_tsv_get_one_note(tmp_path):
    path = tmp_path / "rows.tsv"
    lines = [f'{text}\t"{label}"\n' for text, label in ROWS]
    path.write_text("text\tlabel\n" + "".join(lines))
    (note,) = read_file(path).reading.notes
    assert "200 values of column 'label' keep the quotation marks around them" in note


def test_an_error_about_many_or_long_columns_is_short(tmp_path):
    path = tmp_path / "rows.csv"
    for names in ([f"c{number}" for number in range(500)], ["x" * 5_000_000, "label"]):
        path.write_text(",".join(names) + "\n" + ",".join("a" for _ in names) + "\n")
        with pytest.raises(DataError, match="name one with --text-column") as refusal:
            read_file(path)
        assert len(str(refusal.value)) < 1_000
