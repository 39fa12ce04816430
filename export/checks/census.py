"""Rule census: every place where the module drops in training is named with its rate and is absent from the graph."""

from __future__ import annotations

import copy
from collections import Counter

from torch import nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.convert import scope
from evalmode.export.modules import named_everything
from evalmode.export.subject import Subject, as_tensors
from evalmode.export.witness import Draw, draws

RULE = "census"


def check(subject: Subject) -> Record:
    """Unproven for a dropout module that left nodes in the graph: what they do is for a person to judge.

    The sites are the modules called a dropout, and whatever else draws in a forward of a copy in training mode. That
    the graph itself holds nothing random is the rules stochastic-op's and training-mode's to show.
    """
    left = Counter(scope(node.name) for node in subject.model.graph.node)
    modules = {
        path: part for path, part in named_everything(subject.module).items() if "drop" in type(part).__name__.lower()
    }
    functional = [draw for draw in _training_draws(subject) if draw.path not in modules]
    sites = [_module_site(path, part, left[path]) for path, part in modules.items()]
    sites += [f"{draw}: absent" for draw in functional]
    present = [site for site in sites if not site.endswith(": absent")]
    return Record(
        rule=RULE,
        verdict=Verdict.UNPROVEN if present else Verdict.PASS,
        why="dropout sites left nodes in the graph" if present else "every dropout site is absent from the graph",
        measured=f"{len(sites)} sites, {len(present)} present",
        limit="0 present",
        where=tuple(sites),
    )


def _module_site(path: str, part: nn.Module, nodes: int) -> str:
    rate = getattr(part, "p", getattr(part, "drop_prob", None))
    named = f"{path} ({type(part).__name__}{'' if rate is None else f', p={rate:g}'})"
    return f"{named}: {f'{nodes} nodes left' if nodes else 'absent'}"


def _training_draws(subject: Subject) -> tuple[Draw, ...]:
    training = copy.deepcopy(subject.module).train()
    # The largest probe: batch normalisation, for one, cannot train on a single row.
    largest = max(subject.probes, key=lambda probe: sum(array.size for array in probe.values()))
    return draws(training, as_tensors(largest))
