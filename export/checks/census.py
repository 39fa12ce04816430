"""Rule census: every place where the module drops in training is named with its rate and is absent from the graph."""

from __future__ import annotations

import copy
from collections import Counter

from torch import nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.convert import scope
from evalmode.export.modules import named_everything
from evalmode.export.subject import Subject, as_tensors
from evalmode.export.witness import Draw, declared_rate, draws

RULE = "census"


# A module that is nothing but a dropout, by the names that they go by.
_NAMES = ("dropout", "droppath", "dropblock", "stochasticdepth")


def check(subject: Subject) -> Record:
    """Unproven for a dropout module that left nodes in the graph: what they do is for a person to judge.

    The sites are the modules that are a dropout, and whatever else draws in a forward of a copy in training mode. That
    the graph itself holds nothing random is the rules stochastic-op's and training-mode's to show.
    """
    try:
        drawn = _training_draws(subject)
    except Exception as error:  # the user's own code, in a mode that is not the one it is exported in
        why = f"a copy of the module does not run in training mode: {type(error).__name__}: {error}"
        return Record(rule=RULE, verdict=Verdict.UNPROVEN, why=why)
    left = Counter(scope(node.name) for node in subject.model.graph.node)
    modules = {path: part for path, part in named_everything(subject.module).items() if path and _is_dropout(part)}
    sites = [_module_site(path, part, left[path]) for path, part in modules.items()]
    sites += [f"{draw}: absent" for draw in drawn if draw.path not in modules]
    present = [site for site in sites if not site.endswith(": absent")]
    return Record(
        rule=RULE,
        verdict=Verdict.UNPROVEN if present else Verdict.PASS,
        why="dropout sites left nodes in the graph" if present else "every dropout site is absent from the graph",
        measured=f"{len(sites)} sites, {len(present)} present",
        limit="0 present",
        where=tuple(sites),
    )


def _is_dropout(part: nn.Module) -> bool:
    return any(name in type(part).__name__.lower() for name in _NAMES) and not any(part.parameters())


def _module_site(path: str, part: nn.Module, nodes: int) -> str:
    rate = declared_rate(part)
    named = f"{path} ({type(part).__name__}{'' if rate is None else f', p={rate:g}'})"
    return f"{named}: {f'{nodes} nodes left' if nodes else 'absent'}"


def _training_draws(subject: Subject) -> tuple[Draw, ...]:
    training = copy.deepcopy(subject.module)
    training.train()
    # The largest probe: batch normalisation, for one, cannot train on a single row.
    largest = max(subject.probes, key=lambda probe: sum(array.size for array in probe.values()))
    return draws(training, as_tensors(largest))
