"""Files as users have them: every ending, every column, every refusal; rows that are left out are
counted, and a split loses and leaks nothing.
"""

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


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_ending_gives_the_same_rows(tmp_path, ending):
    if ending == "csv":
        path = csv_of(tmp_path)
    elif ending == "tsv":
        path = tmp_path / "rows.tsv"
        path.write_text("".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *ROWS]))
    elif ending == "jsonl":
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
    assert data.name == f"rows.{ending}"


def test_a_csv_is_nothing_but_text(tmp_path):
    rows = [(f"NA null {n}", ("007", "NA")[n % 2]) for n in range(100)]
    assert read_file(csv_of(tmp_path, rows)).labels == ("007", "NA")


def test_numbers_and_truths_are_labels_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": text, "label": n % 2 == 1}) + "\n"
            for n, (text, _) in enumerate(ROWS)
        )
    )
    assert read_file(path).labels == ("false", "true")


@pytest.mark.parametrize("header", ["Sentence,Lang", "review,category", "sentiment,content"])
def test_the_usual_names_of_columns_are_found_whatever_their_capitals(tmp_path, header):
    rows = [pair[::-1] for pair in ROWS] if header.startswith("sentiment") else ROWS
    assert all_pairs(read_file(csv_of(tmp_path, rows, header=header))) == sorted(ROWS)


def test_columns_can_be_named(tmp_path):
    path = csv_of(tmp_path, [(label, text) for text, label in ROWS], header="text,label")
    assert all_pairs(read_file(path, text_column="label", label_column="text")) == sorted(ROWS)


def test_the_split_is_by_the_text_alone(tmp_path):
    whole = read_file(csv_of(tmp_path))
    fewer = read_file(csv_of(tmp_path, ROWS[:150][::-1], name="fewer.csv"))
    for part in ("train", "validation", "test"):
        assert set(getattr(fewer, part).texts) <= set(getattr(whole, part).texts)
    assert 0.05 < len(whole.test.texts) / len(ROWS) < 0.2
    assert 0.05 < len(whole.validation.texts) / len(ROWS) < 0.2


def test_no_text_stands_twice_and_none_with_two_labels(tmp_path):
    data = read_file(csv_of(tmp_path, [*ROWS, *ROWS[:50], (ROWS[7][0], "bad")]))
    assert all_pairs(data) == sorted(row for row in ROWS if row != ROWS[7])


def test_a_label_too_rare_to_reach_train_goes_there_whole(tmp_path):
    for number in range(10):  # some of these texts hash to test or validation
        data = read_file(csv_of(tmp_path, [*ROWS, (f"rare {number}", "rare")]))
        assert "rare" in data.train.labels
        assert "rare" not in (*data.validation.labels, *data.test.labels)


def test_the_sha_is_of_the_content_and_not_of_the_name(tmp_path):
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
    ("rows", "options", "said"),
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
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path, rows, options, said):
    path = csv_of(tmp_path, rows)
    with pytest.raises(DataError, match=said) as refused:
        read_file(path, **options)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["", "   ", "\u00a0"])
def test_rows_without_a_text_or_a_label_are_left_out_and_counted(tmp_path, missing):
    rows = [*ROWS, (missing, "good"), (missing, missing), ("a text", missing)]
    data = read_file(csv_of(tmp_path, rows))
    assert all_pairs(data) == sorted(ROWS)
    assert data.reading.rows == 203
    assert data.reading.left_out == {"empty text": 2, "empty label": 1}
    assert str(data.reading) == ("200 of 203 rows are used (2 empty text, 1 empty label left out)")


def test_null_and_nan_are_no_value_where_a_format_has_them(tmp_path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    lines += ['{"text": null, "label": "x"}', '{"text": "b", "label": NaN}', '{"text": "c"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = read_file(path)
    assert data.labels == ("bad", "good")
    assert data.reading.left_out == {"empty text": 1, "empty label": 2}


def test_half_of_a_surrogate_pair_is_read_as_the_front_end_reads_it_and_is_no_label(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"\ud800 {text}", "label": label}) for text, label in ROWS]
    path.write_text("\n".join(lines))
    assert all_pairs(read_file(path)) == sorted((f"\ufffd {text}", label) for text, label in ROWS)
    path.write_text("\n".join([*lines, '{"text": "a", "label": "\\udc00"}']))
    with pytest.raises(DataError, match="line 201: column 'label' holds half of a surrogate pair"):
        read_file(path)


def test_texts_that_are_composed_otherwise_are_one_text(tmp_path):
    rows = [(f"déjà vu number {n}", ("bad", "good")[n % 2]) for n in range(200)]
    twins = [(unicodedata.normalize("NFD", text), label) for text, label in rows]
    data = read_file(csv_of(tmp_path, [*rows, *twins]))
    assert all_pairs(data) == sorted(rows)
    assert data.reading.left_out == {"duplicate": 200}
    turned = read_file(csv_of(tmp_path, [*twins[::-1], *rows[::-1]]))
    assert [
        set(map(composed, part.texts)) for part in (data.train, data.validation, data.test)
    ] == [set(map(composed, part.texts)) for part in (turned.train, turned.validation, turned.test)]
    wrong = [(unicodedata.normalize("NFD", rows[7][0]), "bad")]
    data = read_file(csv_of(tmp_path, [*rows, *wrong]))
    assert all_pairs(data) == sorted(row for row in rows if row != rows[7])
    assert data.reading.left_out == {"contradictory": 2}


