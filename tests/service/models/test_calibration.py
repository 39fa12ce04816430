"""Which batch sizes may run, their costs, and the cache of the timings."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.bundle.certificate import Platform
from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec
from evalmode.bundle.known_answers import KnownAnswer
from evalmode.service.models.calibration import (
    ROW_COUNTS,
    Calibration,
    MeasuredBucket,
    efficient,
    every_size,
    slowest_run_s,
    text_rows_to_measure,
)

FRONTEND = NgramFrontEnd(NgramSpec(lengths=(2, 4, 8), orders=2, characters=2, vocabulary=64))
PLATFORM = Platform(runtime="any", provider="any", threads=1, architecture="any", cpu_features=())


def answer(text: str | None) -> KnownAnswer:
    return KnownAnswer(inputs={}, outputs={}, text=text)


def rows():
    return text_rows_to_measure([answer("a text")], frontend=FRONTEND, inputs={"input_ids"})


def exact(inputs):
    return {"logits": inputs["input_ids"].sum((1, 2)).astype(np.float32)}


def measure(
    run,
    *,
    cache: Path,
    budget_s: float = 10.0,
    digest: str = "0" * 64,
    platform: Platform = PLATFORM,
):
    calibration = Calibration(budget_s=budget_s, cache=cache)
    return calibration.measure(run, rows(), path=Path("here"), digest=digest, platform=platform)


def cache_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("calibration/*.json"))


@pytest.mark.parametrize("texts", [("one text", "", "another, longer text"), ("",), (None,), ()])
def test_every_length_is_measured_with_full_rows_and_with_shorter_ones(texts):
    answers = [answer(text) for text in texts]
    rows_by_label = text_rows_to_measure(answers, frontend=FRONTEND, inputs={"input_ids"})
    assert list(rows_by_label) == ["2", "4", "8"]
    for label, label_rows in rows_by_label.items():
        used = [int((row["input_ids"] > 0).any(-1).sum()) for row in label_rows]
        assert all(row["input_ids"].shape == (1, int(label), 4) for row in label_rows)
        assert max(used) == int(label)
        assert min(used) < int(label)


def test_a_model_without_batch_effects_is_stable_at_every_size(tmp_path):
    measurements = measure(exact, cache=tmp_path)
    assert [measured.stable for measured in measurements.values()] == [ROW_COUNTS] * 3


def test_costs_have_only_stable_sizes_and_fall_per_row(tmp_path):
    for measured in measure(exact, cache=tmp_path).values():
        assert 1 in measured.costs
        assert set(measured.costs) <= set(measured.stable)
        row_costs = [seconds / size for size, seconds in measured.costs.items()]
        assert row_costs == sorted(row_costs, reverse=True)


def test_without_a_budget_only_single_rows_run(tmp_path):
    for measured in measure(exact, cache=tmp_path, budget_s=0).values():
        assert measured.stable == (1,)
        assert set(measured.costs) == {1}


@pytest.mark.parametrize("noise", [count(), map(int, iter(np.arange(10**6) % 2))])
def test_a_model_that_does_not_repeat_itself_is_refused(tmp_path, noise):
    def restless(inputs):
        return {"logits": exact(inputs)["logits"] + next(noise)}

    with pytest.raises(BundleError, match="not deterministic"):
        measure(restless, cache=tmp_path)


def test_timings_are_cached_and_the_smallest_counts(tmp_path):
    measure(exact, cache=tmp_path)
    (file,) = cache_files(tmp_path)
    cached = json.loads(file.read_bytes())
    cached["4"]["8"] = 1e-12
    file.write_text(json.dumps(cached))
    assert measure(exact, cache=tmp_path)["4"].costs[8] == 1e-12
    assert json.loads(file.read_bytes())["4"]["8"] == 1e-12


def test_sizes_in_the_cache_run_only_to_compare_their_bits(tmp_path):
    batches = []

    def run(inputs):
        batches.append(len(inputs["input_ids"]))
        return exact(inputs)

    first = measure(run, cache=tmp_path)
    first_runs = len(batches)
    second = measure(run, cache=tmp_path)
    assert [each.stable for each in second.values()] == [each.stable for each in first.values()]
    repeated_runs = 4 * len(ROW_COUNTS) * len(first)
    assert len(batches) - first_runs == first_runs - repeated_runs


def test_slower_timings_do_not_change_the_cache(tmp_path):
    measure(exact, cache=tmp_path)
    (file,) = cache_files(tmp_path)
    least = {
        label: {size: seconds / 1e6 for size, seconds in costs.items()}
        for label, costs in json.loads(file.read_bytes()).items()
    }
    file.write_text(json.dumps(least))
    measurements = measure(exact, cache=tmp_path)
    assert json.loads(file.read_bytes()) == least
    for label, measured in measurements.items():
        assert dict(measured.costs) == efficient(
            {int(size): seconds for size, seconds in least[label].items()}
        )


def test_stable_sizes_are_measured_and_never_cached(tmp_path):
    measure(exact, cache=tmp_path)

    def unstable(inputs):
        logits = exact(inputs)["logits"]
        return {"logits": np.nextafter(logits, np.float32(1e9)) if len(logits) > 2 else logits}

    for measured in measure(unstable, cache=tmp_path).values():
        assert measured.stable == (1, 2)
        assert set(measured.costs) <= {1, 2}


def test_another_bundle_and_another_platform_have_other_cache_files(tmp_path):
    measure(exact, cache=tmp_path)
    measure(exact, cache=tmp_path, digest="1" * 64)
    measure(exact, cache=tmp_path, platform=PLATFORM.model_copy(update={"threads": 2}))
    measure(exact, cache=tmp_path)
    assert len(cache_files(tmp_path)) == 3


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"4": 7}',
        b'{"4": {"x": 1}}',
        b'{"4": {"8": "x"}}',
        b'{"4": {"8": -1}}',
        b"[" * 100_000,
    ],
)
def test_garbage_in_the_cache_is_ignored_and_replaced(tmp_path, garbage):
    measure(exact, cache=tmp_path)
    (file,) = cache_files(tmp_path)
    file.write_bytes(garbage)
    assert all(
        min(measured.costs.values()) > 0 for measured in measure(exact, cache=tmp_path).values()
    )
    assert set(json.loads(file.read_bytes())) == {"2", "4", "8"}


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert measure(exact, cache=tmp_path / "file")["4"].stable == ROW_COUNTS
    assert (tmp_path / "file").read_text() == "in the way"


def test_without_a_folder_timings_are_cached_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Calibration().measure(exact, rows(), path=Path("here"), digest="0" * 64, platform=PLATFORM)
    assert cache_files(tmp_path / ".cache" / "evalmode")


@pytest.mark.parametrize("budget_s", [-1.0, float("nan")])
def test_a_budget_below_0_is_refused(budget_s):
    with pytest.raises(ValueError, match="budget_s must be at least 0"):
        Calibration(budget_s=budget_s)


@given(
    st.dictionaries(
        st.sampled_from(ROW_COUNTS), st.floats(min_value=1e-9, max_value=10), min_size=1
    )
)
def test_efficient_sizes_cost_less_per_row_than_all_smaller_ones(timings):
    sizes = efficient(timings)
    assert min(timings) in sizes
    for size, seconds in timings.items():
        beaten = any(
            timings[smaller] / smaller <= seconds / size for smaller in timings if smaller < size
        )
        assert (size in sizes) == (not beaten)
        assert sizes.get(size, seconds) == seconds


def test_whole_requests_are_timed_and_must_repeat_their_bits():
    noise = count()
    requests = [
        {"input_ids": np.ones((1, 2, 2), np.int64)},
        {"input_ids": np.ones((3, 4, 2), np.int64)},
    ]
    assert slowest_run_s(exact, requests, path=Path("here")) > 0
    assert slowest_run_s(exact, [], path=Path("here")) is None
    with pytest.raises(BundleError, match="not deterministic"):
        slowest_run_s(lambda inputs: {"y": np.array([next(noise)])}, requests, path=Path("here"))


def test_an_exact_model_may_run_at_every_size_up_to_the_largest_measured_one():
    measured = MeasuredBucket(stable=(1, 2, 4, 8), costs={1: 1.0, 2: 1.5, 8: 4.5})
    assert every_size(measured) == {
        1: 1.0,
        2: 1.5,
        3: 2.0,
        4: 2.5,
        5: 3.0,
        6: 3.5,
        7: 4.0,
        8: 4.5,
    }


def test_a_size_that_did_not_keep_the_bits_restricts_an_exact_model_to_measured_sizes():
    measured = MeasuredBucket(stable=(1, 2, 8), costs={1: 1.0, 8: 4.5})
    assert every_size(measured) == {1: 1.0, 8: 4.5}
