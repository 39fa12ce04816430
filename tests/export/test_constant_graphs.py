"""Each `pass` and `fail` on a random graph of constants agrees with ONNX Runtime.

The seeds of the 2,000 graphs are fixed; `python bench/constant_graphs.py` draws new ones.
"""

from __future__ import annotations

import random
from collections import Counter

from evalmode.bundle.certificate import Verdict
from evalmode.export.graph import ModelUnreadable, read_graph
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject
from tests.export.constant_graphs import Runtime, Writer


def test_the_runtime_never_drops_after_a_pass_and_always_after_a_fail() -> None:
    counts = Counter[str]()
    with Runtime() as runtime:
        for seed in range(2000):
            model = Writer(random.Random(seed)).model()
            try:
                graph = read_graph(model.SerializeToString(), name="random.onnx")
                verdict = training_mode.check(Subject(graph=graph)).verdict
            except ModelUnreadable:
                continue
            if verdict is Verdict.UNPROVEN:
                continue
            drops = runtime.drops(model)
            expected = {verdict is Verdict.FAIL}
            assert drops <= expected, f"seed {seed}: {verdict}, and the runtime drops: {drops}"
            counts[verdict] += bool(drops)
    # The test proves nothing unless many graphs are decided and run.
    assert min(counts[Verdict.PASS], counts[Verdict.FAIL]) > 50, counts
