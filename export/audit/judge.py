"""The verdict on one possible site. This file decides; the files that it imports measure.

A possible site as a whole:

1. p = 0 and it draws nothing in either mode: off.
2. No sample reaches it. Its parent draws at the same rate: not called, without a finding, as the
   parent uses the rate itself. It draws in eval: always on. Else: not called.
3. Otherwise each captured call is judged. A call that behaves like a judged call of its kind is
   skipped, and a verdict that repeats an earlier one is dropped.

One call:

4. It draws in eval, and the numbers matter: always on.
5. Its input is zero everywhere: it is judged on random values. Likewise if it is inconclusive, and
   a parameter inside is zero everywhere.
6. The user's code raises without the network around it: always on if it draws in eval, else
   inconclusive.

The training forward of a call:

7. It skips layers that eval calls, and a tape can follow all other noise: layers skipped. Where the
   layers that run are scaled up for it, the kind is that of any mask.
8. A tape can follow the noise to the data: the noise is measured there. Exception: one mask is used
   several times, and the outputs show an exact pattern. Then 12 applies.
9. The outputs of training and eval cannot be compared: inconclusive.
10. No output differs from eval:
    a. its input is empty, not finite, or zero where it is finite: inconclusive;
    b. it draws random numbers: inconclusive;
    c. else NEVER ON: a mask would have been visible, and there is none.
11. Every forward returns the same, and not what eval returns: drops everything, frozen mask, wrong
    scale or inconclusive.
12. Otherwise the noise is measured at the outputs.

Measured noise gets its kind from `verdicts.name_kind`.
What the audit prints for each kind is in `verdicts.REPORTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evalmode.export.audit import statistics as st
from evalmode.export.audit import verdicts
from evalmode.export.audit.augmentation import augments
from evalmode.export.audit.balance import SCALE_HIDDEN
from evalmode.export.audit.by_output import OutputObserver
from evalmode.export.audit.by_tape import (
    TAPE_ERRORS,
    JudgedCall,
    PathChanged,
    TapeObserver,
    noise_of,
    probe,
    run_on_tape,
)
from evalmode.export.audit.call import ZERO, CallKind, carry_values
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite, noise_for_zero_weights
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.measure import measure
from evalmode.export.audit.site import (
    Effect,
    Figures,
    Kind,
    NoiseObserver,
    Outcome,
    Site,
    Unclear,
)
from evalmode.export.audit.skipped_layers import SkippedLayers, layer_drop_rate, skipped_layers
from evalmode.export.module.network import Network

# Eval forwards that must be equal before draws in eval count as unused.
_EVAL_FORWARDS = 4
# Training forwards beside the first that must all be equal before a site counts as constant.
_REPEATS = 16
# Forwards that estimate how often layers are skipped. For a warning this is exact enough: within
# 0.2 of the rate for a single layer, and closer for several.
_SKIP_FORWARDS = 128
# Forwards that estimate the keep rate of a mask that is always on. No verdict rests on it.
_ALWAYS_ON_FORWARDS = 32


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One call to judge, and how strictly to test it: see `measure`."""

    candidate: PossibleSite
    site: IsolatedSite
    alpha: float
    draws: int | None


def judge(
    network: Network,
    candidate: PossibleSite,
    candidates: Sequence[PossibleSite],
    *,
    alpha: float,
    draws: int | None,
    used_by_parent: bool,
) -> list[Site]:
    """The verdicts on one of `candidates`, each of its calls tested at level `alpha`.

    `network` is a working copy. `used_by_parent` says that the parent draws at the candidate's
    rate, so that the dropout itself need not be called.
    """
    # 1. and 2.: without a call to run.
    draws_random = bool(candidate.training_draws or candidate.eval_draws)
    if candidate.p == 0 and not draws_random:
        return [_report(candidate, Kind.OFF)]
    if not candidate.calls:
        if used_by_parent:
            return [replace(_report(candidate, Kind.NOT_CALLED), fix="", severity=None)]
        return [_report(candidate, Kind.ALWAYS_ON if candidate.eval_draws else Kind.NOT_CALLED)]

    # 3. Each captured call.
    drawing = [
        network.parts[other.path]
        for other in candidates
        if other.training_draws or other.eval_draws
    ]
    reports: list[Site] = []
    verdicts_so_far: list[list[tuple[str, Kind]]] = []
    judged_calls: dict[CallKind, JudgedCall] = {}
    for captured in candidate.calls:
        site = IsolatedSite(
            network,
            network.parts[candidate.path],
            captured.call,
            trains=candidate.trains,
            sites=drawing,
        )
        case = _Case(candidate=candidate, site=site, alpha=alpha, draws=draws)
        with site.isolated():
            try:
                if captured.kind in judged_calls and judged_calls[captured.kind].covers(site):
                    continue
                call_reports, judged_call = _judge_call(case)
            except Exception as error:  # 6. the user's code may raise anything
                reason = f"it does not run alone: {type(error).__name__}: {error}"
                kind = Kind.ALWAYS_ON if candidate.eval_draws else Kind.INCONCLUSIVE
                call_reports, judged_call = [_report(candidate, kind, reason=reason)], None
        if judged_call is not None:
            judged_calls.setdefault(captured.kind, judged_call)

        verdict = [(report.draw, report.kind) for report in call_reports]
        if verdict not in verdicts_so_far:
            number = captured.number if verdicts_so_far else 0
            reports += [replace(report, call=number) for report in call_reports]
            verdicts_so_far.append(verdict)
    return reports


