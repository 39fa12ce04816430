"""One candidate's verdict, call by call: by its tape, by its outputs, or by what it does not do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from evalmode.export.audit import statistics as st
from evalmode.export.audit import verdicts
from evalmode.export.audit.augmentation import augments
from evalmode.export.audit.balance import UNSEEN
from evalmode.export.audit.by_output import OutputObserver
from evalmode.export.audit.by_tape import PathChanged, TapeObserver, Twin, gathered, probe, read
from evalmode.export.audit.call import ZERO, CallKind, carry_values
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite, noise_for_zero_weights
from evalmode.export.audit.masks import kept_value
from evalmode.export.audit.measure import measure
from evalmode.export.audit.site import (
    SEVERITIES,
    Effect,
    Kind,
    Measured,
    NoiseObserver,
    Outcome,
    Site,
    Unclear,
)
from evalmode.export.audit.skipped_layers import SkippedLayers, layer_drop_rate, skipped
from evalmode.export.audit.verdicts import kind_of, scales
from evalmode.export.module.network import Network

_EVAL_PROBES = 4
_SKIPS = 128  # forwards that estimate how often layers are skipped


def judge(
    network: Network,
    candidate: PossibleSite,
    sites: Sequence[PossibleSite],
    *,
    alpha: float,
    draws: int | None,
    given: bool,
) -> list[Site]:
    """The sites of one candidate among all `sites`, each of its calls at level `alpha`.

    `network` is a working copy; `given` says that a parent which draws holds the same rate, so that
    the dropout itself need not be called.
    """
    if candidate.p == 0 and not candidate.training and not candidate.eval:
        return [_site(candidate, Kind.OFF)]
    if not candidate.calls:
        if given:
            return [_site(candidate, Kind.NOT_CALLED, harmless=True)]
        return [_site(candidate, Kind.ALWAYS_ON if candidate.eval else Kind.NOT_CALLED)]
    drawing = [network.parts[site.path] for site in sites if site.training or site.eval]
    judged: list[list[Site]] = []
    twins: dict[CallKind, Twin] = {}
    calls = zip(candidate.calls, candidate.kinds, candidate.numbers, strict=True)
    for call, kind, number in calls:
        held = IsolatedSite(
            network, network.parts[candidate.path], call, trains=candidate.trains, sites=drawing
        )
        with held.ready():
            try:
                if kind in twins and twins[kind].fits(held):
                    continue
                sites_of_call, twin = _call(held, candidate, alpha, draws)
            except Exception as error:  # the user's own code, run without the network around it
                why = f"it does not run alone: {type(error).__name__}: {error}"
                wrong = Kind.ALWAYS_ON if candidate.eval else Kind.INCONCLUSIVE
                sites_of_call, twin = [_site(candidate, wrong, why=why)], None
        if twin is not None:
            twins.setdefault(kind, twin)
        verdicts_so_far = [[(site.draw, site.kind) for site in other] for other in judged]
        if [(site.draw, site.kind) for site in sites_of_call] not in verdicts_so_far:
            judged.append([replace(site, call=number if judged else 0) for site in sites_of_call])
    return list(itertools.chain(*judged))


def _call(
    held: IsolatedSite, candidate: PossibleSite, alpha: float, draws: int | None
) -> tuple[list[Site], Twin | None]:
    """The sites of one call, and what tells calls that are like it."""
    if candidate.eval and not _idle_in_eval(held, candidate):
        return [_always_on(held, candidate)], None
    if held.call.emptiness() == ZERO:
        held.call = held.call.with_noise()
        sites_of_call, twin = _judge(held, candidate, alpha, draws)
        return [_on_noise(site, "its input is zero everywhere") for site in sites_of_call], twin
    sites_of_call, twin = _judge(held, candidate, alpha, draws)
    if all(site.kind is Kind.INCONCLUSIVE for site in sites_of_call) and held.has_zero_weights:
        with noise_for_zero_weights(held.site):
            again, twin = _judge(held, candidate, alpha, draws)
        if not any(site.kind is Kind.INCONCLUSIVE for site in again):
            why = "its weights that are all zero let nothing through"
            return [_on_noise(site, why) for site in again], None
    return sites_of_call, twin


def _on_noise(site: Site, why: str) -> Site:
    return replace(site, sentence=f"{site.sentence} (measured with random values, since {why})")


def _idle_in_eval(held: IsolatedSite, candidate: PossibleSite) -> bool:
    """Whether eval draws numbers of torch's, and uses none of them: LayerDrop draws, and then asks
    for the mode.
    """
    if not candidate.training or any(draw.by_host for draw in candidate.eval):
        return False
    first = held.run(training=False)
    for _ in range(_EVAL_PROBES):
        reading, output = read(held, frozenset(), training=False)
        if reading.steers or reading.applications or reading.obstacles or not reading.draws:
            return False
        if not all(torch.equal(a, b) for a, b in zip(first, output, strict=True)):
            return False
    return True


def _judge(
    held: IsolatedSite, candidate: PossibleSite, alpha: float, draws: int | None
) -> tuple[list[Site], Twin | None]:
    steers = held.has_parts and bool(candidate.training) and _steers(held, candidate)
    layers = skipped(held) if steers else []
    if layers:
        sites = _skipping(held, layers, candidate, alpha, draws)
        if sites:
            return sites, None
    taped = _taped(held, candidate)
    if isinstance(taped, Unclear) and not taped.why and candidate.training:
        # it drew in the network, and does not alone: a child's flag may decide
        held.with_children()
        taped = _taped(held, candidate)
    if isinstance(taped, TapeObserver) and layers:
        taped = Unclear((f"it skips some of {len(layers)} modules that it calls in eval",))
    if isinstance(taped, TapeObserver):
        whole = OutputObserver.of(held) if taped.repeats else Unclear()
        if isinstance(whole, OutputObserver) and whole.exact:
            return _measured(whole, candidate, alpha, draws, None), None
        try:
            sites = _measured(taped, candidate, alpha, draws, _own_scale(held, taped.effects))
            return sites, taped.twin(sites)
        except PathChanged as error:  # a rare path, which no probe took
            taped = Unclear((str(error),))
    outputs = OutputObserver.of(held)
    if isinstance(outputs, Unclear):
        why = "; ".join((*taped.why, *outputs.why))
        return [_site(candidate, Kind.INCONCLUSIVE, why=why)], None
    if not outputs.effects or (
        held.call.emptiness() and not carry_values(held.run(training=False))
    ):
        return [_unmoved(held, candidate)], None
    still = _still(held, candidate)
    return (
        [still] if still else _measured(outputs, candidate, alpha, draws, None, taped.why)
    ), None


def _taped(held: IsolatedSite, candidate: PossibleSite) -> TapeObserver | Unclear:
    augmented = augments(held.site)
    taped = TapeObserver.of(held, candidate.p, augmented=augmented)
    if isinstance(taped, Unclear) and UNSEEN in taped.why and held.has_parts:
        # A normalisation that takes the scale out may be one of the modules that it calls.
        with held.showing_inputs():
            taped = TapeObserver.of(held, candidate.p, augmented=augmented)
    return taped


def _steers(held: IsolatedSite, candidate: PossibleSite) -> bool:
    """Whether a draw may choose the path: it becomes a number of Python's, or always was one."""
    if any(draw.by_host for draw in candidate.training):
        return True
    try:
        return any(read(held, frozenset())[0].steers for _ in range(2))
    except (RuntimeError, NotImplementedError, TypeError):  # what a tape cannot watch
        return True


