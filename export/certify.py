"""Convert a candidate to a graph, and check both by all rules that apply.

1. The rules of the module alone come first. A module that fails one is not converted.
2. The module is converted, under a seed.
3. All other rules but those of an audit and of a finished bundle are checked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from evalmode.bundle.certificate import Record, Verdict, overall
from evalmode.export.convert import Converted, convert
from evalmode.export.fingerprint import Fingerprint, fingerprint
from evalmode.export.graph import graph_of
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.module.forward import seeded
from evalmode.export.module.network import Network
from evalmode.export.rules.registry import RULES, Needs, Progress, check_all
from evalmode.export.rules.subject import Export, Subject

# The second export in this process runs under another seed than the first. An export in another
# process has a seed of its own: see `second_export`.
_SEED, _OTHER_SEED = 0, 1


@dataclass(frozen=True, kw_only=True)
class Certified:
    """The records; and the subject, unless a rule of the module alone did not pass."""

    records: tuple[Record, ...]
    subject: Subject | None = None

    @property
    def passed(self) -> bool:
        """Whether all rules that apply passed."""
        return overall(self.records) is Verdict.PASS


def certify(candidate: Candidate, *, progress: Progress) -> Certified:
    """Check a candidate by all rules that apply; `progress` gets the name of each step.

    `.eval()` is never called here. Raises NotConvertible for a module that ONNX cannot express.
    """
    network = Network.of(candidate.module)
    module = Subject(network=network, evidence=candidate.evidence, draws=candidate.draws)
    records = check_all(module, progress=progress)
    if overall(records) is not Verdict.PASS:
        return Certified(records=records)
    progress("convert")
    subject = subject_of(candidate)
    module_rules = [record.rule for record in records]
    records += check_all(subject, skip=module_rules, progress=progress)
    expected = [rule.name for rule in RULES if rule.needs not in (Needs.AUDIT, Needs.BUNDLE)]
    assert [record.rule for record in records] == expected, "every rule of an export has run"
    return Certified(records=records, subject=subject)


def subject_of(candidate: Candidate) -> Subject:
    """The candidate's module and the graph of it, ready for the rules."""

    def export(module: nn.Module, seed: int) -> Converted:
        axes = candidate.evidence.dynamic_axes
        with seeded(seed):
            converted = convert(
                module, candidate.example, dynamic_axes=axes, outputs=candidate.outputs
            )
        if candidate.rewrite is not None:
            converted = replace(converted, model=candidate.rewrite(converted.model))
        return converted

    def twin() -> Fingerprint:
        fresh = Network.of(candidate.fresh)
        fresh.disturb()
        return fingerprint(export(fresh.module, _OTHER_SEED).model)

    converted = export(candidate.exported, _SEED)
    return Subject(
        network=Network.of(candidate.module),
        graph=graph_of(converted.model),
        evidence=candidate.evidence,
        export=Export(
            unoptimised=converted.unoptimised,
            bounds=converted.bounds,
            conditions=converted.conditions,
            index_bounds=converted.index_bounds,
            # A second export in another process shows everything that one in this process shows.
            twins=candidate.twins or (twin,),
        ),
    )
