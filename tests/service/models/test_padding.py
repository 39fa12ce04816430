"""Rows of several lengths in one batch of a model of text."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.service.batching.engine import Engine
from evalmode.service.models.calibration import Calibration
from evalmode.service.models.model import Model
from evalmode.service.models.tensors import content_of
from tests.conftest import make_checkpoint
from tests.export.test_exact_network import network
from tests.service.bundles import as_proved, make_bundle, tiny_model
from tests.service.by_hand import answer_alone

TEXTS = ["a", "a few words", "words of a text that is as long as the model reads", "b", "c d"]


@pytest.mark.parametrize("kernels", ["float", "integer"])
def test_rows_of_all_lengths_of_an_exact_model_have_their_own_bits_in_one_batch(
    tmp_path: Path, kernels: str
) -> None:
    released = release_checkpoint(
        make_checkpoint(network(weight_bits=7)),
        root=tmp_path,
        name="exact",
        version="1",
        progress=lambda step: None,
        kernels=kernels,
    )
    model = Model.open(released.path)
    assert all(bucket.pads_rows for bucket in model.buckets)
    jobs, _ = model.text_rows(TEXTS)
    assert len({bucket.label for bucket, _ in jobs}) > 1
    expected = [content_of(answer_alone(job)) for job in jobs]

    rows = [row for _, row in jobs]
    assert [content_of(answer) for answer in jobs[0][0].run(rows)] == expected
    # The engine chooses what runs together, and every answer is proved.
    engine = Engine(parallel=1, content=content_of, proof_fraction=1.0)
    answers = engine.answer(jobs)
    assert engine.close(timeout_s=30)
    assert [content_of(answer) for answer in answers] == expected


def with_length_in_its_logits() -> bytes:
    """The tiny model, whose logits have the padded length added."""
    model = onnx.load_from_string(tiny_model())
    graph = model.graph
    graph.node[-1].output[0] = "without_length"
    graph.node.extend(
        [
            helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
            helper.make_node("Cast", ["length"], ["float_length"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["without_length", "float_length"], ["logits"]),
        ]
    )
    return model.SerializeToString()


@pytest.mark.parametrize("forged", [False, True])
def test_a_model_whose_padding_changes_bits_never_pads_whatever_its_certificate_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forged: bool
) -> None:
    bundle = make_bundle(
        tmp_path,
        model=with_length_in_its_logits(),
        certify=as_proved if forged else lambda certificate: certificate,
    )
    model = Model.open(bundle, calibration=Calibration(budget_s=60))
    assert not any(bucket.pads_rows for bucket in model.buckets)
    assert ("padding changes its bits" in caplog.text) == forged