def _judge_call(case: _Case) -> tuple[list[Site], JudgedCall | None]:
    """The verdicts on one call, and what recognises calls that behave like it."""
    site, candidate = case.site, case.candidate

    # 4. Random in eval.
    if candidate.eval_draws and not _ignores_eval_draws(case):
        return [_report_always_on(case)], None

    # 5. Zeros hide every mask.
    if site.call.emptiness() == ZERO:
        site.call = site.call.with_random_values()
        reports, judged_call = _judge_training(case)
        return _note_random_values(reports, "its input is zero everywhere"), judged_call

    reports, judged_call = _judge_training(case)
    if all(report.kind is Kind.INCONCLUSIVE for report in reports) and site.has_zero_weights:
        with noise_for_zero_weights(site.module):
            reports_on_noise, judged_call = _judge_training(case)
        if not any(report.kind is Kind.INCONCLUSIVE for report in reports_on_noise):
            reason = "its weights that are all zero let nothing through"
            return _note_random_values(reports_on_noise, reason), None
    return reports, judged_call


def _judge_training(case: _Case) -> tuple[list[Site], JudgedCall | None]:
    """Steps 7 to 12: the training forward of one call, against its eval forward."""
    site, candidate = case.site, case.candidate

    # 7. Layers that are skipped at random.
    layers: list[nn.Module] = []
    if site.has_children and candidate.training_draws and _may_choose_path(case):
        layers = skipped_layers(site)
    if layers:
        reports = _judge_skipped_layers(case, layers)
        if reports:
            return reports, None

    # 8. Noise that a tape can follow.
    tape = _tape_observer(case)
    if isinstance(tape, Unclear) and not tape.reasons and candidate.training_draws:
        # It drew in the network and does not draw alone: it may read the flag of a child.
        site.switch_children()
        tape = _tape_observer(case)
    if isinstance(tape, TapeObserver) and layers:
        tape = Unclear((f"it skips some of {len(layers)} modules that it calls in eval",))
    if isinstance(tape, TapeObserver):
        if tape.repeats:
            by_output = OutputObserver.of(site)
            if isinstance(by_output, OutputObserver) and by_output.exact:
                return _measure(case, by_output), None
        try:
            factor = _eval_factor(site, tape.effects)
            reports = _measure(case, tape, eval_factor=factor)
            return reports, tape.judged_call(reports)
        except PathChanged as error:  # a rare path, which no probe took
            tape = Unclear((str(error),))

    # 9. Outputs that do not compare.
    outputs = OutputObserver.of(site)
    if isinstance(outputs, Unclear):
        reason = "; ".join((*tape.reasons, *outputs.reasons))
        return [_report(candidate, Kind.INCONCLUSIVE, reason=reason)], None

    # 10. Nothing differs. It is never on only if a mask would have been visible.
    emptiness = site.call.emptiness()
    if not outputs.effects or (emptiness and not carry_values(site.run(training=False))):
        if emptiness:
            fix = verdicts.REACH_FIX
            reason = f"its input is {emptiness}, so nothing can be measured: {fix}"
            return [replace(_report(candidate, Kind.INCONCLUSIVE, reason=reason), fix=fix)], None
        if candidate.training_draws:
            reason = (
                "it draws random numbers, and its output in training is eval's in every forward"
            )
            return [_report(candidate, Kind.INCONCLUSIVE, reason=reason)], None
        return [_report(candidate, Kind.NEVER_ON)], None

    # 11. and 12. The outputs differ: always by the same, or at random.
    constant = _judge_constant_output(case)
    if constant is not None:
        return [constant], None
    return _measure(case, outputs, tape_reasons=tape.reasons), None


