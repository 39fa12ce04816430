"""How often a running server is right on a file of labelled texts, and how sure it is. Talks HTTP
only.

    python bench/accuracy.py http://localhost:8000 sentences.jsonl

Each line of the file is {"text": "...", "label": "..."}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

TEXTS_A_REQUEST = 200
SURE = 0.9


def main(url: str, *files: str) -> None:
    """Measure and print, a line a file."""
    table = Table(
        "file", "texts", "accuracy", f"accuracy at score >= {SURE}", "share of texts at that score"
    )
    with httpx.Client(base_url=url, timeout=60) as client:
        for file in files:
            rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
            answers = []
            for first in track(
                range(0, len(rows), TEXTS_A_REQUEST), description=file, transient=True
            ):
                texts = [row["text"] for row in rows[first : first + TEXTS_A_REQUEST]]
                answer = client.post("/v1/predict", json={"inputs": texts, "top_k": 1})
                answers += answer.raise_for_status().json()["predictions"]
            right = [
                answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)
            ]
            sure = [
                hit for hit, answer in zip(right, answers, strict=True) if answer["score"] >= SURE
            ]
            among_sure = f"{sum(sure) / len(sure):.4f}" if sure else "none"
            table.add_row(
                Path(file).name,
                str(len(rows)),
                f"{sum(right) / len(right):.4f}",
                among_sure,
                f"{len(sure) / len(rows):.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
