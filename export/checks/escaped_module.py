"""Rule escaped-module: every module is in eval mode, those hidden in Python containers included."""

from __future__ import annotations

from torch import nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.modules import named_everything

RULE = "escaped-module"


def check(module: nn.Module) -> Record:
    """Fail for every module whose `training` flag is still set.

    `root.eval()` does not reach a module kept in a plain list or dict, nor one whose `train()` is overridden.
    """
    every = named_everything(module)
    escaped = [f"{path or '(root)'} ({type(part).__name__})" for path, part in every.items() if part.training]
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if escaped else Verdict.PASS,
        why="modules are still in training mode" if escaped else "every module is in eval mode",
        measured=f"{len(escaped)} of {len(every)} modules",
        limit="0",
        where=tuple(escaped),
    )
