"""Rule repeatability: in one session the same input gives the same bits, with graph optimisation off and as served."""

from __future__ import annotations

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.session import Session
from evalmode.export.subject import Subject

RULE = "repeatability"

# Every session starts its generators alike, so two fresh sessions agree even on noise: the runs share one.
_RUNS = 5


def check(subject: Subject) -> Record:
    """Fail for every probe and session under which one of the runs differs by a bit."""
    where = []
    for kind, session in (("optimisation off", subject.plain), ("as served", subject.served)):
        where += [f"{kind}: {found}" for found in _unstable(subject, session)]
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if where else Verdict.PASS,
        why="the same input gives different answers" if where else "the same input gives the same bits",
        measured=f"{len(where)} differ of {2 * len(subject.probes)} probes, {_RUNS} runs each",
        limit="0",
        where=tuple(where),
    )


def _unstable(subject: Subject, session: Session) -> list[str]:
    found = []
    for index, probe in enumerate(subject.probes):
        runs = [session.run(probe) for _ in range(_RUNS)]
        found += [
            f"output {name} of probe {index}"
            for name, first in runs[0].items()
            if any(run[name].tobytes() != first.tobytes() for run in runs[1:])
        ]
    return found
