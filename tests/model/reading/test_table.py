"""Exactly the named file is opened, and any other file is refused in one sentence."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
from pathlib import Path

import pytest

from evalmode.model.data_set import DataError
from evalmode.model.reading.table import open_table

ROWS = "text,label\na,x\n"


def refusal_of(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as error, open_table(path, **options):
        pass
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["d[1].csv", "x?.csv", "*.csv", "$HOME.csv", "~.csv", "a::b.csv", "{a,b}.csv", "-.csv"]
)
def test_a_file_name_is_never_a_pattern(tmp_path, name, monkeypatch):
    for other in ("d1.csv", "xy.csv", "a.csv", "b.csv"):
        (tmp_path / other).write_text("wrong,file\na,x\n")
    folder = tmp_path / "in [a] folder"
    folder.mkdir()
    for path in (tmp_path / name, folder / name):
        path.write_text(ROWS)
        with open_table(path) as table:
            assert table.names == ("text", "label")


def test_a_path_that_is_not_a_regular_file_is_refused_at_once(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder and not a regular file" in refusal_of(tmp_path / "folder.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a FIFO and not a regular file" in refusal_of(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    assert "is a device and not a regular file" in refusal_of(tmp_path / "device.csv")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.csv"))
        assert "is a socket and not a regular file" in refusal_of(tmp_path / "socket.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    assert "cannot be opened" in refusal_of(tmp_path / "loop.csv")
    assert "does not exist" in refusal_of(tmp_path / "absent.csv")
    assert "cannot be opened" in refusal_of(tmp_path / ("x" * 300 + ".csv"))


@pytest.mark.parametrize("name", ["d.xlsx", "d.json", "d", "d.csv.gz"])
def test_the_error_about_an_unknown_ending_lists_the_known_ones(tmp_path, name):
    message = refusal_of(tmp_path / name)
    assert ".csv, .tsv, .jsonl, .ndjson, .parquet" in message
    assert ("unpack it" in message) == name.endswith(".gz")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip.compress(ROWS.encode(), mtime=0), "gzip data"),
        (bz2.compress(ROWS.encode() * 99), "bzip2 data"),
        (lzma.compress(ROWS.encode()), "xz data"),
        (b"PK\x03\x04" + bytes(99), "zip (so are Excel's files) data"),
        (b"%PDF-1.4\n\xe2\xe3\n", "PDF data"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9), "Excel data"),
        (ROWS.encode("utf-16"), "UTF-16 data"),
        (ROWS.encode("utf-16-be").join((b"\xfe\xff", b"")), "UTF-16 data"),
        (ROWS.encode("utf-32"), "UTF-32 data"),
        (ROWS.encode("utf-32-be").join((b"\0\0\xfe\xff", b"")), "UTF-32 data"),
        (ROWS.encode("utf-16-le"), "line 1: byte 2 of the file is a NUL byte"),
        (
            b"text,label\nfine,x\nbad \xe9,y\n",
            "line 3: byte 23 of the file is 0xe9, which is not UTF-8",
        ),
        (b"\xef\xbb\xbftext,label\n\xff,y\n", "line 2: byte 15 of the file is 0xff"),
        (b"\xef\xbb\xbftext,label\na\0b,y\n", "line 2: byte 16 of the file is a NUL byte"),
        ("é".encode() * 40_000 + b"\n\xc3", "line 2: byte 80002 of the file is 0xc3"),
        (b"x" * 65_535 + "é".encode() + b"\xe9", "line 1: byte 65538 of the file is 0xe9"),
        (b"text,label\na\0b,y\n", "line 2: byte 13 of the file is a NUL byte"),
    ],
    ids=[
        *(
            "gzip",
            "bzip2",
            "xz",
            "zip",
            "pdf",
            "xls",
            "utf-16",
            "utf-16-be",
            "utf-32",
            "utf-32-be",
            "utf-16-le",
        ),
        *("latin-1", "after a mark", "nul after a mark", "cut short", "far behind", "nul"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_file_that_is_not_utf_8_is_refused_with_line_and_byte(tmp_path, data, reason, ending):
    path = tmp_path / f"d.{ending}"
    path.write_bytes(data)
    assert reason in refusal_of(path)


def test_a_column_may_have_the_name_of_a_binary_signature(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("PAR1,label\na,x\n")
    with open_table(path) as table:
        assert table.names == ("PAR1", "label")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_separator_can_be_set_for_csv_and_tsv_only(tmp_path, ending):
    assert "remove --separator" in refusal_of(tmp_path / f"d.{ending}", separator=";")
