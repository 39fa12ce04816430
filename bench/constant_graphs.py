"""Compares the verifier with ONNX Runtime on random graphs of constants.

    python bench/constant_graphs.py [--graphs N] [--seed N]

A graph with the verdict `pass` must not drop, and one with `fail` must. The exit code is 1 after a
single difference, whose seed is printed. The test suite has 2,000 of these graphs.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from evalmode.bundle.certificate import Verdict
from evalmode.export.graph import ModelUnreadable, read_graph
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject
from tests.export.constant_graphs import Runtime, Writer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    arguments = parser.parse_args()
    counts = Counter[tuple[str, str]]()
    differences = []
    with Runtime() as runtime:
        for index in track(range(arguments.graphs), "graphs", transient=True):
            seed = arguments.seed + index
            model = Writer(random.Random(seed)).model()
            try:
                graph = read_graph(model.SerializeToString(), name="random.onnx")
                verdict = training_mode.check(Subject(graph=graph)).verdict
            except ModelUnreadable:
                counts["unreadable", "not run"] += 1
                continue
            # With and without optimisation. An empty set means that the runtime refuses the model.
            drops = runtime.drops(model)
            if verdict is not Verdict.UNPROVEN and not drops <= {verdict is Verdict.FAIL}:
                differences.append(seed)
            if not drops:
                behaviour = "refuses it"
            elif drops == {True}:
                behaviour = "drops"
            elif drops == {False}:
                behaviour = "does not drop"
            else:
                behaviour = "drops with or without optimisation"
            counts[verdict, behaviour] += 1
    table = Table("verdict", "ONNX Runtime", "graphs", title=f"seed {arguments.seed}")
    for (verdict, behaviour), count in sorted(counts.items()):
        table.add_row(verdict, behaviour, f"{count:,}")
    table.add_row("differences", "", f"{len(differences):,}")
    console = Console()
    console.print(table)
    if differences:
        console.print(f"seeds that differ: {differences[:20]}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
