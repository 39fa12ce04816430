"""The record of the checks that a bundle passed: rule, verdict, measured, limit, findings. Knows no
rule itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from evalmode.bundle.manifest import Frozen, Sha256

# Largest |difference| over the reference's standard deviation that fp32 may show. torch against
# float64 shows 6.5e-7, ONNX Runtime against torch 1.6e-6; the smallest leak worth the name (p =
# .001 at four sites) shows 8.2e-3.
TOLERANCE = 1e-5


class Verdict(StrEnum):
    """What a rule, or a whole certificate, came to."""

    PASS = "pass"
    FAIL = "fail"
    UNPROVEN = "unproven"
    NOT_APPLICABLE = "not applicable"


class Severity(StrEnum):
    """How much a finding weighs: an error fails its rule, the unproven keeps it from passing, a
    warning does not.
    """

    ERROR = "error"
    UNPROVEN = "unproven"
    WARNING = "warning"


class Finding(Frozen):
    """One place where a rule does not hold: why, and what to do about it.

    `node` is the path of a node (through subgraphs and functions), of a module or of a tensor; `op`
    is its operator or class. Both are empty for what concerns the whole.
    """

    severity: Severity
    node: str = ""
    op: str = ""
    why: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.node} ({self.op})".strip() if self.op else self.node
        return f"{place}: {self.why}" if place else self.why


class Record(Frozen):
    """What one rule found: `why` is one sentence, `measured` and `limit` are for people.

    `sites` names what was looked at where that is worth telling although nothing is wrong with it.
    """

    rule: str
    verdict: Verdict
    why: str
    measured: str = ""
    limit: str = ""
    findings: tuple[Finding, ...] = ()
    sites: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rule: str,
        findings: Iterable[Finding],
        *,
        fine: str,
        otherwise: str,
        measured: str = "",
        limit: str = "",
        sites: tuple[str, ...] = (),
    ) -> Record:
        """The record whose verdict its findings decide; it says `fine` when it passes, else
        `otherwise`.
        """
        found = tuple(findings)
        verdict = Verdict.PASS
        if any(finding.severity is Severity.UNPROVEN for finding in found):
            verdict = Verdict.UNPROVEN
        if any(finding.severity is Severity.ERROR for finding in found):
            verdict = Verdict.FAIL
        why = fine if verdict is Verdict.PASS else otherwise
        return cls(
            rule=rule,
            verdict=verdict,
            why=why,
            measured=measured,
            limit=limit,
            findings=found,
            sites=sites,
        )

    @classmethod
    def not_applicable(cls, rule: str, why: str) -> Record:
        """The record of a rule that has nothing to judge here; it lowers no verdict."""
        return cls(rule=rule, verdict=Verdict.NOT_APPLICABLE, why=why)


def overall(records: Iterable[Record]) -> Verdict:
    """Fail when any rule failed, else unproven when any is, else pass; no records prove nothing."""
    found = {record.verdict for record in records}
    for worst in (Verdict.FAIL, Verdict.UNPROVEN):
        if worst in found:
            return worst
    return Verdict.PASS if Verdict.PASS in found else Verdict.UNPROVEN


class PlatformDifference(Frozen):
    """One thing in which the platform here is not the certifying one, as people name it."""

    what: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.what} {self.there} there, {self.here} here"


class Platform(Frozen):
    """What bits depend on beside the bundle: the runtime and its version, provider, threads and
    CPU.
    """

    runtime: str
    provider: str
    threads: int
    architecture: str
    cpu_features: tuple[str, ...]

    def differences(self, here: Platform) -> tuple[PlatformDifference, ...]:
        """In what `here` is another platform than this, the certifying one; of the CPU's features
        only those that the other lacks.
        """
        pairs = {
            "ONNX Runtime": (_version(self.runtime), _version(here.runtime)),
            "provider": (self.provider, here.provider),
            "threads": (str(self.threads), str(here.threads)),
            "architecture": (self.architecture, here.architecture),
            "CPU features": (
                _beyond(self.cpu_features, here.cpu_features),
                _beyond(here.cpu_features, self.cpu_features),
            ),
        }
        return tuple(
            PlatformDifference(what=what, there=there, here=other)
            for what, (there, other) in pairs.items()
            if there != other
        )


def _version(runtime: str) -> str:
    return runtime.removeprefix("onnxruntime ")


def _beyond(features: tuple[str, ...], others: tuple[str, ...]) -> str:
    return ", ".join(sorted(set(features) - set(others))) or "none more"


class Certificate(Frozen):
    """The checks of the bundle with this digest, made on this platform.

    `row_counts` holds, for each padded length, the batch sizes at which a row has the bits it has
    alone. `seal` is the sha256 of the canonical spelling with an empty seal: it detects a changed
    byte, and is no signature.
    """

    schema_version: Literal[1] = 1
    digest: Sha256
    platform: Platform
    records: tuple[Record, ...]
    row_counts: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    tolerance: float = TOLERANCE
    seal: str = ""

    @property
    def verdict(self) -> Verdict:
        """What all records together come to."""
        return overall(self.records)

    def sealed(self) -> Certificate:
        """The same certificate with its seal."""
        return self.model_copy(update={"seal": self._expected_seal()})

    @property
    def seal_holds(self) -> bool:
        """Whether the seal is that of the content."""
        return self.seal == self._expected_seal()

    def _expected_seal(self) -> str:
        return hashlib.sha256(self.model_copy(update={"seal": ""}).canonical()).hexdigest()


def relative_difference(
    actual: npt.NDArray[np.generic], reference: npt.NDArray[np.generic]
) -> float:
    """max|actual - reference| / std(reference), in float64; inf when a shape, or the place of a NaN
    or inf, differs.
    """
    if actual.shape != reference.shape:
        return float("inf")
    if actual.size == 0:
        return 0.0
    a, r = actual.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(r)
    if (
        not np.array_equal(a[~finite], r[~finite], equal_nan=True)
        or not np.isfinite(a[finite]).all()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(a[finite] - r[finite]).max())
    spread = float(r[finite].std())
    # a constant output has no scale of its own: the difference is judged as it is
    if spread == 0.0:
        return largest
    return largest / spread
