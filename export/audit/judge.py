"""The verdict on one possible site, in steps 1 to 6. `judge_training.py` has steps 7 to 12.

These two files decide. The files that they import measure, and `verdicts.py` has the sentences.

The words of both files:

* A *call* is one call of the site, with its arguments and the numbers that the site held. It was
  captured in a forward of the whole network. `IsolatedSite` repeats it in training and in eval.
* *Noise* is a tensor of random numbers that the site applies to its data: a dropout's mask, a
  Gaussian factor, a term that is added.
* A *tape* records one forward, operator by operator. It finds where noise is applied to data, reads
  the noise, and can run the forward with a constant in the noise's place.
* A forward's *path* is the sequence of its operators. A random number may choose it: Python code
  asks `if random() < p` and skips a layer. A tape cannot follow that.
* An *effect* is one noise of the site that is measured by itself. A site has one or several.
* An *observer* repeats the call in training, and returns each effect's noise. `TapeObserver` reads
  it from a tape, `OutputObserver` from the outputs, `SkippedLayers` from the layers that ran.

A possible site as a whole:

1. p = 0 and it draws nothing in either mode: off.
2. No sample reaches it:
   a. its parent draws at the same rate, and so uses the rate itself: not called, without a finding;
   b. it draws in eval: always on;
   c. else: not called.
3. Otherwise each captured call is judged. A call that behaves like a judged call of its kind is
   skipped, and a verdict that repeats an earlier one is dropped.

One call:

4. It draws in eval, and eval uses the numbers: always on.
5. Else its training forward is judged, in steps 7 to 12. Zeros would hide a mask, so that random
   values replace them: in an input that is zero everywhere, and, after an inconclusive first
   attempt, in parameters that are zero everywhere.
6. The user's code raises without the network around it: always on if it draws in eval, else
   inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from evalmode.export.audit.by_tape import JudgedCall, probe, run_on_tape
from evalmode.export.audit.call import ZERO, CallKind
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite, noise_for_zero_weights
from evalmode.export.audit.judge_training import CallToJudge, CallVerdict, judge_training
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
    candidate: PossibleSite,
    candidates: Sequence[PossibleSite],
    *,
    alpha: float,
    draws: int | None,
) -> list[SiteReport]:
    """The verdicts on one of `candidates`, each of its calls tested at level `alpha`.

    `network` is a working copy. `draws` fixes the training forwards of each test; None sizes them.
    """
    # 1. Off.
    is_random = bool(candidate.training_draws or candidate.eval_draws)
    if candidate.p == 0 and not is_random:
        return [report_site(candidate, Kind.OFF)]

    # 2. No call to judge.
    if not candidate.calls:
        parent, _, name = candidate.path.rpartition(".")
        for other in candidates:
            # The parent passes the rate to a function, and need not call the dropout.
            is_parent = bool(name) and other.path == parent
            if is_parent and any(draw.p == candidate.p for draw in other.training_draws):
                return [replace(report_site(candidate, Kind.NOT_CALLED), fix="", severity=None)]
        kind = Kind.ALWAYS_ON if candidate.eval_draws else Kind.NOT_CALLED
        return [report_site(candidate, kind)]

    # 3. Each captured call.
    random_modules = [
        network.parts[other.path]
        for other in candidates
        if other.training_draws or other.eval_draws
    ]
    reports: list[SiteReport] = []
    earlier_verdicts: list[list[tuple[str, Kind]]] = []
    judged_calls: dict[CallKind, JudgedCall] = {}
    for captured in candidate.calls:
        site = IsolatedSite(
            network,
            network.parts[candidate.path],
            captured.call,
            trains=candidate.trains,
            sites=random_modules,
        )
        call = CallToJudge(candidate=candidate, site=site, alpha=alpha, draws=draws)
        judged_call = judged_calls.get(captured.kind)
        with site.isolated():
            try:
                if judged_call is not None and judged_call.matches(site):
                    continue
                verdict = _judge_call(call)
            except Exception as error:  # 6. the user's code may raise anything
                kind = Kind.ALWAYS_ON if candidate.eval_draws else Kind.INCONCLUSIVE
                reason = f"it does not run alone: {type(error).__name__}: {error}"
                verdict = CallVerdict([report_site(candidate, kind, reason=reason)])
        if judged_call is None and verdict.judged_call is not None:
            judged_calls[captured.kind] = verdict.judged_call

        # The first verdict has no number. Later ones name the call that differs.
        kinds = [(report.source, report.kind) for report in verdict.reports]
        if kinds not in earlier_verdicts:
            number = captured.number if earlier_verdicts else 0
            reports += [replace(report, call=number) for report in verdict.reports]
            earlier_verdicts.append(kinds)
    return reports


def _judge_call(call: CallToJudge) -> CallVerdict:
    """Steps 4 and 5: the verdict on one call."""
    site = call.site

    # 4. Random in eval.
    if call.candidate.eval_draws and not _ignores_eval_draws(call):
        return CallVerdict([_report_always_on(call)])

    # 5. The training forward. An input of zeros would hide every mask.
    if site.call.why_unmeasurable() == ZERO:
        site.call = site.call.with_random_values()
        verdict = judge_training(call)
        reports = _note_random_values(verdict.reports, "its input is zero everywhere")
        return CallVerdict(reports, verdict.judged_call)

    # 5. Parameters of zeros may hide one, such as those at the end of a new residual branch.
    verdict = judge_training(call)
    is_inconclusive = all(report.kind is Kind.INCONCLUSIVE for report in verdict.reports)
    if is_inconclusive and site.has_zero_weights:
        with noise_for_zero_weights(site.module):
            second_verdict = judge_training(call)
        if not any(report.kind is Kind.INCONCLUSIVE for report in second_verdict.reports):
            # Its `judged_call` is dropped. Later calls would be compared with it on the zeros,
            # where training equals eval at any scale.
            reason = "its weights that are all zero let nothing through"
            return CallVerdict(_note_random_values(second_verdict.reports, reason))
    return verdict


def _ignores_eval_draws(call: CallToJudge) -> bool:
    """Whether eval draws numbers from torch and does not use them.

    LayerDrop is often written so: it draws before it asks for the mode.
    """
    site, candidate = call.site, call.candidate
    # A tape does not see the numbers of Python's and NumPy's generators.
    if not candidate.training_draws or any(draw.by_host for draw in candidate.eval_draws):
        return False

    expected = site.run(training=False)
    for _ in range(_EVAL_FORWARDS):
        run = run_on_tape(site, frozenset(), training=False)
        reading = run.reading
        uses_noise = reading.may_choose_path or reading.applications or reading.obstacles
        if uses_noise or not reading.draws:
            return False
        for tensor, expected_tensor in zip(run.outputs, expected, strict=True):
            if not torch.equal(tensor, expected_tensor):
                return False
    return True


def _report_always_on(call: CallToJudge) -> SiteReport:
    """The report on a site that is random in eval, which is an error whatever its mean is.

    It has a keep rate and a scale where the noise is a single mask that a tape can follow.
    """
    for training in (False, True):
        probed = probe(call.site, training=training)
        if isinstance(probed, Unclear) or len(probed.readings[0].applications) != 1:
            continue
        noises = []
        for _ in range(_ALWAYS_ON_FORWARDS):
            run = run_on_tape(call.site, probed.foreign_noise, training=training)
            noises.append(run.reading.applications[0].noise)
        noise = torch.stack(noises)
        value = kept_value(noise, rounding=1e-2)
        if value is not None:
            figures = Figures(
                outcome=Outcome.GAP,
                forward_count=_ALWAYS_ON_FORWARDS,
                keep_rate=float((noise != 0).to(torch.float64).mean()),
            )
            return report_site(call.candidate, Kind.ALWAYS_ON, figures=figures, train_scale=value)
    return report_site(call.candidate, Kind.ALWAYS_ON)


def _note_random_values(reports: list[SiteReport], reason: str) -> list[SiteReport]:
    note = f"(measured with random values, since {reason})"
    return [replace(report, sentence=f"{report.sentence} {note}") for report in reports]
