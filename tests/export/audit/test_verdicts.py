from __future__ import annotations

import pytest

from evalmode.export.audit import verdicts
from evalmode.export.audit.site import Kind
from evalmode.export.audit.verdicts import KIND_REPORTS, name_mistake


@pytest.mark.parametrize(
    ("s", "e", "keep", "p", "kind"),
    [
        (1.0, 1.0, 0.7, 0.3, Kind.UNSCALED),
        (2.0, 2.0, 0.7, 0.3, Kind.UNSCALED),
        (1 / 0.3, 1.0, 0.7, 0.3, Kind.WRONG_RATE),
        (1.0, 0.3, 0.7, 0.3, Kind.WRONG_RATE),
        (1 / 0.7, 0.7, 0.7, 0.3, Kind.SCALED_TWICE),
        (1 / 0.49, 1.0, 0.7, 0.3, Kind.SCALED_TWICE),
        (1.0, 0.49, 0.7, None, Kind.SCALED_TWICE),
        (0.7, 1.0, 0.7, 0.3, Kind.WRONG_SCALE),
        (1 / 0.8, 1.0, 0.2, 0.2, Kind.WRONG_RATE),
        (2.0, 1.0, 0.0, 0.5, Kind.WRONG_RATE),
    ],
)
def test_a_gap_is_named_by_its_mistake(
    s: float, e: float, keep: float, p: float | None, kind: Kind
) -> None:
    assert name_mistake(s, e, keep, (keep - 0.01, keep + 0.01), p) is kind


@pytest.mark.parametrize(
    ("gap", "change"),
    [
        (0.5, "2.0 times larger"),
        (0.7, "1.43 times larger"),
        (4.0, "4.0 times smaller"),
        (0.9996, "1.0004 times larger"),
    ],
)
def test_the_sentence_of_a_gap_says_what_happens_to_the_activations(
    gap: float, change: str
) -> None:
    assert (
        verdicts.gap_sentence(gap)
        == f"activations reach the next layer {change} in eval than in training"
    )


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_has_a_sentence_and_each_finding_a_fix(kind: Kind) -> None:
    sentence = verdicts.sentence_of(kind, gap=0.7, keep_rate=0.7, p=0.3, forward_count=16)
    assert sentence
    assert "None" not in sentence
    assert bool(verdicts.fix_of(kind, p=0.3, keep_rate=0.7)) == (
        KIND_REPORTS[kind].severity is not None
    )
