"""The verdict on the training forward of one call, in steps 7 to 12. The words are in `judge.py`.

Noise that a tape can follow:

7. Some forwards skip layers that eval calls, and a tape can follow all other noise: layers skipped.
   Where the layers that run are scaled up for it, the skips are judged like any mask.
8. A tape can follow all noise to the data: the noise is measured there. With one exception: where
   one mask is used several times, the outputs are measured, if they show an exact pattern.

Otherwise the outputs are compared:

9. The outputs of training and eval cannot be compared: inconclusive.
10. No output differs from eval:
    a. its input is empty, not finite, or zero where it is finite: inconclusive;
    b. it draws random numbers: inconclusive;
    c. else never on: a mask would have been visible.

Outputs that differ from eval:

11. They differ from forward to forward too: the noise is measured at the outputs.
12. Every training forward returns the same: drops everything, frozen mask, wrong scale or
    inconclusive.

Measured noise gets its kind from `verdicts.name_kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from evalmode.export.audit import statistics, verdicts
from evalmode.export.audit.augmentation import augments
from evalmode.export.audit.balance import SCALE_HIDDEN
from evalmode.export.audit.by_output import OutputObserver
from evalmode.export.audit.by_tape import (
    TAPE_ERRORS,
    JudgedCall,
    PathChanged,
    TapeObserver,
    run_on_tape,
)
from evalmode.export.audit.call import carry_values
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.measure import measure
from evalmode.export.audit.site import (
    Effect,
    Figures,
    Kind,
    NoiseObserver,
    Outcome,
    SiteReport,
    Unclear,
)
from evalmode.export.audit.skipped_layers import SkippedLayers, layer_drop_rate, skipped_layers
from evalmode.export.audit.verdicts import report_site

# Training forwards beside the first that must all be equal before a site counts as constant.
_REPEATS = 16
# Forwards that estimate how often layers are skipped. For a warning this is exact enough: within
# 0.2 of the rate for a single layer, and closer for several.
_SKIP_FORWARDS = 128
_REACH_FIX = "give samples that reach it"


@dataclass(frozen=True, kw_only=True)
class CallToJudge:
    """One call of a possible site, and how strictly to test it.

    `alpha` is the level of one test of the call, and `draws` is that of `measure`.
    """

    candidate: PossibleSite
    site: IsolatedSite
    alpha: float
    draws: int | None


@dataclass(frozen=True)
class CallVerdict:
    """The reports on one call, and what recognises later calls that behave like it.

    `judged_call` is None where later calls must be judged in full.
    """

    reports: list[SiteReport]
    judged_call: JudgedCall | None = None


def judge_training(call: CallToJudge) -> CallVerdict:
    """The verdict on the training forward of a call. Runs inside of `site.isolated()`."""
    # 7. and 8. A verdict, or why a tape cannot follow the noise.
    by_tape = _judge_by_tape(call)
    if isinstance(by_tape, CallVerdict):
        return by_tape
    # 9. and 10. A report, or the observer of outputs that differ from eval.
    outputs = _compare_outputs(call, by_tape.reasons)
    if isinstance(outputs, SiteReport):
        return CallVerdict([outputs])
    # 11. and 12.
    return CallVerdict(_measure_outputs(call, outputs, by_tape.reasons))


def _judge_by_tape(call: CallToJudge) -> CallVerdict | Unclear:
    """Steps 7 and 8: the verdict on noise that a tape can follow, or why it cannot follow it."""
    site, candidate = call.site, call.candidate

    # 7. Layers that are skipped at random.
    layers: list[nn.Module] = []
    if site.has_children and candidate.training_draws and _may_choose_path(call):
        layers = skipped_layers(site)
    if layers:
        reports = _judge_skipped_layers(call, layers)
        if reports:
            return CallVerdict(reports)

    # 8. Noise that a tape can follow.
    observer = _observe_by_tape(call)
    if isinstance(observer, Unclear) and observer.saw_no_noise and candidate.training_draws:
        # It drew in the network and does not draw alone: it may read the flag of a child.
        site.switch_children()
        observer = _observe_by_tape(call)
    if isinstance(observer, Unclear):
        return observer
    if layers:
        return Unclear((f"it skips some of {len(layers)} modules that it calls in eval",))
    if observer.reuses_mask:
        # Used twice on one path, the mask has another effect than its mean.
        outputs = OutputObserver.of(site)
        if isinstance(outputs, OutputObserver) and outputs.exact:
            return CallVerdict(_measure(call, outputs))
    try:
        reports = _measure(call, observer, eval_factor=_eval_factor(site, observer.effects))
        # Where the outputs hide the scale, they cannot recognise a later call.
        judged_call = None if observer.includes_inputs else observer.judged_call(reports)
        return CallVerdict(reports, judged_call)
    except PathChanged as error:  # a rare path, which no probe took
        return Unclear((str(error),))


def _compare_outputs(call: CallToJudge, tape_reasons: Sequence[str]) -> OutputObserver | SiteReport:
    """Steps 9 and 10: the observer of outputs that differ from eval, or a report if none do.

    `tape_reasons` say why no tape could follow the noise.
    """
    site, candidate = call.site, call.candidate

    # 9. Outputs that cannot be compared.
    outputs = OutputObserver.of(site)
    if isinstance(outputs, Unclear):
        reason = "; ".join((*tape_reasons, *outputs.reasons))
        return report_site(candidate, Kind.INCONCLUSIVE, reason=reason)

    # Outputs that differ, where a mask on the input or on the eval output would be visible.
    why_unmeasurable = site.call.why_unmeasurable()
    if outputs.effects and (not why_unmeasurable or carry_values(site.run(training=False))):
        return outputs

    # 10. Nothing differs.
    if why_unmeasurable:
        reason = f"its input is {why_unmeasurable}, so nothing can be measured: {_REACH_FIX}"
        report = report_site(candidate, Kind.INCONCLUSIVE, reason=reason)
        return replace(report, fix=_REACH_FIX)
    if candidate.training_draws:
        reason = "it draws random numbers, and its output in training is eval's in every forward"
        return report_site(candidate, Kind.INCONCLUSIVE, reason=reason)
    return report_site(candidate, Kind.NEVER_ON)


def _measure_outputs(
    call: CallToJudge, observer: OutputObserver, tape_reasons: Sequence[str]
) -> list[SiteReport]:
    """Steps 11 and 12: the verdicts on outputs that differ from eval."""
    site, candidate = call.site, call.candidate

    # 11. They differ from forward to forward.
    outputs, eval_outputs = site.run(training=True), site.run(training=False)
    for _ in range(_REPEATS):
        for tensor, first in zip(site.run(training=True), outputs, strict=True):
            if not torch.equal(tensor, first):
                return _measure(call, observer, tape_reasons=tape_reasons)

    # 12. They are the same in every forward. All of them may be zero.
    forward_count = _REPEATS + 1
    if not any(bool(tensor.any()) for tensor in outputs):
        figures = Figures(
            outcome=Outcome.NOTHING_KEPT, forward_count=forward_count, keep_rate=0.0, gap=0.0
        )
        return [report_site(candidate, Kind.DROPS_ALL, figures=figures, train_scale=0.0)]

    # 12. Else they may be eval's outputs times one factor, with or without zeros among them.
    ratios = []
    has_dropped = False
    for output, eval_output in zip(outputs, eval_outputs, strict=True):
        has_dropped = has_dropped or bool(((output == 0) & (eval_output != 0)).any())
        a, b = output.to(torch.float64).reshape(-1), eval_output.to(torch.float64).reshape(-1)
        ratios.append((a / b).masked_fill(b == 0, float("nan")))
    factor = kept_value(torch.cat(ratios), rounding=1e-5)
    if factor is None:
        figures = Figures(outcome=Outcome.GAP, forward_count=forward_count)
        reason = "training differs from eval although it draws nothing"
        return [report_site(candidate, Kind.INCONCLUSIVE, figures=figures, reason=reason)]
    if has_dropped:
        figures = Figures(outcome=Outcome.FROZEN, forward_count=forward_count)
        return [report_site(candidate, Kind.FROZEN, figures=figures)]
    figures = Figures(
        outcome=Outcome.GAP,
        forward_count=forward_count,
        gap=factor,
        gap_interval=(factor, factor),
    )
    return [report_site(candidate, Kind.WRONG_SCALE, figures=figures)]


def _may_choose_path(call: CallToJudge) -> bool:
    """Whether a random number may choose the path: Python has it, from its generators or torch."""
    if any(draw.by_host for draw in call.candidate.training_draws):
        return True
    try:
        # Two runs: a rare branch may be the one that reads the number.
        for _ in range(2):
            if run_on_tape(call.site, frozenset()).reading.may_choose_path:
                return True
    except TAPE_ERRORS:
        return True
    return False


def _observe_by_tape(call: CallToJudge) -> TapeObserver | Unclear:
    """The observer of the noise on a tape, or why a tape cannot follow it."""
    site, p = call.site, call.candidate.p
    augmented = augments(site.module)
    observer = TapeObserver.of(site, p, augmented=augmented)
    if isinstance(observer, Unclear) and SCALE_HIDDEN in observer.reasons and site.has_children:
        # The normalisation that takes the scale out may be a module that the site calls. The
        # scale is then visible in what reaches it.
        with site.including_inputs():
            observer = TapeObserver.of(site, p, augmented=augmented)
    return observer


def _judge_skipped_layers(call: CallToJudge, layers: list[nn.Module]) -> list[SiteReport]:
    """The verdicts on a module that skips layers: on the skips, and on its other noise.

    Empty where the site does more than that at random, or has other noise that no tape can follow.
    """
    # With every layer skipped, a training forward shows the other noise alone.
    site = call.site
    skip_all = dict.fromkeys(layers, 0.0)
    other_noise: TapeObserver | None = None
    with site.scaled_branches(skip_all):
        observer = _observe_by_tape(call)
    if isinstance(observer, TapeObserver):
        other_noise = observer
    elif not observer.saw_no_noise:
        return []
    skips = SkippedLayers.of(site, layers, other_noise)
    if skips is None:
        return []
    other_reports = []
    if other_noise is not None:
        with site.scaled_branches(skip_all):
            other_reports = _measure(call, other_noise)

    # The layers that run are scaled up for those that do not: ordinary dropout, of layers.
    source = f"skips of {len(layers)} layers"
    if abs(skips.factor - 1) > 1e-3:
        (report,) = _measure(call, skips)
        return [replace(report, source=source), *other_reports]

    # Else LayerDrop. Its report has the declared rate only where the measured one agrees.
    shares = [float(skips.draw()[0].mean()) for _ in range(_SKIP_FORWARDS)]
    keep_rate = sum(shares) / _SKIP_FORWARDS
    interval = statistics.mean_interval(shares, alpha=call.alpha)
    p = layer_drop_rate(site.module)
    if p is not None and not interval[0] <= 1 - p <= interval[1]:
        p = None
    figures = Figures(
        outcome=Outcome.GAP,
        forward_count=_SKIP_FORWARDS,
        kept_value=1.0,
        keep_rate=keep_rate,
        keep_interval=interval,
        gap=keep_rate,
        gap_interval=interval,
    )
    report = report_site(
        replace(call.candidate, p=p),
        Kind.LAYERS_SKIPPED,
        source=source,
        figures=figures,
        train_scale=1.0,
        eval_scale=1.0,
    )
    return [report, *other_reports]


def _eval_factor(site: IsolatedSite, effects: tuple[Effect, ...]) -> float | None:
    """The factor by which eval multiplies the input.

    None unless the site is a single dropout whose one output is a multiple of its one input.
    """
    outputs = site.run(training=False)
    inputs = [tensor for tensor in site.call.tensors() if tensor.is_floating_point()]
    if not len(effects) == len(outputs) == len(inputs) == 1:
        return None
    if outputs[0].shape != inputs[0].shape:
        return None
    x, y = inputs[0].to(torch.float64), outputs[0].to(torch.float64)
    if not bool(x.any()):
        return None

    factor = float((x * y).sum() / (x * x).sum())  # the least squares solution of y = factor * x
    error = float((factor * x - y).abs().max())
    # One product is rounded once; four steps allow for an eval that multiplies several times.
    step = torch.finfo(outputs[0].dtype).eps
    if factor > 0 and error <= 4 * step * float(y.abs().max()):
        return factor
    return None


def _measure(
    call: CallToJudge,
    observer: NoiseObserver,
    *,
    eval_factor: float | None = None,
    tape_reasons: Sequence[str] = (),
) -> list[SiteReport]:
    """The reports on every effect of an observer.

    With `eval_factor`, where it is known, the scales are those of the user's code. `tape_reasons`
    say why no tape could follow the noise; an inconclusive report names them.
    """
    effects = observer.effects
    # The effects of one call share its level.
    all_figures = measure(observer, alpha=call.alpha / len(effects), draws=call.draws)
    reports = []
    for number, (effect, figures) in enumerate(zip(effects, all_figures, strict=True), start=1):
        if eval_factor is not None and effect.balance:
            effect = replace(effect, scale=eval_factor / effect.balance)
        kind = verdicts.name_kind(effect, figures, call.candidate.p)
        train_scale, eval_scale = verdicts.user_scales(effect, figures)
        reason = effect.remark
        if kind is Kind.INCONCLUSIVE and effect.direction is not None:
            # Without repeats: the tape and the output may give the same reason.
            reason = "; ".join(dict.fromkeys((*tape_reasons, effect.remark)))
        report = report_site(
            call.candidate,
            kind,
            source=f"{number} of {len(effects)}" if len(effects) > 1 else "",
            figures=figures,
            train_scale=train_scale,
            eval_scale=eval_scale,
            reason=reason,
        )
        reports.append(report)
    return reports
