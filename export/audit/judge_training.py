"""The result for the training forward of one call, in steps 7 to 12.

`judge.py` has steps 1 to 6, and explains a signature and a fingerprint. In addition:

* A *tape* records one forward, operator by operator. It finds where noise is applied to data, reads
  the noise, and can run the forward with a constant in place of the noise.
* The *path* of a forward is the sequence of its operators. A random number may choose it, as in
  `if random() < p`, which skips a layer. A tape cannot follow that.
* An *effect* is one noise of the site that is measured by itself. A site has one or several.
* An *observer* repeats the call in training, and returns the noise of each effect. `TapeObserver`
  reads it from a tape, `OutputObserver` from the outputs, `SkippedLayers` from the layers that ran.

On a tape (`_judge_on_tape`):

7. Some training forwards skip layers that eval calls, and a tape can follow all other noise: layers
   skipped. If the layers that run are scaled up for it, the skips are judged like any mask.
8. A tape can follow all noise to the data: the noise is measured there. Exception: one mask is used
   several times, and the outputs show an exact pattern. Then the noise is measured at the outputs.

At the outputs, where no tape can follow the noise, training is compared with eval
(`_compare_outputs`):

9. The outputs of training and eval cannot be compared: inconclusive.
10. No output differs from eval, or a difference would show no mask:
    a. the input carries no value on which a mask would be visible: inconclusive;
    b. it draws random numbers: inconclusive;
    c. else never on: a mask would have been visible.

Outputs that differ from eval (`_measure_outputs`):

11. They differ from forward to forward too: the noise is measured at the outputs.
12. Every training forward returns the same:
    a. zeros alone: drops everything;
    b. no multiple of eval's outputs: inconclusive;
    c. a multiple of them, with zeros where eval has values: frozen mask;
    d. a multiple of them: wrong scale.

Measured noise gets its kind from `verdicts.name_kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from evalmode.export.audit import statistics, verdicts
from evalmode.export.audit.augmentation import augments
from evalmode.export.audit.balance import SCALE_HIDDEN
from evalmode.export.audit.by_output import OutputObserver
from evalmode.export.audit.by_tape import (
    TAPE_ERRORS,
    PathChanged,
    TapeObserver,
    run_on_tape,
)
from evalmode.export.audit.call import carry_values
from evalmode.export.audit.call_audit import CallAudit, CallResult
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


def judge_training(audit: CallAudit) -> CallResult:
    """The result for the training forward of a call. Runs inside of `site.isolated()`."""
    # 7. and 8. A result, or why no tape can follow the noise.
    on_tape = _judge_on_tape(audit)
    if isinstance(on_tape, CallResult):
        return on_tape
    tape_reasons = on_tape.reasons

    # 9. and 10. A report, or the observer of outputs that differ from eval.
    at_outputs = _compare_outputs(audit, tape_reasons)
    if isinstance(at_outputs, SiteReport):
        return CallResult([at_outputs])

    # 11. and 12. The reports on these outputs.
    return CallResult(_measure_outputs(audit, at_outputs, tape_reasons))


def _judge_on_tape(audit: CallAudit) -> CallResult | Unclear:
    """Steps 7 and 8: the result for noise that a tape can follow, or why no tape can follow it."""
    site, possible_site = audit.site, audit.possible_site

    # 7. Layers that are skipped at random.
    layers: list[nn.Module] = []
    if site.has_children and possible_site.training_draws and _may_choose_path(audit):
        layers = skipped_layers(site)
    if layers:
        reports = _judge_skipped_layers(audit, layers)
        if reports is not None:
            return CallResult(reports)

    # 8. Noise that a tape can follow.
    observer = _observe_on_tape(audit)
    if isinstance(observer, Unclear) and observer.saw_no_noise and possible_site.training_draws:
        # It drew in the network and does not draw alone: it may read the flag of a child.
        site.switch_children()
        observer = _observe_on_tape(audit)
    if isinstance(observer, Unclear):
        return observer
    if layers:
        # The tape followed one path. Step 7 found that the path changes, and could not explain it.
        return Unclear((f"it skips some of {len(layers)} modules that it calls in eval",))

    # If a path uses a mask twice, replacing it by its mean gives another result.
    if observer.reuses_mask:
        outputs = OutputObserver.of(site)
        if isinstance(outputs, OutputObserver) and outputs.exact:
            return CallResult(_measure(audit, outputs))

    eval_factor = _eval_factor(site, observer.effects)
    try:
        reports = _measure(audit, observer, eval_factor=eval_factor)
    except PathChanged as error:  # a rare path, which none of the observer's forwards took
        return Unclear((str(error),))
    # An observer that includes inputs was needed because the outputs hide the scale. A fingerprint
    # compares outputs alone, and would match at any scale.
    if observer.includes_inputs:
        return CallResult(reports)
    return CallResult(reports, observer.fingerprint(reports))


def _may_choose_path(audit: CallAudit) -> bool:
    """Whether a random number may choose the path: Python has it, from its generators or torch."""
    if any(draw.by_host for draw in audit.possible_site.training_draws):
        return True
    try:
        # Two runs: a rare branch may be the one that reads the number.
        for _ in range(2):
            if run_on_tape(audit.site, frozenset()).reading.may_choose_path:
                return True
    except TAPE_ERRORS:
        return True
    return False


def _judge_skipped_layers(audit: CallAudit, layers: list[nn.Module]) -> list[SiteReport] | None:
    """Step 7: the reports on a module that skips layers: on the skips, and on its other noise.

    None where the skips do not explain all that training changes, or where no tape can follow the
    other noise.
    """
    # The other noise. A training forward that skips every layer shows it alone.
    site = audit.site
    skip_all = dict.fromkeys(layers, 0.0)
    other_noise: TapeObserver | None = None
    with site.scaled_branches(skip_all):
        observer = _observe_on_tape(audit)
    if isinstance(observer, TapeObserver):
        other_noise = observer
    elif not observer.saw_no_noise:
        return None

    # The skips. Beside them and the other noise, training must equal eval.
    skips = SkippedLayers.of(site, layers, other_noise)
    if skips is None:
        return None
    other_reports = []
    if other_noise is not None:
        with site.scaled_branches(skip_all):
            other_reports = _measure(audit, other_noise)

    # The layers that run are scaled up for those that do not: ordinary dropout, of layers.
    source = f"skips of {len(layers)} layers"
    if abs(skips.factor - 1) > 1e-3:
        (report,) = _measure(audit, skips)
        return [replace(report, source=source), *other_reports]

    # Else LayerDrop. Its report has the declared rate only where the measured one agrees.
    shares = [float(skips.draw()[0].mean()) for _ in range(_SKIP_FORWARDS)]
    keep_rate = sum(shares) / _SKIP_FORWARDS
    interval = statistics.mean_interval(shares, alpha=audit.alpha)
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
        replace(audit.possible_site, p=p),
        Kind.LAYERS_SKIPPED,
        source=source,
        figures=figures,
        train_scale=1.0,
        eval_scale=1.0,
    )
    return [report, *other_reports]


def _observe_on_tape(audit: CallAudit) -> TapeObserver | Unclear:
    """The observer of the noise on a tape, or why no tape can follow it."""
    site, p = audit.site, audit.possible_site.p
    augmented = augments(site.module)
    observer = TapeObserver.of(site, p, augmented=augmented)
    if isinstance(observer, Unclear) and SCALE_HIDDEN in observer.reasons and site.has_children:
        # The layer that cancels the scale may be a module that the site calls. The scale is then
        # visible in the inputs of that module.
        with site.including_inputs():
            observer = TapeObserver.of(site, p, augmented=augmented)
    return observer


def _eval_factor(site: IsolatedSite, effects: tuple[Effect, ...]) -> float | None:
    """The factor by which eval multiplies the input.

    None unless the site is a single dropout whose one output is a multiple of its one input.
    """
    outputs = site.run(training=False)
    inputs = [tensor for tensor in site.call.tensors() if tensor.is_floating_point()]
    is_single = len(effects) == len(outputs) == len(inputs) == 1
    if not is_single or outputs[0].shape != inputs[0].shape:
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


def _compare_outputs(audit: CallAudit, tape_reasons: Sequence[str]) -> OutputObserver | SiteReport:
    """Steps 9 and 10: the observer of outputs that differ from eval, or a report if none do.

    `tape_reasons` say why no tape can follow the noise.
    """
    site, possible_site = audit.site, audit.possible_site

    # 9. Outputs that cannot be compared.
    observer = OutputObserver.of(site)
    if isinstance(observer, Unclear):
        reason = "; ".join((*tape_reasons, *observer.reasons))
        return report_site(possible_site, Kind.INCONCLUSIVE, reason=reason)

    # Outputs that differ. A mask on the input is visible there if the input carries values.
    why_unmeasurable = site.call.why_unmeasurable()
    if observer.effects and not why_unmeasurable:
        return observer
    # A mask behind a bias is visible if eval's output carries values.
    if observer.effects and carry_values(site.run(training=False)):
        return observer

    # 10a. A mask on this input would not be visible.
    if why_unmeasurable:
        reason = f"its input is {why_unmeasurable}, so nothing can be measured: {_REACH_FIX}"
        report = report_site(possible_site, Kind.INCONCLUSIVE, reason=reason)
        return replace(report, fix=_REACH_FIX)

    # 10b. The random numbers must have some use, which the samples do not show.
    if possible_site.training_draws:
        reason = "it draws random numbers, and its output in training is eval's in every forward"
        return report_site(possible_site, Kind.INCONCLUSIVE, reason=reason)

    # 10c. Training is eval.
    return report_site(possible_site, Kind.NEVER_ON)


def _measure_outputs(
    audit: CallAudit, observer: OutputObserver, tape_reasons: Sequence[str]
) -> list[SiteReport]:
    """Steps 11 and 12: the reports on outputs that differ from eval.

    `tape_reasons` say why no tape can follow the noise.
    """
    site, possible_site = audit.site, audit.possible_site

    # 11. They differ from forward to forward.
    outputs = site.run(training=True)
    eval_outputs = site.run(training=False)
    for _ in range(_REPEATS):
        for repeated, output in zip(site.run(training=True), outputs, strict=True):
            if not torch.equal(repeated, output):
                return _measure(audit, observer, tape_reasons=tape_reasons)

    # 12a. They are the same in every forward, and zero everywhere.
    forward_count = _REPEATS + 1
    if not any(bool(output.any()) for output in outputs):
        figures = Figures(
            outcome=Outcome.NOTHING_KEPT, forward_count=forward_count, keep_rate=0.0, gap=0.0
        )
        return [report_site(possible_site, Kind.DROPS_ALL, figures=figures, train_scale=0.0)]

    # 12b. They are no multiple of eval's outputs. Zeros are allowed: a mask may have dropped them.
    ratios = []
    has_dropped = False
    for output, eval_output in zip(outputs, eval_outputs, strict=True):
        has_dropped = has_dropped or bool(((output == 0) & (eval_output != 0)).any())
        numerator = output.to(torch.float64).reshape(-1)
        denominator = eval_output.to(torch.float64).reshape(-1)
        ratio = (numerator / denominator).masked_fill(denominator == 0, float("nan"))
        ratios.append(ratio)
    factor = kept_value(torch.cat(ratios), rounding=1e-5)
    if factor is None:
        figures = Figures(outcome=Outcome.GAP, forward_count=forward_count)
        reason = "training differs from eval although it draws nothing"
        return [report_site(possible_site, Kind.INCONCLUSIVE, figures=figures, reason=reason)]

    # 12c. A multiple with zeros: the same mask in every forward.
    if has_dropped:
        figures = Figures(outcome=Outcome.FROZEN, forward_count=forward_count)
        return [report_site(possible_site, Kind.FROZEN, figures=figures)]

    # 12d. A multiple without zeros.
    figures = Figures(
        outcome=Outcome.GAP,
        forward_count=forward_count,
        gap=factor,
        gap_interval=(factor, factor),
    )
    return [report_site(possible_site, Kind.WRONG_SCALE, figures=figures)]


def _measure(
    audit: CallAudit,
    observer: NoiseObserver,
    *,
    eval_factor: float | None = None,
    tape_reasons: Sequence[str] = (),
) -> list[SiteReport]:
    """The reports on all effects of an observer.

    With `eval_factor`, that of `_eval_factor`, the scales are those of the user's code. An
    inconclusive report on noise of no known form names the `tape_reasons`: why no tape can follow
    the noise.
    """
    effects = observer.effects
    # The effects of one call share its level.
    all_figures = measure(observer, alpha=audit.alpha / len(effects), draws=audit.draws)

    reports = []
    for number, (effect, figures) in enumerate(zip(effects, all_figures, strict=True), start=1):
        if eval_factor is not None and effect.balance:
            effect = replace(effect, scale=eval_factor / effect.balance)
        kind = verdicts.name_kind(effect, figures, audit.possible_site.p)
        train_scale, eval_scale = verdicts.user_scales(effect, figures)

        reason = effect.remark
        if kind is Kind.INCONCLUSIVE and effect.direction is not None:
            # A dictionary drops repeats: the tape and the output may give the same reason.
            reason = "; ".join(dict.fromkeys((*tape_reasons, effect.remark)))
        source = ""
        if len(effects) > 1:
            source = f"{number} of {len(effects)}"
        report = report_site(
            audit.possible_site,
            kind,
            source=source,
            figures=figures,
            train_scale=train_scale,
            eval_scale=eval_scale,
            reason=reason,
        )
        reports.append(report)
    return reports
