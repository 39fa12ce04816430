"""Rule escaped-module: every module is in eval mode, those hidden in Python containers included."""

from __future__ import annotations

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.rules.subject import Subject

RULE = "escaped-module"

_FIX = (
    "call .eval() on the root; put modules of a list into nn.ModuleList; let an overridden train()"
    " set the mode that it is given"
)


def check(subject: Subject) -> Record:
    """Fail for every module whose `training` flag is still set.

    `root.eval()` does not reach a module in a plain list or dict. It has no effect on a module
    whose overridden `train()` ignores the mode.
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
