"""CSV and TSV as people write them: what stands there is read, and no row is lost or shifted."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.model.reading.delimited import rows_of
from evalmode.model.reading.source import Columns
from evalmode.model.reading.table import open_table
from evalmode.model.texts import DataError

ROWS = [(f"sentence {n} on page {3 * n}", ("neg", "pos")[n % 2]) for n in range(60)]


def read(path: Path, *, text: str = "text", label: str = "label", separator=None) -> Columns:
    with open_table(path, separator=separator) as table:
        return table.read(text=text, label=label)


def written(folder: Path, content: str, name: str = "d.csv") -> Path:
    path = folder / name
    path.write_text(content, newline="", encoding="utf-8")
    return path


def unquoted(rows=ROWS, *, header=("text", "label"), separator=",", end="\n") -> str:
    return "".join(separator.join(row) + end for row in (header, *rows))


def pairs(columns: Columns) -> list[tuple[str | None, str | None]]:
    return list(zip(columns.texts, columns.labels, strict=True))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_are_read_whatever_ends_a_line(tmp_path, end):
    columns = read(written(tmp_path, unquoted(end=end)))
    assert pairs(columns) == ROWS
    assert list(columns.numbers) == list(range(2, 62))


@pytest.mark.parametrize("blank", ["\n", "\r\n", "\n\n\n", "   \n", "\ufeff\n"])
def test_empty_lines_are_no_rows_and_lines_keep_their_numbers(tmp_path, blank):
    content = unquoted().splitlines(keepends=True)
    path = written(tmp_path, blank + "".join(content[:5]) + "\n" + "".join(content[5:]))
    columns = read(path)
    assert pairs(columns) == ROWS
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert [lines[number - 1] for number in columns.numbers] == [",".join(row) for row in ROWS]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    assert pairs(read(written(tmp_path, "\ufeff" + unquoted()))) == ROWS


def test_words_stay_words(tmp_path):
    words = [("NA", "007"), ("null", "1.0"), ("nan", "True"), ("2024-01-01", "1e5")]
    assert pairs(read(written(tmp_path, unquoted(words)))) == words


@pytest.mark.parametrize("header", [",text,label", "text,label,", "text,,label", ",,text,label"])
def test_columns_without_a_name_are_nobody_s_affair(tmp_path, header):
    names = header.split(",")
    rows = [
        [{"text": text, "label": label}.get(name, "x") for name in names] for text, label in ROWS
    ]
    assert pairs(read(written(tmp_path, unquoted(rows, header=names)))) == ROWS


@pytest.mark.parametrize(
    ("bad", "fields"),
    [("neg,red,a text", 3), ("a text", 1), ("a,b,c,d", 4), ("well, a text,pos", 3)],
)
def test_a_row_that_does_not_fit_the_header_is_refused_with_its_line_and_both_counts(
    tmp_path, bad, fields
):
    path = written(tmp_path, unquoted() + bad + "\n")
    with pytest.raises(DataError, match=rf"d\.csv, line 62: {fields} fields, .* names 2 columns"):
        read(path)


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.sampled_from('ab ,"\n\r\té\u2028')), st.sampled_from(["x", "y z", "ü", "-1"])
        ),
        min_size=1,
    )
)
def test_what_a_csv_writer_wrote_is_read_back(rows, tmp_path_factory):
    # A text whose lines are like rows cannot be told from rows that a stray quotation mark joined.
    rows = [(text.replace(",", ";"), label) for text, label in rows]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *rows])
    path = written(tmp_path_factory.mktemp("rows"), buffer.getvalue())
    assert pairs(read(path)) == rows


@given(text=st.text(st.sampled_from('ab,"\n\r\u2028 '), max_size=30), quoting=st.booleans())
def test_rows_are_those_of_python_s_strict_reader(text, quoting):
    quotes = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), quoting=quotes, strict=True)
    rows = rows_of(Path("d.csv"), text, separator=",", quoting=quoting)
    try:
        expected = [
            (row, reader.line_num) for row in reader if len(row) > 1 or "".join(row).strip()
        ]
    except csv.Error:
        with pytest.raises(DataError, match="a quotation mark opens a field"):
            list(rows)
    else:
        assert [(row.fields, row.last) for row in rows] == expected


def test_texts_of_several_lines_in_quotation_marks_are_one_text(tmp_path):
    letters = [
        (f'Dear John,\nI am fine, thank you, and "well".\n\nLetter {n},\n1,0\nyours, pos', label)
        for n, (_, label) in enumerate(ROWS)
    ]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *letters])
    columns = read(written(tmp_path, buffer.getvalue()))
    assert pairs(columns) == letters
    assert list(columns.numbers)[:3] == [2, 8, 14]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ((10, '"Great they said'), (40, '"Awful" they said')),
        ((10, '"Great they said'), (40, 'they said "Awful"')),
        ((10, '"Great they said'), (40, 'they said awful"')),
        ((10, '"Great they said'), (11, 'they said awful"')),
        ((0, '"Great they said'), (59, 'they said awful"')),
        ((10, '"Great" they said'), (40, "plain")),
        ((10, '"Great they said'), (40, "plain")),
        ((59, '"Great they said'), (40, "plain")),
    ],
)
def test_a_stray_quotation_mark_never_swallows_rows(tmp_path, separator, turned, opening, closing):
    rows = list(ROWS)
    for number, text in (opening, closing):
        rows[number] = (text, rows[number][1])
    step = -1 if turned else 1
    content = unquoted(
        [row[::step] for row in rows], header=("text", "label")[::step], separator=separator
    )
    with pytest.raises(DataError, match=r"d\.csv, lines? \d+") as refused:
        read(written(tmp_path, content), separator=separator)
    assert "quotation mark" in str(refused.value)
    assert "call the file .tsv and give --separator" in str(refused.value)
    plain = written(tmp_path, content, "d.tsv")
    assert pairs(read(plain, separator=separator)) == rows


def test_a_stray_quotation_mark_in_a_column_that_is_not_read_swallows_none_either(tmp_path):
    rows = [(f"title {n}", *row) for n, row in enumerate(ROWS)]
    rows[10] = ('"A title', *rows[10][1:])
    rows[30] = ('the other title"', *rows[30][1:])
    with pytest.raises(DataError, match="lines 12 to 32: one field in quotation marks holds 20"):
        read(written(tmp_path, unquoted(rows, header=("title", "text", "label"))))


def test_a_header_or_a_label_of_several_lines_is_a_stray_quotation_mark(tmp_path):
    with pytest.raises(DataError, match="the header goes over lines 1 to 3"):
        read(written(tmp_path, '"text,label\na,neg\nb",pos\n' + unquoted()))
    with pytest.raises(DataError, match="lines 62 to 64: a label that goes over several lines"):
        read(written(tmp_path, unquoted() + 'a text,"pos\nanother,neg\nthird,pos"\n'))


def test_a_tsv_has_no_quoting_and_says_so_where_texts_stand_in_quotation_marks(tmp_path):
    rows = [
        *ROWS,
        ('"Great, they said', "pos"),
        ('"Awful" they said', "neg"),
        ('say ""hi""', "pos"),
    ]
    columns = read(written(tmp_path, unquoted(rows, separator="\t"), "d.tsv"))
    assert pairs(columns) == rows
    assert columns.notes == ()
    rows.append(('"all of it"', "pos"))
    columns = read(written(tmp_path, unquoted(rows, separator="\t"), "d.TSV"))
    assert pairs(columns) == rows
    assert columns.notes[0].startswith("1 texts stand in quotation marks, which a TSV file keeps")


@pytest.mark.parametrize(("separator", "spelled"), [(";", "';'"), ("\t", "tab"), ("|", "'|'")])
def test_another_separator_is_suggested_and_can_be_given(tmp_path, separator, spelled):
    path = written(tmp_path, unquoted(separator=separator))
    with pytest.raises(DataError) as refused:
        read(path)
    assert f"give --separator {spelled}" in str(refused.value)
    assert pairs(read(path, separator=separator)) == ROWS


@pytest.mark.parametrize("tab", ["tab", "\\t", "\t"])
def test_a_tab_can_be_spelled(tmp_path, tab):
    assert pairs(read(written(tmp_path, unquoted(separator="\t")), separator=tab)) == ROWS


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("text,label\n", "holds a header and no rows"),
        ("\ntext,label\n\n\n", "holds a header and no rows"),
        ("words\na\n", "the header holds one column, 'words'"),
    ],
)
def test_a_file_without_rows_or_columns_says_so(tmp_path, content, reason):
    with pytest.raises(DataError, match=rf"d\.csv:? {reason}"):
        read(written(tmp_path, content))


def test_a_text_may_be_longer_than_the_reader_s_own_limit(tmp_path):
    limit = csv.field_size_limit()
    rows = [("x" * (limit + 1), "pos"), ("y", "neg")]
    assert pairs(read(written(tmp_path, unquoted(rows)))) == rows
    assert csv.field_size_limit() == limit
