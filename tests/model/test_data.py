"""Files as users have them: every ending, every guess, every refusal; and a split that loses and
leaks nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evalmode.model.data import open_data, read_file
from evalmode.model.texts import DataError

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


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_ending_gives_the_same_rows(tmp_path, ending):
    if ending == "csv":
        path = csv_of(tmp_path)
    elif ending == "tsv":
        path = csv_of(tmp_path, name="rows.tsv", separator="\t")
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
    assert read_file(path).labels == ("False", "True")


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
        ([*ROWS, ("", "good")], {}, r"column 'text' is empty in 1 row\(s\), the first is row 201"),
        (
            [*ROWS, ("fine", " ")],
            {},
            r"column 'label' is empty in 1 row\(s\), the first is row 201",
        ),
        ([(text, "one") for text, _ in ROWS], {}, r"column 'label' holds 1 label\(s\) \['one'\]"),
        (ROWS[:12], {}, r"has 12 usable rows"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path, rows, options, said):
    path = csv_of(tmp_path, rows)
    with pytest.raises(DataError, match=said) as refused:
        read_file(path, **options)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_without_a_usual_column_is_told_those_it_has(tmp_path):
    with pytest.raises(DataError, match=r"name one with --label-column: 'text', 'stars'"):
        read_file(csv_of(tmp_path, header="text,stars"))


def test_an_unknown_ending_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.xlsx has an ending that is not read.*\.csv"):
        read_file(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"absent\.csv is not there"):
        read_file(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b'text,label\n"x,1\n'), ("a.jsonl", b"{"), ("a.parquet", b"no")]
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}"):
        read_file(tmp_path / name)


def test_a_column_of_the_default_data_set_makes_no_sense(tmp_path):
    with pytest.raises(DataError, match="text_column='x' names a column of a file"):
        open_data("languages", text_column="x", label_column=None, cache=tmp_path)
