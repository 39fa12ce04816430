"""Rule escaped-module: every module is in eval mode, those hidden in Python containers included."""

from __future__ import annotations

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.rules.subject import Subject

RULE = "escaped-module"

_FIX = (
    "call .eval() on the root; a module in a list needs nn.ModuleList, an overridden train() must"
    " obey"
)


def check(subject: Subject) -> Record:
    """Fail for every module whose `training` flag is still set.

    `root.eval()` does not reach a module kept in a plain list or dict, nor one whose `train()` is
    overridden.
    """
    network = subject.network
    findings = [
        Finding(
            severity=Severity.ERROR,
            node=path or "(root)",
            op=type(part).__name__,
            why="it is still in training mode",
            fix=_FIX,
        )
        for path, part in network.in_training.items()
    ]
    return Record.of(
        RULE,
        findings,
        fine="every module is in eval mode",
        otherwise="modules are still in training mode",
        measured=f"{len(findings)} of {len(network.parts)} modules",
        limit="0",
    )
