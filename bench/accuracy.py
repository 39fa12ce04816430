"""Measures the accuracy of a running server on files of labelled texts, and how sure it is.

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
# Predictions with this score or more count as sure.
SURE_SCORE = 0.9


def main(url: str, *files: str) -> None:
    """Measure and print, with a line for each file."""
    table = Table(
        "file",
        "texts",
        "accuracy",
        f"accuracy at score >= {SURE_SCORE}",
        "share of texts at that score",
    )
    with httpx.Client(base_url=url, timeout=60) as client:
        for file in files:
            rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
            answers = []
            for first in track(
                range(0, len(rows), TEXTS_A_REQUEST), description=file, transient=True
            ):
                texts = [row["text"] for row in rows[first : first + TEXTS_A_REQUEST]]
                response = client.post("/v1/predict", json={"inputs": texts, "top_k": 1})
                answers += response.raise_for_status().json()["predictions"]
            hits, sure_hits = [], []
            for answer, row in zip(answers, rows, strict=True):
                hits.append(answer["label"] == row["label"])
                if answer["score"] >= SURE_SCORE:
                    sure_hits.append(hits[-1])
            sure_accuracy = f"{sum(sure_hits) / len(sure_hits):.4f}" if sure_hits else "none"
            table.add_row(
                Path(file).name,
                str(len(rows)),
                f"{sum(hits) / len(hits):.4f}",
                sure_accuracy,
                f"{len(sure_hits) / len(rows):.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