def _skipping(
    held: IsolatedSite,
    layers: list[nn.Module],
    candidate: PossibleSite,
    alpha: float,
    draws: int | None,
) -> list[Site]:
    """The sites of a module that skips layers: the skipping, and what else it draws itself."""
    # Where a layer passes on its input, it makes no difference whether it is skipped.
    with held.branches(dict.fromkeys(layers, 0.0)):
        rest = _taped(held, candidate)
        if isinstance(rest, Unclear) and rest.why:
            return []
    taped = rest if isinstance(rest, TapeObserver) else None
    observer = SkippedLayers.of(held, layers, taped)
    if observer is None:
        return []
    with held.branches(dict.fromkeys(layers, 0.0)):
        others = [] if taped is None else _measured(taped, candidate, alpha, draws, None)
    name = f"skips of {len(layers)} layers"
    if abs(observer.factor - 1) > 1e-3:
        (site,) = _measured(observer, candidate, alpha, draws, None)
        return [replace(site, draw=name), *others]
    shares = [float(observer.draw()[0].mean()) for _ in range(_SKIPS)]
    keep, interval = sum(shares) / _SKIPS, st.mean_interval(shares, alpha=alpha)
    rate = layer_drop_rate(held.site)
    declared = rate if rate is not None and interval[0] <= 1 - rate <= interval[1] else None
    site = _site(
        replace(candidate, p=declared),
        Kind.LAYERS_SKIPPED,
        draw=name,
        measured=Measured(
            outcome=Outcome.GAP,
            draws=_SKIPS,
            value=1.0,
            keep=keep,
            keep_interval=interval,
            gap=keep,
            gap_interval=interval,
        ),
        scales=(1.0, 1.0),
    )
    return [site, *others]


