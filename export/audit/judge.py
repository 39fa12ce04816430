"""Decides what the audit says about one possible site: a module that may apply noise.

`find_sites.py` found the module and captured its calls: the arguments of each, and the state of the
module. An `IsolatedSite` repeats a captured call in training and in eval.

Later calls need not be judged in full. Calls with the same *signature* run the same code: they
differ in the sizes and values of their tensors alone. A judged call leaves a *fingerprint*: its
noise, and how its output in training compares with that in eval. A later call of the same signature
that matches the fingerprint has the same verdict.

A possible site as a whole (`judge`):

1. p = 0 and it draws nothing in either mode: off.
2. No sample reaches it (`_report_unreached`):
   a. its parent draws at the same rate, as in `F.dropout(x, self.drop.p)`: not called, without a
      finding, because the parent is judged;
   b. it draws in eval: always on;
   c. else: not called.
3. Samples reach it: each captured call is judged in steps 4 to 6. A result that repeats an earlier
   one is dropped.

One call (`_judge_call`):

4. It matches the fingerprint of an earlier call: no new result. An input of zeros would match any
   fingerprint, so such a call is always judged.
5. It draws in eval, and the numbers may change the output: always on. See `judge_eval.py`.
6. Else its training forward is judged, by `judge_training.py`. A mask on zeros has no effect, so
   a. if the input is all zeros, random inputs are used;
   b. if the result is inconclusive and some weights are all zeros, a second attempt is made with
      random weights.

If the module raises in steps 4 to 6, it does not run without the network around it: always on if it
draws in eval, else inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evalmode.export.audit.by_tape import Fingerprint
from evalmode.export.audit.call import ZERO, CallSignature
from evalmode.export.audit.call_audit import CallAudit, CallResult
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite, random_zero_weights
from evalmode.export.audit.judge_eval import ignores_eval_draws, report_always_on
from evalmode.export.audit.judge_training import judge_training
from evalmode.export.audit.site import Kind, SiteReport
from evalmode.export.audit.verdicts import report_site
from evalmode.export.module.network import Network


def judge(
    network: Network,
    possible_site: PossibleSite,
    possible_sites: Sequence[PossibleSite],
    *,
    alpha: float,
    draws: int | None,
) -> list[SiteReport]:
    """The reports on one of `possible_sites`.

    network     a working copy of the network: its modules are run and switched
    alpha       the level of the tests of one call
    draws       training forwards of each test; None: as many as the test needs
    """
    # 1. Off.
    is_random = bool(possible_site.training_draws or possible_site.eval_draws)
    if possible_site.p == 0 and not is_random:
        return [report_site(possible_site, Kind.OFF)]

    # 2. No call to judge.
    if not possible_site.calls:
        return [_report_unreached(possible_site, possible_sites)]

    # 3. Each captured call. `IsolatedSite` keeps the random modules inside the site in eval: each
    # is a possible site itself, and its noise would count as that of this one.
    random_modules = [
        network.parts[other.path]
        for other in possible_sites
        if other.training_draws or other.eval_draws
    ]
    numbered_results: list[tuple[int, CallResult]] = []
    fingerprints: dict[CallSignature, Fingerprint] = {}
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
            result = _judge_call(audit, fingerprints.get(captured.signature))
        if result is None:
            continue
        numbered_results.append((captured.number, result))
        # Later calls are compared with the first one of their signature that has a fingerprint.
        if result.fingerprint is not None and captured.signature not in fingerprints:
            fingerprints[captured.signature] = result.fingerprint
    return _distinct_reports(numbered_results)


def _distinct_reports(numbered_results: Sequence[tuple[int, CallResult]]) -> list[SiteReport]:
    """The reports of the results that differ from every earlier one.

    Each result has the number of its call. The reports of the first result have the number 0, and
    later ones that of the call which differs.
    """
    reports: list[SiteReport] = []
    earlier_kinds: list[dict[str, Kind]] = []
    for call_number, result in numbered_results:
        kinds = result.kind_by_source()
        if kinds in earlier_kinds:
            continue
        if earlier_kinds:
            reports += [replace(report, call=call_number) for report in result.reports]
        else:
            reports += result.reports
        earlier_kinds.append(kinds)
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

    None where the call matches `fingerprint`, that of an earlier call of its signature.
    """
    site, possible_site = audit.site, audit.possible_site
    try:
        # 4. It matches an earlier call. A call on zeros would match every fingerprint: its output
        # is zero in both modes, whatever mask and scale the site applies.
        is_all_zeros = site.call.why_unmeasurable() == ZERO
        if fingerprint is not None and not is_all_zeros and fingerprint.matches(site):
            return None

        # 5. Random in eval.
        if possible_site.eval_draws and not ignores_eval_draws(audit):
            return CallResult([report_always_on(audit)])

        # 6a. An input of zeros would hide every mask.
        if is_all_zeros:
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
