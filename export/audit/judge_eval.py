"""What the audit says about random numbers that a site draws in eval, for step 5 of `judge.py`."""

from __future__ import annotations

import torch

from evalmode.export.audit.by_tape import read_tapes, run_on_tape
from evalmode.export.audit.call_audit import CallAudit
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.site import Figures, Kind, Outcome, SiteReport, Unclear
from evalmode.export.audit.verdicts import report_site

# Eval forwards that must be equal before draws in eval count as unused.
_EVAL_FORWARDS = 4
# Forwards that estimate the keep rate of a mask that is always on. No verdict rests on it.
_ALWAYS_ON_FORWARDS = 32


def ignores_eval_draws(audit: CallAudit) -> bool:
    """Whether eval draws numbers from torch and does not use them.

    LayerDrop is often written like this: it draws first, and then looks at the mode.
    """
    site, possible_site = audit.site, audit.possible_site
    # If it draws only in eval, the numbers are meant for eval.
    if not possible_site.training_draws:
        return False
    # A tape does not see the numbers of Python's and NumPy's generators.
    if any(draw.by_host for draw in possible_site.eval_draws):
        return False

    expected = site.run(training=False)
    for _ in range(_EVAL_FORWARDS):
        run = run_on_tape(site, frozenset(), training=False)
        reading = run.reading
        # Without a draw on the tape, nothing shows that the numbers are unused.
        if reading.draws == 0:
            return False
        # A number that may choose the path, or that reaches the data, is used.
        if reading.may_choose_path or reading.reaches_data:
            return False
        # They may change the output in a way that the tape does not see.
        for tensor, expected_tensor in zip(run.outputs, expected, strict=True):
            if not torch.equal(tensor, expected_tensor):
                return False
    return True


def report_always_on(audit: CallAudit) -> SiteReport:
    """The report on a site that is random in eval, which is an error whatever its mean is."""
    # Eval first: users get this mask. Where a tape cannot follow it, training may show one.
    report = _report_always_on_mask(audit, training=False)
    if report is None:
        report = _report_always_on_mask(audit, training=True)
    if report is None:
        report = report_site(audit.possible_site, Kind.ALWAYS_ON)
    return report


def _report_always_on_mask(audit: CallAudit, *, training: bool) -> SiteReport | None:
    """The report with the keep rate and the scale of the mask that the site applies in this mode.

    None unless the noise is a single mask that a tape can follow.
    """
    tapes = read_tapes(audit.site, training=training)
    if isinstance(tapes, Unclear) or len(tapes.readings[0].applications) != 1:
        return None

    noises = []
    for _ in range(_ALWAYS_ON_FORWARDS):
        run = run_on_tape(audit.site, tapes.random_non_torch, training=training)
        noises.append(run.reading.applications[0].noise)
    noise = torch.stack(noises)  # (forwards, *mask)
    train_scale = kept_value(noise, rounding=1e-2)
    if train_scale is None:
        return None

    figures = Figures(
        outcome=Outcome.UNSURE,  # no gap is tested: the site is wrong with and without one
        forward_count=_ALWAYS_ON_FORWARDS,
        keep_rate=float((noise != 0).to(torch.float64).mean()),
    )
    return report_site(
        audit.possible_site, Kind.ALWAYS_ON, figures=figures, train_scale=train_scale
    )