def _measured(
    observer: NoiseObserver,
    candidate: PossibleSite,
    alpha: float,
    draws: int | None,
    own: float | None,
    whys: Sequence[str] = (),
) -> list[Site]:
    count = len(observer.effects)
    figures = measure(observer, alpha=alpha / count, draws=draws)
    names = [f"{index + 1} of {count}" if count > 1 else "" for index in range(count)]
    return [
        _site_of(candidate, name, effect, measured, own, whys)
        for name, effect, measured in zip(names, observer.effects, figures, strict=True)
    ]


def _site_of(
    candidate: PossibleSite,
    name: str,
    effect: Effect,
    measured: Measured,
    own: float | None,
    whys: Sequence[str],
) -> Site:
    if own is not None and effect.balance:
        effect = Effect(
            balance=effect.balance,
            additive=effect.additive,
            scale=own / effect.balance,
            rounding=effect.rounding,
        )
    kind = kind_of(effect, measured, candidate.p)
    train_scale, eval_scale = scales(effect, measured)
    why = effect.why
    if kind is Kind.INCONCLUSIVE and effect.direction is not None:
        why = "; ".join(dict.fromkeys((*whys, effect.why)))
    return _site(
        candidate, kind, draw=name, measured=measured, scales=(train_scale, eval_scale), why=why
    )


def _site(
    candidate: PossibleSite,
    kind: Kind,
    *,
    draw: str = "",
    measured: Measured | None = None,
    scales: tuple[float | None, float | None] = (None, None),
    why: str = "",
    fix: str = "",
    harmless: bool = False,
) -> Site:
    m = measured or Measured(outcome=Outcome.NONE, draws=0)
    return Site(
        path=candidate.path,
        type=candidate.kind,
        kind=kind,
        draw=draw,
        p=candidate.p,
        keep_rate=m.keep,
        keep_interval=m.keep_interval,
        train_scale=scales[0],
        eval_scale=scales[1],
        gap=m.gap,
        gap_interval=m.gap_interval,
        draws=m.draws,
        calls=candidate.count,
        judged=len(candidate.calls),
        sentence=verdicts.sentence(
            kind, gap=m.gap, keep=m.keep, p=candidate.p, why=why, draws=m.draws
        ),
        fix="" if harmless else fix or verdicts.fix(kind, p=candidate.p, keep=m.keep),
        severity=None if harmless else SEVERITIES.get(kind),
    )