def test_what_a_front_end_reads_alike_is_one_text_in_one_part(tmp_path):
    rows = [(f"{word} {n}", label) for word, label in ROWS for n in ("one", "ONE", "One")]
    data = read_file(csv_of(tmp_path, rows), identity=lambda text: text.lower().encode())
    assert len(all_pairs(data)) == 200
    assert data.reading.left_out == {"duplicate": 400}


def test_rows_that_only_a_tokenizer_shows_to_be_alike_stand_in_one_part(tmp_path):
    data = read_file(csv_of(tmp_path))
    assert tell_apart(data, keys_of(data, lambda text: text)) is data
    held_out, trained = data.test.texts[0], data.train.texts[0]
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
    twins = tell_apart(data, keys_of(data, lambda text: same_label if text == held_out else text))
    assert set(all_pairs(data)) - set(all_pairs(twins)) == {(held_out, data.test.labels[0])}
    assert twins.reading.left_out == {"duplicate": 1}
    rivals = tell_apart(data, keys_of(data, lambda text: other_label if text == held_out else text))
    lost = {text for text, _ in set(all_pairs(data)) - set(all_pairs(rivals))}
    assert lost == {held_out, other_label}
    assert rivals.reading.left_out == {"contradictory": 2}
    with pytest.raises(DataError, match=r"no row is left to train on.*200 contradictory"):
        tell_apart(data, keys_of(data, lambda text: trained))


def test_a_long_run_of_combining_marks_takes_no_time_worth_a_word(tmp_path):
    started = time.monotonic()
    rows = [("a" + "\u0316\u0301" * 200_000, "good"), *ROWS]
    assert len(all_pairs(read_file(csv_of(tmp_path, rows)))) == 201
    assert time.monotonic() - started < 20  # composing all of it takes minutes


def test_a_separator_is_for_a_file_and_can_be_given(tmp_path):
    path = csv_of(tmp_path, separator=";")
    assert all_pairs(read_file(path, separator=";")) == sorted(ROWS)
    with pytest.raises(DataError, match="separator=';' applies to files only"):
        open_data("languages", text_column=None, label_column=None, separator=";", cache=tmp_path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,label\n" + "".join(f"{a},{b},{b}\n" for a, b in ROWS))
    with pytest.raises(DataError, match="has 2 columns 'label': give each a different name"):
        read_file(path)


def test_a_file_without_a_usual_column_is_told_those_it_has(tmp_path):
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


def test_a_column_of_the_default_data_set_makes_no_sense(tmp_path):
    with pytest.raises(DataError, match="text_column='x' applies to files only"):
        open_data("languages", text_column="x", label_column=None, cache=tmp_path)


def test_a_header_that_stands_again_is_left_out_and_counted(tmp_path):
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
def test_labels_that_a_person_cannot_tell_apart_are_classes_that_are_named(tmp_path, twins):
    rows = [(text, (*twins, "other")[n % 3]) for n, (text, _) in enumerate(ROWS)]
    data = read_file(csv_of(tmp_path, rows))
    assert data.labels == tuple(sorted((*twins, "other")))
    assert data.similar_labels == [tuple(sorted(twins))]


def test_labels_that_look_different_are_not_similar(tmp_path):
    names = ("pos", "pos.", "positive", "p os", "1", "1.0", "e", "\u00e9", "a" * 5_000, "A" * 5_000)
    rows = [(text, names[n % len(names)]) for n, (text, _) in enumerate(ROWS)]
    assert read_file(csv_of(tmp_path, rows)).similar_labels == []


@pytest.mark.parametrize("marks", ["''", "``", '""', "\u201c\u201d", "\u00ab\u00bb"])
def test_values_of_which_all_stand_in_quotation_marks_are_warned_of(tmp_path, marks):
    rows = [(text, marks[0] + label + marks[1]) for text, label in ROWS]
    data = read_file(csv_of(tmp_path, rows))
    (note,) = data.reading.notes
    assert f"all 200 values of column 'label' are enclosed in {marks[0]} and {marks[1]}" in note
    assert read_file(csv_of(tmp_path, [*rows, ("a text", "plain")])).reading.notes == ()


def test_marks_that_the_file_cannot_enclose_values_in_are_warned_of_once(tmp_path):
    path = tmp_path / "rows.tsv"
    lines = [f'{text}\t"{label}"\n' for text, label in ROWS]
    path.write_text("text\tlabel\n" + "".join(lines))
    (note,) = read_file(path).reading.notes
    assert "200 values of column 'label' keep the quotation marks around them" in note


def test_a_sentence_names_some_of_many_columns_and_no_megabytes(tmp_path):
    path = tmp_path / "rows.csv"
    for names in ([f"c{number}" for number in range(500)], ["x" * 5_000_000, "label"]):
        path.write_text(",".join(names) + "\n" + ",".join("a" for _ in names) + "\n")
        with pytest.raises(DataError, match="name one with --text-column") as refused:
            read_file(path)
        assert len(str(refused.value)) < 1_000
