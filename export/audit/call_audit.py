"""One call to judge, and the result."""

from __future__ import annotations

from dataclasses import dataclass

from evalmode.export.audit.by_tape import Fingerprint
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.isolated_site import IsolatedSite
from evalmode.export.audit.site import Kind, SiteReport


@dataclass(frozen=True, kw_only=True)
class CallAudit:
    """One call to judge, and how strictly. `site` repeats the call of `possible_site`.

    `alpha` is the level of one test of the call. `draws` fixes the training forwards of each test;
    None sizes them.
    """

    possible_site: PossibleSite
    site: IsolatedSite
    alpha: float
    draws: int | None


@dataclass(frozen=True)
class CallResult:
    """The reports on one call, one for each source of noise, and the fingerprint of the call.

    `fingerprint` is None where later calls must be judged in full.
    """

    reports: list[SiteReport]
    fingerprint: Fingerprint | None = None

    @property
    def conclusive_count(self) -> int:
        """The number of reports that are not inconclusive."""
        return sum(report.kind is not Kind.INCONCLUSIVE for report in self.reports)

    def kind_by_source(self) -> dict[str, Kind]:
        """The kind of each source of noise. Results that agree in this are reported once."""
        return {report.source: report.kind for report in self.reports}
