"""Decides what the audit says about one module that may apply noise: steps 1 to 6.

`find_sites.py` found the module, called a possible site here, and captured its calls: the arguments
of each, and the state of the module. `IsolatedSite` repeats a call in training and in eval.
`judge_training.py` has steps 7 to 12, and `verdicts.py` the sentences.

Calls of one kind differ in the sizes and values of their tensors alone. A fingerprint sums up a
judged call: the noise, and how the output in training compares with that in eval. A later call of
its kind that matches is not judged again. A tape records one forward, operator by operator, and
where random numbers reach the data.

A possible site as a whole (`judge`):

1. p = 0 and it draws nothing in either mode: off.
2. No sample reaches it:
   a. its parent draws at the same rate, as in `F.dropout(x, self.drop.p)`: not called, without a
      finding, because the parent is judged;
   b. it draws in eval: always on;
   c. else: not called.
3. Samples reach it: each captured call is judged in steps 4 to 6. A result that repeats an earlier
   one is dropped.

One call (`_judge_call`):

4. It behaves like an earlier call of its kind, by its fingerprint: no new result. This is not tried
   if its input is all zeros.
5. It draws in eval, and the numbers may change the output: always on.
6. Else its training forward is judged, in steps 7 to 12. Zeros would hide a mask:
   a. if the input is all zeros, random inputs are used;
   b. if the result is inconclusive and some weights are all zeros, a second attempt is made with
      random weights.

If the module raises in steps 4 to 12, it does not run without the network around it: always on if
it draws in eval, else inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from evalmode.export.audit.by_tape import Fingerprint, read_tapes, run_on_tape
from evalmode.export.audit.call import ZERO, CallKind
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite, random_zero_weights
from evalmode.export.audit.judge_training import CallAudit, CallResult, judge_training
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.site import Figures, Kind, Outcome, SiteReport, Unclear
from evalmode.export.audit.verdicts import report_site
from evalmode.export.module.network import Network

# Eval forwards that must be equal before draws in eval count as unused.
_EVAL_FORWARDS = 4
# Forwards that estimate the keep rate of a mask that is always on. No verdict rests on it.
_ALWAYS_ON_FORWARDS = 32


def judge(
    network: Network,
    possible_site: PossibleSite,
    possible_sites: Sequence[PossibleSite],
    *,
    alpha: float,
    draws: int | None,
) -> list[SiteReport]:
    """The reports on one of `possible_sites`, each of its calls tested at level `alpha`.

    `network` is a working copy. `draws` fixes the training forwards of each test; None sizes them.
    """
    # 1. Off.
    is_random = bool(possible_site.training_draws or possible_site.eval_draws)
    if possible_site.p == 0 and not is_random:
        return [report_site(possible_site, Kind.OFF)]

    # 2. No call to judge.
    if not possible_site.calls:
        return [_report_unreached(possible_site, possible_sites)]

    # 3. Each captured call. Of these modules, the ones inside the site stay in eval: each is judged
    # by itself, and its noise would count as that of the site.
    random_modules = [
        network.parts[other.path]
        for other in possible_sites
        if other.training_draws or other.eval_draws
    ]
    numbered_results: list[tuple[int, CallResult]] = []
    fingerprints: dict[CallKind, Fingerprint] = {}
    for captured in possible_site.calls:
        site = IsolatedSite(
            network,
            network.parts[possible_site.path],
            captured.arguments,
            trains=possible_site.trains,
            random_modules=random_modules,
        )
        audit = CallAudit(possible_site=possible_site, site=site, alpha=alpha, draws=draws)
        with site.isolated():
            result = _judge_call(audit, fingerprints.get(captured.kind))
        if result is None:
            continue
        numbered_results.append((captured.number, result))
        # A kind has one fingerprint: that of its first call that has any.
        if result.fingerprint is not None:
            fingerprints.setdefault(captured.kind, result.fingerprint)
    return _distinct_reports(numbered_results)


def _distinct_reports(numbered_results: Sequence[tuple[int, CallResult]]) -> list[SiteReport]:
    """The reports of the results that differ from every earlier one.

    Each result has the number of its call. The reports of the first result have the number 0, and
    later ones that of the call which differs.
    """
    reports: list[SiteReport] = []
    earlier_verdicts: list[dict[str, Kind]] = []
    for call_number, result in numbered_results:
        verdict = result.kind_by_source()
        if verdict in earlier_verdicts:
            continue
        if earlier_verdicts:
            reports += [replace(report, call=call_number) for report in result.reports]
        else:
            reports += result.reports
        earlier_verdicts.append(verdict)
    return reports


def _report_unreached(
    possible_site: PossibleSite, possible_sites: Sequence[PossibleSite]
) -> SiteReport:
    """Step 2: the report on a possible site that no sample reaches."""
    # a. The parent passes the rate to a function: `F.dropout(x, self.drop.p)`. It never calls
    # `self.drop`, and nothing is wrong with that. The name of the root is "": it has no parent.
    parent_path, _, name = possible_site.path.rpartition(".")
    for other in possible_sites:
        is_parent = name != "" and other.path == parent_path
        if is_parent and any(draw.p == possible_site.p for draw in other.training_draws):
            report = report_site(possible_site, Kind.NOT_CALLED)
            return replace(report, fix="", severity=None)

    # b. It draws in eval.
    if possible_site.eval_draws:
        return report_site(possible_site, Kind.ALWAYS_ON)

    # c. Neither.
    return report_site(possible_site, Kind.NOT_CALLED)


def _judge_call(audit: CallAudit, fingerprint: Fingerprint | None) -> CallResult | None:
    """Steps 4 to 6: the result for one call. Runs inside of `site.isolated()`.

    None where the call matches `fingerprint`, that of an earlier call of its kind.
    """
    site, possible_site = audit.site, audit.possible_site
    try:
        # 4. It behaves like an earlier call. 0 times any scale is 0, so a call on zeros would match
        # every fingerprint.
        is_zero = site.call.why_unmeasurable() == ZERO
        if fingerprint is not None and not is_zero and fingerprint.matches(site):
            return None

        # 5. Random in eval.
        if possible_site.eval_draws and not _ignores_eval_draws(audit):
            return CallResult([_report_always_on(audit)])

        # 6a. An input of zeros would hide every mask.
        if is_zero:
            with site.random_inputs():
                on_random_inputs = judge_training(audit)
            return _note_random_values(on_random_inputs, "its input is zero everywhere")

        # 6. The first attempt, on the values that were captured.
        on_captured_values = judge_training(audit)
        if on_captured_values.conclusive_count > 0 or not site.has_zero_weights:
            return on_captured_values

        # 6b. The second attempt. The last weights of a residual branch often start as zeros. The
        # branch then adds nothing, with or without a mask.
        with random_zero_weights(site.module):
            on_random_weights = judge_training(audit)
        # It counts only if it is conclusive about every source of noise.
        if on_random_weights.conclusive_count < len(on_random_weights.reports):
            return on_captured_values
        return _note_random_values(
            on_random_weights, "its weights that are all zero let nothing through"
        )
    except Exception as error:  # the user's code may raise anything
        kind = Kind.ALWAYS_ON if possible_site.eval_draws else Kind.INCONCLUSIVE
        reason = f"it does not run alone: {type(error).__name__}: {error}"
        return CallResult([report_site(possible_site, kind, reason=reason)])


def _note_random_values(result: CallResult, reason: str) -> CallResult:
    """The same result, with a note in each sentence that random values replaced zeros.

    It leaves no fingerprint: later calls would be compared with it on the real zeros.
    """
    note = f"(measured with random values, because {reason})"
    reports = [replace(report, sentence=f"{report.sentence} {note}") for report in result.reports]
    return replace(result, reports=reports, fingerprint=None)


def _ignores_eval_draws(audit: CallAudit) -> bool:
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


def _report_always_on(audit: CallAudit) -> SiteReport:
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