def _own_scale(held: IsolatedSite, effects: tuple[Effect, ...]) -> float | None:
    """What eval multiplies the input by, where the site is one dropout whose output is a multiple
    of its one input.
    """
    outputs = held.run(training=False)
    inputs = [tensor for tensor in held.call.tensors() if tensor.is_floating_point()]
    if (
        len(effects) != 1
        or len(outputs) != 1
        or len(inputs) != 1
        or outputs[0].shape != inputs[0].shape
    ):
        return None
    x, y = (tensor.to(torch.float64) for tensor in (inputs[0], outputs[0]))
    if not bool(x.any()):
        return None
    factor = float((x * y).sum() / (x * x).sum())
    off = float((factor * x - y).abs().max())
    step = torch.finfo(outputs[0].dtype).eps
    return factor if factor > 0 and off <= 4 * step * float(y.abs().max()) else None


def _unmoved(held: IsolatedSite, candidate: PossibleSite) -> Site:
    """A site whose training could not be seen to differ from eval: never on only where a mask would
    have been seen.
    """
    if emptiness := held.call.emptiness():
        why = f"its input is {emptiness}, so nothing can be measured: {verdicts.REACH}"
        return _site(candidate, Kind.INCONCLUSIVE, why=why, fix=verdicts.REACH)
    if candidate.training:
        why = "it draws random numbers, and its output in training is eval's in every forward"
        return _site(candidate, Kind.INCONCLUSIVE, why=why)
    return _site(candidate, Kind.NEVER_ON)


def _still(held: IsolatedSite, candidate: PossibleSite) -> Site | None:
    """The verdict of a site whose training output is always the same, and not eval's."""
    first, e = held.run(training=True), held.run(training=False)
    if any(
        not torch.equal(a, b)
        for _ in range(16)
        for a, b in zip(held.run(training=True), first, strict=True)
    ):
        return None
    if not any(bool(tensor.any()) for tensor in first):
        nothing = Measured(outcome=Outcome.NOTHING_KEPT, draws=17, keep=0.0, gap=0.0)
        return _site(candidate, Kind.DROPS_ALL, measured=nothing, scales=(0.0, None))
    value = kept_value(_ratios(first, e), rounding=1e-5)
    dropped = any(bool(((a == 0) & (b != 0)).any()) for a, b in zip(first, e, strict=True))
    if value is not None and dropped:
        return _site(candidate, Kind.FROZEN, measured=Measured(outcome=Outcome.FROZEN, draws=17))
    gap = Measured(
        outcome=Outcome.GAP,
        draws=17,
        gap=value,
        gap_interval=None if value is None else (value, value),
    )
    why = "" if value is not None else "training differs from eval although it draws nothing"
    return _site(
        candidate,
        Kind.WRONG_SCALE if value is not None else Kind.INCONCLUSIVE,
        measured=gap,
        why=why,
    )


def _ratios(first: list[Tensor], e: list[Tensor]) -> Tensor:
    pairs = [
        (a.to(torch.float64).reshape(-1), b.to(torch.float64).reshape(-1))
        for a, b in zip(first, e, strict=True)
    ]
    return torch.cat([(a / b).masked_fill(b == 0, float("nan")) for a, b in pairs])


def _always_on(held: IsolatedSite, candidate: PossibleSite) -> Site:
    """Random in eval: an error whatever its mean; the keep rate is told where it can be read."""
    for training in (False, True):
        found = probe(held, training=training)
        if isinstance(found, Unclear) or len(found[1][0].applications) != 1:
            continue
        noise = torch.stack(
            [gathered(read(held, found[0], training=training)[0], [0]) for _ in range(32)]
        )
        value = kept_value(noise, rounding=1e-2)
        if value is not None:
            keep = float((noise != 0).to(torch.float64).mean())
            return _site(
                candidate,
                Kind.ALWAYS_ON,
                measured=Measured(outcome=Outcome.GAP, draws=32, keep=keep),
                scales=(value, None),
            )
    return _site(candidate, Kind.ALWAYS_ON)
