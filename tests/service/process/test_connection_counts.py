"""The counts of connections that processes share."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from evalmode.service.process.connection_counts import ConnectionCounts


def written(folder: Path, pid: int, count: int) -> Path:
    """The count of another process."""
    path = folder / "connections" / str(pid)
    path.write_bytes(struct.pack("=q", count))
    return path


def test_the_lowest_count_is_that_of_another_process(tmp_path: Path) -> None:
    counts = ConnectionCounts(tmp_path)
    counts.publish(1)
    assert counts.lowest_of_others() is None
    written(tmp_path, os.getppid(), 5)
    written(tmp_path, 1, 7)
    assert counts.lowest_of_others() == 5


def test_a_count_is_read_again_each_time(tmp_path: Path) -> None:
    counts = ConnectionCounts(tmp_path)
    path = written(tmp_path, os.getppid(), 5)
    assert counts.lowest_of_others() == 5
    with path.open("r+b") as file:
        file.write(struct.pack("=q", 6))
    assert counts.lowest_of_others() == 6


def test_another_process_reads_what_was_published(tmp_path: Path) -> None:
    counts = ConnectionCounts(tmp_path)
    program = """
import sys
from pathlib import Path
from evalmode.service.process.connection_counts import ConnectionCounts
print(ConnectionCounts(Path(sys.argv[1])).lowest_of_others())
"""
    for count in (3, 0, None):
        counts.publish(count)
        process = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.strip() == str(count)


def test_the_count_of_a_process_that_has_ended_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    counts = ConnectionCounts(tmp_path)
    path = written(tmp_path, ended.pid, 0)
    assert counts.lowest_of_others() is None
    assert not path.exists()


def test_a_file_that_is_no_count_is_ignored(tmp_path: Path) -> None:
    counts = ConnectionCounts(tmp_path)
    (tmp_path / "connections" / "other").write_text("")
    (tmp_path / "connections" / "1").write_bytes(b"")
    assert counts.lowest_of_others() is None


def test_without_the_folder_there_are_no_others(tmp_path: Path) -> None:
    counts = ConnectionCounts(tmp_path)
    written(tmp_path, os.getppid(), 5)
    shutil.rmtree(tmp_path / "connections")
    counts.publish(3)
    assert counts.lowest_of_others() is None
