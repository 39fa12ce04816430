"""CSV and TSV files of users: values are read unchanged, and no row is lost or shifted."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.model.data_set import DataError
from evalmode.model.reading.csv_tsv import rows_of
from evalmode.model.reading.source import Columns
from evalmode.model.reading.table import open_table

ROWS = [(f"sentence {n} on page {3 * n}", ("neg", "pos")[n % 2]) for n in range(60)]


def read(path: Path, *, text: str = "text", label: str = "label", separator=None) -> Columns:
    with open_table(path, separator=separator) as table:
        return table.read(text=text, label=label)


def write_file(folder: Path, content: str, name: str = "d.csv") -> Path:
    path = folder / name
    path.write_text(content, newline="", encoding="utf-8")
    return path


def unquoted(rows=ROWS, *, header=("text", "label"), separator=",", end="\n") -> str:
    return "".join(separator.join(row) + end for row in (header, *rows))


def pairs(columns: Columns) -> list[tuple[str | None, str | None]]:
    return list(zip(columns.texts, columns.labels, strict=True))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_are_read_with_any_line_ending(tmp_path, end):
    columns = read(write_file(tmp_path, unquoted(end=end)))
    assert pairs(columns) == ROWS
    assert list(columns.numbers) == list(range(2, 62))


@pytest.mark.parametrize("blank", ["\n", "\r\n", "\n\n\n", "   \n", "\ufeff\n"])
def test_empty_lines_are_skipped_and_counted_in_line_numbers(tmp_path, blank):
    content = unquoted().splitlines(keepends=True)
    path = write_file(tmp_path, blank + "".join(content[:5]) + "\n" + "".join(content[5:]))
    columns = read(path)
    assert pairs(columns) == ROWS
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert [lines[number - 1] for number in columns.numbers] == [",".join(row) for row in ROWS]


def test_a_byte_order_mark_is_not_part_of_a_column_name(tmp_path):
    assert pairs(read(write_file(tmp_path, "\ufeff" + unquoted()))) == ROWS


def test_values_that_look_like_numbers_or_nulls_are_texts(tmp_path):
    words = [("NA", "007"), ("null", "1.0"), ("nan", "True"), ("2024-01-01", "1e5")]
    assert pairs(read(write_file(tmp_path, unquoted(words)))) == words


@pytest.mark.parametrize("header", [",text,label", "text,label,", "text,,label", ",,text,label"])
def test_columns_without_a_name_are_ignored(tmp_path, header):
    names = header.split(",")
    rows = [
        [{"text": text, "label": label}.get(name, "x") for name in names] for text, label in ROWS
    ]
    assert pairs(read(write_file(tmp_path, unquoted(rows, header=names)))) == ROWS


@pytest.mark.parametrize(
    ("bad", "fields"),
    [("neg,red,a text", 3), ("a text", 1), ("a,b,c,d", 4), ("well, a text,pos", 3)],
)
def test_a_row_that_does_not_fit_the_header_is_refused_with_its_line_and_both_counts(
    tmp_path, bad, fields
):
    path = write_file(tmp_path, unquoted() + bad + "\n")
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
def test_rows_of_a_csv_writer_are_read_back(rows, tmp_path_factory):
    # A text whose lines look like rows cannot be distinguished from rows that a stray quotation
    # mark joins.
    rows = [(text.replace(",", ";"), label) for text, label in rows]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *rows])
    path = write_file(tmp_path_factory.mktemp("rows"), buffer.getvalue())
    assert pairs(read(path)) == [(text.strip(), label) for text, label in rows]


@given(text=st.text(st.sampled_from('ab,"\n\r\u2028 '), max_size=30), quoting=st.booleans())
def test_rows_are_those_of_python_s_strict_reader(text, quoting):
    quotes = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), quoting=quotes, strict=True)
    rows = rows_of(Path("d.csv"), text.encode(), separator=",", has_quoting=quoting)
    try:
        expected = [
            (row, reader.line_num) for row in reader if len(row) > 1 or "".join(row).strip()
        ]
    except csv.Error:
        with pytest.raises(DataError, match="a quotation mark opens a field"):
            list(rows)
    else:
        fields = [([str(field, "utf-8") for field in row.fields], row.last_line) for row in rows]
        assert fields == expected


def test_texts_of_several_lines_in_quotation_marks_are_one_text(tmp_path):
    letters = [
        (f'Dear John,\nI am fine, thank you, and "well".\n\nLetter {n},\n1,0\nyours, pos', label)
        for n, (_, label) in enumerate(ROWS)
    ]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *letters])
    columns = read(write_file(tmp_path, buffer.getvalue()))
    assert pairs(columns) == letters
    assert list(columns.numbers)[:3] == [2, 8, 14]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("swapped", [False, True])
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
def test_a_stray_quotation_mark_never_swallows_rows(tmp_path, separator, swapped, opening, closing):
    rows = list(ROWS)
    for number, text in (opening, closing):
        rows[number] = (text, rows[number][1])
    step = -1 if swapped else 1
    content = unquoted(
        [row[::step] for row in rows], header=("text", "label")[::step], separator=separator
    )
    with pytest.raises(DataError, match=r"d\.csv, lines? \d+") as refusal:
        read(write_file(tmp_path, content), separator=separator)
    assert "quotation mark" in str(refusal.value)
    assert "call the file .tsv and give --separator" in str(refusal.value)
    plain = write_file(tmp_path, content, "d.tsv")
    assert pairs(read(plain, separator=separator)) == rows


def test_a_stray_quotation_mark_in_an_unread_column_never_swallows_rows(tmp_path):
    rows = [(f"title {n}", *row) for n, row in enumerate(ROWS)]
    rows[10] = ('"A title', *rows[10][1:])
    rows[30] = ('the other title"', *rows[30][1:])
    with pytest.raises(DataError, match="lines 12 to 32: one field in quotation marks holds 20"):
        read(write_file(tmp_path, unquoted(rows, header=("title", "text", "label"))))


def test_a_header_or_a_label_of_several_lines_is_refused(tmp_path):
    with pytest.raises(DataError, match="the header goes over lines 1 to 3"):
        read(write_file(tmp_path, '"text,label\na,neg\nb",pos\n' + unquoted()))
    with pytest.raises(DataError, match="lines 62 to 64: a label that goes over several lines"):
        read(write_file(tmp_path, unquoted() + 'a text,"pos\nanother,neg\nthird,pos"\n'))


def test_a_tsv_has_no_quoting_and_a_note_reports_texts_in_quotation_marks(tmp_path):
    rows = [
        *ROWS,
        ('"Great, they said', "pos"),
        ('"Awful" they said', "neg"),
        ('say ""hi""', "pos"),
    ]
    columns = read(write_file(tmp_path, unquoted(rows, separator="\t"), "d.tsv"))
    assert pairs(columns) == rows
    assert columns.notes == ()
    rows.append(('"all of it"', "pos"))
    columns = read(write_file(tmp_path, unquoted(rows, separator="\t"), "d.TSV"))
    assert pairs(columns) == rows
    (note,) = columns.notes
    assert "1 values of column 'text' keep the quotation marks around them" in note
    assert "first: line 65" in note
    assert "call the file .csv and give --separator tab" in note


@pytest.mark.parametrize(("separator", "name"), [(";", "';'"), ("\t", "tab"), ("|", "'|'")])
def test_another_separator_is_suggested_and_can_be_set(tmp_path, separator, name):
    path = write_file(tmp_path, unquoted(separator=separator))
    with pytest.raises(DataError) as refusal:
        read(path)
    assert f"give --separator {name}" in str(refusal.value)
    assert pairs(read(path, separator=separator)) == ROWS


@pytest.mark.parametrize("tab", ["tab", "\\t", "\t"])
def test_the_separator_can_be_any_name_of_a_tab(tmp_path, tab):
    assert pairs(read(write_file(tmp_path, unquoted(separator="\t")), separator=tab)) == ROWS


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
def test_a_file_without_rows_or_columns_is_refused(tmp_path, content, reason):
    with pytest.raises(DataError, match=rf"d\.csv:? {reason}"):
        read(write_file(tmp_path, content))


def test_a_text_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    limit = csv.field_size_limit()
    rows = [("x" * (limit + 1), "pos"), ("y", "neg")]
    assert pairs(read(write_file(tmp_path, unquoted(rows)))) == rows
    assert csv.field_size_limit() == limit


LONG_TEXTS = ["x" * 70_000, "one, two " * 9_000, 'say "hi"\n' * 9_000, '"' * 70_001, "😀 " * 40_000]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=["word", "commas", "lines", "marks", "emoji"])
@pytest.mark.parametrize("blanks", ["", " " * 70_000, "\u00a0"])
def test_a_long_text_is_read_without_the_blanks_around_it(tmp_path, text, blanks):
    rows = [(blanks + text + blanks, "pos"), ("y", "neg")]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), *rows])
    expected = [(text.strip(), "pos"), ("y", "neg")]
    assert pairs(read(write_file(tmp_path, buffer.getvalue()))) == expected
    if "\n" not in text:
        plain = write_file(tmp_path, unquoted(rows, separator="\t"), "d.tsv")
        assert pairs(read(plain)) == expected


def test_quotation_marks_after_a_blank_are_part_of_the_value_and_get_a_note(tmp_path):
    content = unquoted() + 'a, "pos"\nb,  "neg" \n "c",neg\n"""d""",pos\n"e","pos"\n'
    columns = read(write_file(tmp_path, content))
    assert pairs(columns)[60:] == [
        ("a", '"pos"'),
        ("b", '"neg"'),
        ('"c"', "neg"),
        ('"d"', "pos"),
        ("e", "pos"),
    ]
    in_texts, in_labels = columns.notes
    assert "1 values of column 'text' keep the quotation marks" in in_texts
    assert "first: line 64" in in_texts
    assert "2 values of column 'label' keep the quotation marks" in in_labels
    assert "first: line 62" in in_labels
    assert all(
        "remove the blanks between separators and quotation marks" in n for n in columns.notes
    )


def test_a_separator_in_quotation_marks_after_a_blank_is_refused_for_the_blank(tmp_path):
    path = write_file(tmp_path, unquoted() + 'pos, "one, two"\n')
    with pytest.raises(
        DataError, match=r"line 62: 3 fields, .*: remove the blank in front of a quo"
    ):
        read(path)


def test_a_field_of_lines_that_look_like_rows_gets_a_note_if_their_labels_are_unknown(tmp_path):
    stray = '"great, they said,x1\nsecond,x2\nthird,x3\nthey said awful",x4\n'
    columns = read(write_file(tmp_path, unquoted() + stray.replace("great, they", "great they")))
    (note,) = columns.notes
    assert note.startswith("one field holds several lines that have as many separators as rows")
    assert "first: lines 62 to 65, 4 lines in one field" in note
    assert "a stray quotation mark opens the field" in note


def test_a_poem_with_commas_gets_a_note_and_prose_of_several_lines_gets_none(tmp_path):
    poem = "Roses are red, violets are blue\nsugar is sweet,\nand so, my dear, are you"
    letter = "Dear John\nthe red, the blue, and the green one\nare yours"
    for text, notes in ((poem, 1), (letter, 0)):
        columns = read(write_file(tmp_path, unquoted() + f'"{text}",pos\n'))
        assert pairs(columns)[60:] == [(text, "pos")]
        assert len(columns.notes) == notes


def test_a_field_of_many_lines_is_judged_by_its_first_thousand(tmp_path):
    swallowed = unquoted(ROWS * 40).removeprefix("text,label\n")
    path = write_file(tmp_path, unquoted() + f'"great,pos\n{swallowed}awful",pos\n')
    with pytest.raises(
        DataError, match="lines 62 to 2463: one field in quotation marks holds 1000"
    ):
        read(path)


@pytest.mark.parametrize(
    "header", ["text,label", "\ufefftext,label", "Text, LABEL", '"text","label"']
)
def test_a_repeated_header_is_counted_and_is_not_a_row(tmp_path, header):
    path = write_file(tmp_path, unquoted() + header + "\n" + "a text,pos\n" + header + "\n")
    columns = read(path)
    assert pairs(columns) == [*ROWS, ("a text", "pos")]
    assert columns.headers == 2
    assert list(columns.numbers)[-1] == 63


def test_a_row_with_the_name_of_one_column_is_a_row(tmp_path):
    rows = [*ROWS, ("some text", "label"), ("text", "pos")]
    columns = read(write_file(tmp_path, unquoted(rows)))
    assert (pairs(columns), columns.headers) == (rows, 0)


def test_a_repeated_header_in_another_order_is_refused(tmp_path):
    with pytest.raises(DataError, match="line 62: the columns are named again, in another order"):
        read(write_file(tmp_path, unquoted() + "label,text\npos,a text\n"))


@pytest.mark.parametrize("separator", [",", ";", "|", "\t", "¦"])
@pytest.mark.parametrize("line", ["sep={}\n", '"sep={}"\r\n', "\ufeffSEP={}\n"])
def test_a_sep_line_sets_the_separator_and_is_not_a_row(tmp_path, separator, line):
    path = write_file(tmp_path, line.format(separator) + unquoted(separator=separator))
    columns = read(path)
    assert pairs(columns) == ROWS
    assert columns.numbers[0] == 3
    wrong = write_file(tmp_path, line.format("x") + unquoted(separator=separator), "e.csv")
    assert pairs(read(wrong, separator=separator)) == ROWS
