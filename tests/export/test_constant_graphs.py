"""Every `pass` and `fail` on a random graph of constants is what ONNX Runtime does.

The same 2,000 graphs each time; `python bench/constant_graphs.py` draws others.
"""

from __future__ import annotations

import random
from collections import Counter

from evalmode.bundle.certificate import Verdict
from evalmode.export.graph import ModelUnreadable, read_graph
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject
from tests.export.constant_graphs import Runtime, Writer


def test_a_pass_never_drops_and_a_fail_does() -> None:
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
            seen = runtime.drops(model)
            expected = {verdict is Verdict.FAIL}
            assert seen <= expected, f"seed {seed}: {verdict}, and the runtime drops: {seen}"
            counts[verdict] += bool(seen)
    # The test would say nothing if hardly any graph was decided and ran.
    assert min(counts[Verdict.PASS], counts[Verdict.FAIL]) > 50, counts