def _ignores_eval_draws(case: _Case) -> bool:
    """Whether eval draws numbers from torch and does not use them.

    LayerDrop is often written so: it draws, and then asks for the mode.
    """
    site, candidate = case.site, case.candidate
    # The tape does not see the numbers of Python's and NumPy's generators.
    if not candidate.training_draws or any(draw.by_host for draw in candidate.eval_draws):
        return False
    expected = site.run(training=False)
    for _ in range(_EVAL_FORWARDS):
        reading, outputs = run_on_tape(site, frozenset(), training=False)
        if reading.steers or reading.applications or reading.obstacles or not reading.draws:
            return False
        if not all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True)):
            return False
    return True


def _may_choose_path(case: _Case) -> bool:
    """Whether a draw may choose the path: it becomes a number of Python's, or always was one."""
    if any(draw.by_host for draw in case.candidate.training_draws):
        return True
    try:
        return any(run_on_tape(case.site, frozenset())[0].steers for _ in range(2))
    except TAPE_ERRORS:
        return True


def _tape_observer(case: _Case) -> TapeObserver | Unclear:
    site = case.site
    augmented = augments(site.module)
    observer = TapeObserver.of(site, case.candidate.p, augmented=augmented)
    if isinstance(observer, Unclear) and SCALE_HIDDEN in observer.reasons and site.has_children:
        # The normalisation that takes the scale out may be a module that the site calls. The
        # scale is then visible in what reaches it.
        with site.including_inputs():
            observer = TapeObserver.of(site, case.candidate.p, augmented=augmented)
    return observer


def _judge_skipped_layers(case: _Case, layers: list[nn.Module]) -> list[Site]:
    """The verdicts on a module that skips layers: on the skipping, and on its other noise.

    Empty where skipping is not all that its tape cannot follow.
    """
    # With every layer skipped, a training forward shows the other noise alone.
    skip_all = dict.fromkeys(layers, 0.0)
    with case.site.scaled_branches(skip_all):
        other_noise = _tape_observer(case)
        if isinstance(other_noise, Unclear) and other_noise.reasons:
            return []
    tape = other_noise if isinstance(other_noise, TapeObserver) else None
    observer = SkippedLayers.of(case.site, layers, tape)
    if observer is None:
        return []
    other_reports: list[Site] = []
    if tape is not None:
        with case.site.scaled_branches(skip_all):
            other_reports = _measure(case, tape)

    name = f"skips of {len(layers)} layers"
    if abs(observer.factor - 1) > 1e-3:
        # The layers that run are scaled up for those that do not: ordinary dropout, of layers.
        (report,) = _measure(case, observer)
        return [replace(report, draw=name), *other_reports]

    shares = [float(observer.draw()[0].mean()) for _ in range(_SKIP_FORWARDS)]
    keep_rate, interval = sum(shares) / _SKIP_FORWARDS, st.mean_interval(shares, alpha=case.alpha)
    declared = layer_drop_rate(case.site.module)
    if declared is not None and not interval[0] <= 1 - declared <= interval[1]:
        declared = None
    figures = Figures(
        outcome=Outcome.GAP,
        draws=_SKIP_FORWARDS,
        kept_value=1.0,
        keep_rate=keep_rate,
        keep_interval=interval,
        gap=keep_rate,
        gap_interval=interval,
    )
    candidate = replace(case.candidate, p=declared)
    report = _report(candidate, Kind.LAYERS_SKIPPED, draw=name, figures=figures, scales=(1.0, 1.0))
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
    step = torch.finfo(outputs[0].dtype).eps
    return factor if factor > 0 and error <= 4 * step * float(y.abs().max()) else None


def _judge_constant_output(case: _Case) -> Site | None:
    """The verdict on a site whose training output differs from eval and is always the same.

    None where it is not always the same.
    """
    site, candidate = case.site, case.candidate
    outputs, expected = site.run(training=True), site.run(training=False)
    for _ in range(_REPEATS):
        for a, b in zip(site.run(training=True), outputs, strict=True):
            if not torch.equal(a, b):
                return None
    draws = _REPEATS + 1

    if not any(bool(tensor.any()) for tensor in outputs):
        figures = Figures(outcome=Outcome.NOTHING_KEPT, draws=draws, keep_rate=0.0, gap=0.0)
        return _report(candidate, Kind.DROPS_ALL, figures=figures, scales=(0.0, None))

    ratios: list[Tensor] = []
    drops = False
    for output, tensor in zip(outputs, expected, strict=True):
        drops = drops or bool(((output == 0) & (tensor != 0)).any())
        a, b = output.to(torch.float64).reshape(-1), tensor.to(torch.float64).reshape(-1)
        ratios.append((a / b).masked_fill(b == 0, float("nan")))
    factor = kept_value(torch.cat(ratios), rounding=1e-5)
    if factor is None:
        figures = Figures(outcome=Outcome.GAP, draws=draws)
        reason = "training differs from eval although it draws nothing"
        return _report(candidate, Kind.INCONCLUSIVE, figures=figures, reason=reason)
    if drops:
        figures = Figures(outcome=Outcome.FROZEN, draws=draws)
        return _report(candidate, Kind.FROZEN, figures=figures)
    figures = Figures(outcome=Outcome.GAP, draws=draws, gap=factor, gap_interval=(factor, factor))
    return _report(candidate, Kind.WRONG_SCALE, figures=figures)


