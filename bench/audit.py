"""Counts how often the expectation-gap audit is wrong, on random sites whose true gap is known.

python bench/audit.py                       # 1,000 sites, ten to a network, a random seed
python bench/audit.py --sites 200 --seed 7  # to repeat a run
"""

from __future__ import annotations

import argparse
import collections
import random
import secrets
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind
from tests.export.audit.random_sites import SHAPE, Network, Truth, draw_site

SITES_PER_NETWORK = 10


def main() -> None:
    """Measure and print, for each kind of mistake, how many sites were called wrong or missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--alpha", type=float, default=0.01)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, start = random.Random(arguments.seed), time.perf_counter()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    networks = -(-arguments.sites // SITES_PER_NETWORK)
    alarm_count = sum(
        audit_network(rng, counts, arguments.alpha) for _ in track(range(networks), transient=True)
    )
    console = Console()
    console.print(table_of(counts))
    console.print(
        f"seed {arguments.seed}: {alarm_count} of {networks} networks with a false alarm (alpha"
        f" {arguments.alpha}), {time.perf_counter() - start:.0f} s"
    )


def audit_network(
    rng: random.Random, counts: dict[str, collections.Counter[str]], alpha: float
) -> bool:
    """Audit a random network and count outcomes. Returns whether there was a false alarm."""
    torch.manual_seed(rng.randrange(2**31))
    sites = [draw_site(rng) for _ in range(SITES_PER_NETWORK)]
    network = Network([module for module, _ in sites])
    audited = audit(
        network, [{"x": torch.randn(SHAPE)}], alpha=alpha, seed=rng.randrange(2**31)
    ).sites
    outcomes = [
        outcomes_of(truth, site.severity, site.kind)
        for (_, truth), site in zip(sites, audited, strict=True)
    ]
    for (_, truth), site, outcome in zip(sites, audited, outcomes, strict=True):
        counts[truth.mistake].update(["sites", *outcome])
        if {"false alarm", "missed", "inconclusive"} & set(outcome):
            Console().print(truth, site)
    return any("false alarm" in outcome for outcome in outcomes)


def outcomes_of(truth: Truth, severity: Severity | None, kind: Kind) -> list[str]:
    """The columns of the table that count this site."""
    columns = ["must be found"] if truth.must_be_found else []
    if truth.is_right and severity is Severity.ERROR:
        columns.append("false alarm")
    if truth.must_be_found and severity is not Severity.ERROR:
        columns.append("missed")
    if kind is Kind.INCONCLUSIVE:
        columns.append("inconclusive")
    return columns


def table_of(counts: dict[str, collections.Counter[str]]) -> Table:
    columns = ("sites", "must be found", "missed", "false alarm", "inconclusive")
    table = Table("mistake", *columns)
    for mistake, counter in sorted(counts.items()):
        table.add_row(mistake, *(str(counter[column]) for column in columns))
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    table.add_section()
    table.add_row("all", *(str(total[column]) for column in columns))
    return table


if __name__ == "__main__":
    main()
