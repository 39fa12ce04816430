"""The known answers of a small exact bundle, under everything that this machine can run.

All comparisons are with the outputs in the bundle. Rows of different lengths share a batch, padded
to the longest, and each batch size gives them other neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from evalmode.bundle.known_answers import KnownAnswer
from evalmode.bundle.session import Optimisation, open_session
from evalmode.bundle.store import Bundle, open_bundle
from evalmode.export.exact.integer_kernels import with_integer_kernels
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.export.release import Released
from evalmode.model.checkpoint import Checkpoint
from tests.conftest import make_checkpoint
from tests.export.exact.test_integer_kernels import limits_of
from tests.export.test_exact_network import network

LEVELS: tuple[Optimisation, ...] = ("off", "basic", "extended", "all")

# Logits (B, C) of ids (B, T, G).
Run = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    # With 7 bits the integer kernels are exact on processors without VNNI too.
    return make_checkpoint(network(weight_bits=7))


@pytest.fixture(scope="module")
def exact(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    released = release_checkpoint(
        checkpoint,
        root=tmp_path_factory.mktemp("bundles"),
        name="exact",
        version="1",
        progress=lambda step: None,
    )
    return open_bundle(released.path)


@pytest.fixture(scope="module", params=["float kernels", "integer kernels"])
def graph(request: pytest.FixtureRequest, exact: Bundle, checkpoint: Checkpoint) -> bytes:
    if request.param == "float kernels":
        return exact.model
    model = with_integer_kernels(onnx.load_from_string(exact.model), limits_of(checkpoint.module))
    return bytes(model.SerializeToString())


def differing_rows(run: Run, answers: Sequence[KnownAnswer], *, row_counts: Sequence[int]) -> int:
    """How many rows have other bits than their known answer, over one batch of each row count."""
    longest = max(answer.inputs["input_ids"].shape[1] for answer in answers)
    differing = 0
    for count in row_counts:
        order = np.random.default_rng(count).integers(0, len(answers), count).tolist()
        groups = answers[0].inputs["input_ids"].shape[2]
        batch = np.zeros((count, longest, groups), np.int64)
        for position, index in enumerate(order):
            ids = answers[index].inputs["input_ids"][0]
            batch[position, : len(ids)] = ids
        logits = run(batch)
        assert logits.dtype == np.float32
        differing += sum(
            logits[position].tobytes() != answers[index].outputs["logits"].tobytes()
            for position, index in enumerate(order)
        )
    return differing


def on_onnx_runtime(model: bytes, *, optimisation: Optimisation, threads: int) -> Run:
    session = open_session(model, optimisation=optimisation, threads=threads)
    return lambda ids: session.run({"input_ids": ids})["logits"]


class GatherElements(OpRun):
    """The operator for any number of elements: that of onnx 1.23 fails for more than 64."""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


def on_reference_evaluator(model: bytes) -> Run:
    evaluator = ReferenceEvaluator(onnx.load_from_string(model), new_ops=[GatherElements])
    return lambda ids: evaluator.run(["logits"], {"input_ids": ids})[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
def test_onnx_runtime_gives_the_known_answers_at_every_row_count(
    exact: Bundle, graph: bytes, level: Optimisation, threads: int
) -> None:
    run = on_onnx_runtime(graph, optimisation=level, threads=threads)
    assert differing_rows(run, exact.known_answers(), row_counts=range(1, 65)) == 0


def test_the_reference_evaluator_gives_the_known_answers(exact: Bundle, graph: bytes) -> None:
    run = on_reference_evaluator(graph)
    assert differing_rows(run, exact.known_answers(), row_counts=(1, 2, 7, 64)) == 0


def test_pytorch_gives_the_known_answers_at_every_row_count(
    exact: Bundle, checkpoint: Checkpoint
) -> None:
    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        return checkpoint.module(torch.from_numpy(ids)).numpy()

    assert differing_rows(run, exact.known_answers(), row_counts=range(1, 65)) == 0


def test_a_float32_bundle_has_other_bits_in_the_same_comparisons(released: Released) -> None:
    bundle = open_bundle(released.path)
    answers = bundle.known_answers()
    runs = [
        on_onnx_runtime(bundle.model, optimisation="off", threads=1),
        on_reference_evaluator(bundle.model),
    ]
    for run in runs:
        assert differing_rows(run, answers, row_counts=range(1, 17)) > 0