def _report_always_on(case: _Case) -> Site:
    """The report on a site that is random in eval: an error whatever its mean.

    With the keep rate where the noise is a single mask that a tape can follow.
    """
    site, candidate = case.site, case.candidate
    for training in (False, True):
        probed = probe(site, training=training)
        if isinstance(probed, Unclear):
            continue
        if len(probed.readings[0].applications) != 1:
            continue
        noises = []
        for _ in range(_ALWAYS_ON_FORWARDS):
            reading, _outputs = run_on_tape(site, probed.foreign_noise, training=training)
            noises.append(noise_of(reading, [0]))
        noise = torch.stack(noises)
        value = kept_value(noise, rounding=1e-2)
        if value is not None:
            figures = Figures(
                outcome=Outcome.GAP,
                draws=_ALWAYS_ON_FORWARDS,
                keep_rate=float((noise != 0).to(torch.float64).mean()),
            )
            return _report(candidate, Kind.ALWAYS_ON, figures=figures, scales=(value, None))
    return _report(candidate, Kind.ALWAYS_ON)


def _measure(
    case: _Case,
    observer: NoiseObserver,
    *,
    eval_factor: float | None = None,
    tape_reasons: Sequence[str] = (),
) -> list[Site]:
    """The reports on every effect of an observer.

    `eval_factor`, where the site's code is that plain, turns the scales into those of the code.
    `tape_reasons` say why no tape could follow the noise; an inconclusive report names them.
    """
    effects = observer.effects
    # The effects of one call share its level.
    all_figures = measure(observer, alpha=case.alpha / len(effects), draws=case.draws)
    reports = []
    for number, (effect, figures) in enumerate(zip(effects, all_figures, strict=True), start=1):
        if eval_factor is not None and effect.balance:
            effect = replace(effect, scale=eval_factor / effect.balance)
        kind = verdicts.name_kind(effect, figures, case.candidate.p)
        reason = effect.remark
        if kind is Kind.INCONCLUSIVE and effect.direction is not None:
            reason = "; ".join(dict.fromkeys((*tape_reasons, effect.remark)))
        draw = f"{number} of {len(effects)}" if len(effects) > 1 else ""
        reports.append(
            _report(
                case.candidate,
                kind,
                draw=draw,
                figures=figures,
                scales=verdicts.user_scales(effect, figures),
                reason=reason,
            )
        )
    return reports


def _report(
    candidate: PossibleSite,
    kind: Kind,
    *,
    draw: str = "",
    figures: Figures | None = None,
    scales: tuple[float | None, float | None] = (None, None),
    reason: str = "",
) -> Site:
    if figures is None:
        figures = Figures(outcome=Outcome.NO_GAP, draws=0)
    p, keep_rate = candidate.p, figures.keep_rate
    return Site(
        path=candidate.path,
        type=candidate.type,
        kind=kind,
        draw=draw,
        p=p,
        keep_rate=keep_rate,
        keep_interval=figures.keep_interval,
        train_scale=scales[0],
        eval_scale=scales[1],
        gap=figures.gap,
        gap_interval=figures.gap_interval,
        draws=figures.draws,
        calls=candidate.call_count,
        judged=len(candidate.calls),
        sentence=verdicts.sentence(
            kind, gap=figures.gap, keep_rate=keep_rate, p=p, reason=reason, draws=figures.draws
        ),
        fix=verdicts.fix(kind, p=p, keep_rate=keep_rate),
        severity=verdicts.REPORTS[kind].severity,
    )


def _note_random_values(reports: list[Site], reason: str) -> list[Site]:
    note = f"(measured with random values, since {reason})"
    return [replace(report, sentence=f"{report.sentence} {note}") for report in reports]
