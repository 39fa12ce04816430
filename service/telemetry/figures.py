"""The metrics of several processes, added up.

They are families of plain JSON values:
{"name": ..., "documentation": ..., "type": ..., "samples": [[NAME, LABELS, VALUE], ...]}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# All processes have these alike, so their sum means nothing. The largest counts.
_ALIKE = frozenset({"evalmode_model_info", "evalmode_models_loaded"})


def add_families(families: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Families of several processes as one family of each name, with a sample for each series.

    Every value is a sum, because counts, histograms and gauges of load all add up. A series of one
    process alone has its process id among its labels.
    """
    sums: dict[str, dict[str, Any]] = {}
    series: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], list[Any]]] = {}
    for family in families:
        name = family["name"]
        samples = series.setdefault(name, {})
        # The list of samples grows below: the family of the first process must not.
        total = sums.setdefault(name, {**family, "samples": []})
        for sample_name, labels, value in family["samples"]:
            key = sample_name, tuple(sorted(labels.items()))
            sample = samples.get(key)
            if sample is None:
                samples[key] = [sample_name, labels, value]
                total["samples"].append(samples[key])
            elif name in _ALIKE:
                sample[2] = max(sample[2], value)
            else:
                sample[2] += value
    return list(sums.values())


def lasting_families(families: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The families that still count when their process has ended: counters and histograms, except
    those of the process itself.
    """
    return [
        family
        for family in families
        if family["type"] != "gauge" and not family["name"].startswith("process_")
    ]
