"""The same rows under other settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from evalmode.bundle.comparison import (
    OTHER_ROUNDINGS,
    Setting,
    compare,
    rows_of,
    settings_for,
)
from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import open_bundle
from tests.service.bundles import SPEC, TEXTS, make_bundle, onnx_model, tensor_bundle, tiny_model


def integer_model() -> bytes:
    """y = floor(x @ w / 4) + 1/2 for x (B, 64) of integers: every number is exact.

    An output of 0 would be -0.0 in the rounding mode "down", hence the 1/2.
    """
    weights = np.random.default_rng(3).integers(-9, 9, (64, 8)).astype(np.float32)
    node = helper.make_node
    return onnx_model(
        [
            node("MatMul", ["x", "w"], ["product"]),
            node("Mul", ["product", "quarter"], ["quotient"]),
            node("Floor", ["quotient"], ["floor"]),
            node("Add", ["floor", "half"], ["y"]),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        weights={
            "w": weights,
            "quarter": np.array(0.25, np.float32),
            "half": np.array(0.5, np.float32),
        },
    )


def integer_rows(count: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    return [{"x": random.integers(-9, 9, (1, 64)).astype(np.float32)} for _ in range(count)]


def test_a_model_that_never_rounds_has_the_same_bits_under_every_setting(tmp_path: Path) -> None:
    bundle = open_bundle(
        tensor_bundle(tmp_path, model=integer_model(), known_inputs=integer_rows(40))
    )
    settings = settings_for(bundle)
    assert Setting(batch_rows=32) in settings
    assert Setting(rounding="up") in settings
    # Rows of tensors are not padded.
    assert {setting.padding for setting in settings} == {"ladder"}
    comparisons = compare(bundle, rows_of(bundle, count=40), settings)
    assert [comparison.differing for comparison in comparisons] == [0] * len(settings)
    assert {comparison.rows for comparison in comparisons} == {40}


def test_a_batch_that_changes_the_order_of_additions_is_seen(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path, model=tiny_model(batchable=False)))
    rows = rows_of(bundle, count=64)
    alone, together = compare(bundle, rows, [Setting(), Setting(batch_rows=32)])
    assert alone.differing == 0
    assert together.differing > 0
    assert together.largest is not None
    assert 0 < together.largest < 1e-3


@pytest.mark.parametrize("mode", ["down", "up", "toward zero"])
def test_another_rounding_mode_changes_bits_and_ends_with_the_run(
    tmp_path: Path, mode: str
) -> None:
    bundle = open_bundle(make_bundle(tmp_path))
    rows = rows_of(bundle, count=64)
    # The second comparison would differ if the mode stayed.
    other, usual = compare(bundle, rows, [Setting(rounding=mode), Setting()])
    assert other.differing > 32
    assert usual.differing == 0
    assert 1 / 3 == 0.3333333333333333


def test_the_label_that_a_setting_changes_is_counted(tmp_path: Path) -> None:
    # All scores are equal up to rounding, so the best label is chosen by the last bits.
    bundle = open_bundle(make_bundle(tmp_path, model=tiny_model(bias=3e7)))
    (comparison,) = compare(bundle, rows_of(bundle, count=64), [Setting(rounding="up")])
    assert 0 < comparison.changed_labels <= comparison.differing


def test_answers_that_are_not_finite_have_no_largest_difference(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path, model=tiny_model(bias=float("inf"))))
    (comparison,) = compare(bundle, rows_of(bundle, count=8), [Setting(rounding="up")])
    # Infinity plus anything is infinity in every rounding mode.
    assert (comparison.differing, comparison.largest) == (0, 0.0)


def test_a_provider_that_is_missing_is_refused_beside_the_others(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path))
    settings = [Setting(provider="nonsense"), Setting()]
    refused, ran = compare(bundle, rows_of(bundle, count=4), settings)
    assert "'nonsense' is not available here" in refused.refusal
    assert (ran.refusal, ran.differing) == ("", 0)


def test_rows_are_those_of_the_texts_or_of_every_length(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path))
    frontend = bundle.frontend()
    assert frontend is not None
    rows = rows_of(bundle, ["one text", "another"], count=5)
    assert [row.tolist() for row in rows] == [
        frontend.encode(text).ids.tolist() for text in ("one text", "another")
    ]
    rows = rows_of(bundle, count=90)
    assert len(rows) == 90
    assert [row.tolist() for row in rows[: len(TEXTS)]] == [
        frontend.encode(text).ids.tolist() for text in TEXTS
    ]
    assert {SPEC.padded_length(len(row)) for row in rows} == set(SPEC.lengths)


def test_texts_for_a_model_of_tensors_are_refused(tmp_path: Path) -> None:
    bundle = open_bundle(tensor_bundle(tmp_path))
    with pytest.raises(BundleError, match="takes tensors and no texts: leave out --texts"):
        rows_of(bundle, ["a text"], count=5)


def test_a_bundle_without_known_answers_needs_texts(tmp_path: Path) -> None:
    bundle = open_bundle(tensor_bundle(tmp_path, known_inputs=[]))
    with pytest.raises(BundleError, match="has no known answers: give texts with --texts"):
        rows_of(bundle, count=5)


def test_a_setting_says_what_differs_from_the_reference() -> None:
    assert str(Setting()) == "a second run"
    assert str(Setting(optimisation="off", threads=2)) == "optimisation off, 2 threads"
    assert str(Setting(provider="cuda", batch_rows=32)) == "cuda, batches of 32"
    assert str(Setting(padding="none", rounding="up")) == "no padding, rounding up"


def test_rounding_down_makes_a_negative_zero_and_no_other_number_of_exact_integers(
    tmp_path: Path,
) -> None:
    model = onnx_model(
        [helper.make_node("Sub", ["x", "x"], ["y"])],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        weights={},
    )
    bundle = open_bundle(tensor_bundle(tmp_path, model=model, known_inputs=integer_rows(40)))
    settings = [Setting(rounding=mode) for mode in OTHER_ROUNDINGS]
    comparisons = compare(bundle, rows_of(bundle, count=40), settings)
    differing = {comparison.setting.rounding: comparison.differing for comparison in comparisons}
    assert differing == {mode: 40 if mode == "down" else 0 for mode in OTHER_ROUNDINGS}
    assert {comparison.largest for comparison in comparisons} == {0.0}
