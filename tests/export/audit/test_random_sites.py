"""How often the audit calls a right site wrong, and how often it misses a wrong site."""

from __future__ import annotations

import random

import torch
from scipy import stats

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import audit
from tests.export.audit.random_sites import SHAPE, Network, Truth, draw_site

NETWORK_COUNT, SITES_PER_NETWORK, ALPHA = 100, 10, 0.01


def outcomes(seed: int) -> list[list[tuple[Truth, Severity | None]]]:
    """For each network, what each of its sites really is, and the severity that the audit gave."""
    rng = random.Random(seed)
    networks = []
    for index in range(NETWORK_COUNT):
        torch.manual_seed(seed + index)
        sites = [draw_site(rng) for _ in range(SITES_PER_NETWORK)]
        result = audit(
            Network([module for module, _ in sites]),
            [{"x": torch.randn(SHAPE)}],
            alpha=ALPHA,
            seed=index,
        )
        networks.append(
            [(truth, site.severity) for (_, truth), site in zip(sites, result.sites, strict=True)]
        )
    return networks


def test_of_1000_random_sites_false_alarms_and_missed_gaps_stay_within_alpha_and_power() -> None:
    # Seed 2026 was fixed before the first run; bench/audit.py repeats this under random seeds.
    networks = outcomes(2026)
    assert sum(map(len, networks)) == 1000
    alarm_count = sum(
        any(truth.is_right and severity is Severity.ERROR for truth, severity in sites)
        for sites in networks
    )
    gaps = [severity for sites in networks for truth, severity in sites if truth.must_be_found]
    missed_count = sum(severity is not Severity.ERROR for severity in gaps)
    assert len(gaps) > 300
    # Exceeded once in a thousand if the family-wise rate of false alarms is alpha, and if one gap
    # in 100 is missed.
    assert alarm_count <= stats.binom.ppf(0.999, NETWORK_COUNT, ALPHA)
    assert missed_count <= stats.binom.ppf(0.999, len(gaps), 0.01)
    for sites in networks:
        for truth, severity in sites:
            assert not (truth.is_right and severity is Severity.UNPROVEN)
