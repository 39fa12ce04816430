from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from evalmode.bundle.certificate import Certificate, Record, Verdict, relative_difference

PASS, FAIL, UNPROVEN, NOT_APPLICABLE = (
    Verdict.PASS,
    Verdict.FAIL,
    Verdict.UNPROVEN,
    Verdict.NOT_APPLICABLE,
)


@pytest.fixture
def certificate(parts) -> Certificate:
    return parts().certificate.sealed()


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        ((), UNPROVEN),
        ((NOT_APPLICABLE,), UNPROVEN),
        ((PASS,), PASS),
        ((PASS, NOT_APPLICABLE), PASS),
        ((PASS, UNPROVEN), UNPROVEN),
        ((PASS, UNPROVEN, FAIL), FAIL),
        ((FAIL, PASS), FAIL),
    ],
)
def test_a_certificate_is_as_good_as_its_worst_record_and_nothing_proves_nothing(
    certificate, verdicts, verdict
):
    records = tuple(Record(rule="rule", verdict=entry, why="why") for entry in verdicts)
    assert certificate.model_copy(update={"records": records}).verdict is verdict


def test_a_seal_holds_for_what_was_sealed(certificate):
    assert certificate.seal_holds
    assert certificate.sealed() == certificate
    assert Certificate.model_validate_json(certificate.canonical()) == certificate


@pytest.mark.parametrize(
    "change",
    [{"digest": "0" * 64}, {"records": ()}, {"tolerance": 1.0}, {"row_counts": {}}, {"seal": ""}],
)
def test_a_seal_does_not_hold_for_anything_else(certificate, change):
    assert not certificate.model_copy(update=change).seal_holds


def test_numbers_in_a_certificate_survive_being_written(certificate):
    exact = certificate.model_copy(
        update={"tolerance": 0.1 + 0.2, "row_counts": {4: (1,), 16: (1, 2)}}
    ).sealed()
    read = Certificate.model_validate_json(exact.canonical())
    assert read.seal_holds
    assert (read.tolerance, read.row_counts) == (0.1 + 0.2, {4: (1,), 16: (1, 2)})


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        (array(1, 2, 3), array(1, 2, 3), 0),
        (array(1, 2, 4), array(1, 2, 3), 1 / math.sqrt(2 / 3)),
        (array(5), array(4), 1),
        (array(), array(), 0),
        (array(1, math.nan), array(1, math.nan), 0),
        (array(math.inf, 1), array(math.inf, 1), 0),
        (array(1, math.nan), array(1, 2), math.inf),
        (array(1, 2), array(1, math.nan), math.inf),
        (array(math.inf, 1), array(-math.inf, 1), math.inf),
        (array(1, 2, 3), array(1, 2), math.inf),
        (array(math.nan), array(math.nan), 0),
    ],
)
def test_a_difference_is_measured_in_standard_deviations_of_the_reference(
    actual, reference, expected
):
    assert relative_difference(actual, reference) == pytest.approx(expected)


ROWS = st_numpy.arrays(np.float32, (2, 5), elements=st.floats(-1e6, 1e6, width=32))


@given(ROWS)
def test_nothing_differs_from_itself(reference):
    assert relative_difference(reference.copy(), reference) == 0


@given(ROWS, st.sampled_from([2.0**-20, 2.0**20]))
def test_the_scale_of_the_numbers_does_not_matter(reference, scale):
    reference = np.round(reference)
    actual = reference.copy()
    actual[0, 0] += 1
    expected = relative_difference(actual, reference)
    if reference.std() > 0:
        scale = np.float32(scale)
        assert relative_difference(actual * scale, reference * scale) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"runtime": "onnxruntime 1.31.1"}, "ONNX Runtime 1.0 there, 1.31.1 here"),
        (
            {"provider": "CUDAExecutionProvider"},
            "provider CPUExecutionProvider there, CUDAExecutionProvider here",
        ),
        ({"threads": 4}, "threads 1 there, 4 here"),
        ({"architecture": "aarch64"}, "architecture x86_64 there, aarch64 here"),
        ({"cpu_features": ("avx512f", "avx2")}, "CPU features none more there, avx512f here"),
        ({"cpu_features": ()}, "CPU features avx2 there, none more here"),
    ],
)
def test_every_difference_of_two_platforms_is_named(certificate, changed, sentence):
    there = certificate.platform
    here = there.model_copy(update=changed)
    assert [str(difference) for difference in there.differences(here)] == [sentence]
    assert there.differences(there) == here.differences(here) == ()


def test_several_differences_are_named_in_the_order_of_the_platforms_fields(certificate):
    there = certificate.platform
    here = there.model_copy(update={"threads": 2, "runtime": "onnxruntime 2.0"})
    assert [difference.what for difference in there.differences(here)] == [
        "ONNX Runtime",
        "threads",
    ]


def test_platforms_that_differ_in_any_field_have_differences(certificate):
    there = certificate.platform
    replacements = {int: 7, str: "another", tuple: ("another",)}
    for name in type(there).model_fields:
        replacement = replacements[type(getattr(there, name))]
        assert there.differences(there.model_copy(update={name: replacement})), name
