"""The static rules on the models in the onnx wheel: exactly those that draw or train are flagged.

`python -m tests.export.test_corpus` measures the time of the rules, without the time to build the
models.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnx.backend.test
from onnx.backend.test.loader import load_model_tests

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.operators import check_operators
from evalmode.export.graph import Graph, graph_of, open_graph, serialise
from evalmode.export.graph.suspicious_weights import mask_like, non_finite_weights
from evalmode.export.rules import opaque_op, stochastic_op, training_mode
from evalmode.export.rules.subject import Subject

DRAW = {
    f"test_bernoulli{kind}{form}" for kind in ("", "_double", "_seed") for form in ("", "_expanded")
}
TRAIN = {
    *("test_batchnorm_epsilon_training_mode", "test_batchnorm_example_training_mode"),
    *("test_adagrad", "test_adagrad_multiple", "test_adam", "test_adam_multiple"),
    *("test_momentum", "test_momentum_multiple", "test_nesterov_momentum"),
    *("test_gradient_of_add", "test_gradient_of_add_and_mul"),
}
# Their mode and their rate are inputs of the model, so the caller may pass another rate than the 0
# of an example.
THE_CALLER_DECIDES = {
    f"test_training_dropout{kind}{mask}"
    for kind in ("", "_default", "_zero_ratio")
    for mask in ("", "_mask")
}
# Some models that a careless rule would flag.
MUST_PASS = {
    *(
        "test_dropout_default",
        "test_dropout_default_mask",
        "test_dropout_default_ratio",
        "test_dropout_default_old",
    ),
    *(
        "test_dropout_random_old",
        "test_batchnorm_example",
        "test_affine_grid_2d",
        "test_if",
        "test_loop11",
    ),
    *(
        "test_scan9_sum",
        "test_sequence_map_identity_1_sequence",
        "test_range_float_type_positive_delta_expanded",
    ),
}


@cache
def corpus() -> tuple[Graph, ...]:
    return tuple(graphs())


def graphs() -> Iterator[Graph]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's own arithmetic
        cases = load_model_tests(kind="node")
    for case in cases:
        yield graph_of(case.model, name=case.name)
    for path in files():
        graph = open_graph(path)
        yield Graph(
            proto=graph.proto, name=path.parent.name, nodes=graph.nodes, weights=graph.weights
        )


def files() -> list[Path]:
    return sorted(Path(onnx.backend.test.__file__).parent.rglob("*.onnx"))


def verdicts(check: object) -> dict[Verdict, set[str]]:
    graph_names: dict[Verdict, set[str]] = {
        Verdict.PASS: set(),
        Verdict.FAIL: set(),
        Verdict.UNPROVEN: set(),
    }
    for graph in corpus():
        record: Record = check(Subject(graph=graph))  # type: ignore[operator]
        graph_names[record.verdict].add(graph.name)
    return graph_names


def test_the_corpus_is_complete() -> None:
    assert len(corpus()) >= 2033
    assert {graph.name for graph in corpus()} >= DRAW | TRAIN | THE_CALLER_DECIDES | MUST_PASS


def test_exactly_the_models_that_draw_are_flagged() -> None:
    graph_names = verdicts(stochastic_op.check)
    assert graph_names[Verdict.FAIL] == DRAW
    assert not graph_names[Verdict.UNPROVEN]


def test_exactly_the_models_that_train_are_flagged() -> None:
    graph_names = verdicts(training_mode.check)
    assert graph_names[Verdict.FAIL] == TRAIN
    assert graph_names[Verdict.UNPROVEN] == THE_CALLER_DECIDES


def test_no_operator_of_the_corpus_is_opaque() -> None:
    graph_names = verdicts(opaque_op.check)
    assert not graph_names[Verdict.FAIL] | graph_names[Verdict.UNPROVEN]


def test_the_service_refuses_exactly_the_models_that_draw_or_train() -> None:
    refused = set()
    # A graph that was opened from a file lacks the values of its weights.
    contents = {path.parent.name: path.read_bytes() for path in files()}
    for graph in corpus():
        try:
            check_operators(contents.get(graph.name) or serialise(graph.proto))
        except BundleNotCertified:
            refused.add(graph.name)
    assert refused == DRAW | TRAIN | THE_CALLER_DECIDES


def test_no_weight_of_the_corpus_looks_like_a_mask_or_holds_a_nan() -> None:
    assert not [graph.name for graph in corpus() if mask_like(graph) or non_finite_weights(graph)]


if __name__ == "__main__":
    started = time.perf_counter()
    models = corpus()
    built = time.perf_counter()
    for graph in models:
        for rule in (stochastic_op, training_mode, opaque_op):
            rule.check(Subject(graph=graph))
    print(
        f"{len(models)} models: {built - started:.2f} s to build and open,"
        f" {time.perf_counter() - built:.2f} s to judge"
    )
