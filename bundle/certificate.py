"""The certificate of a bundle: the result of every rule, the platform, and the bundle's digest.

The rules are in export/rules/registry.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from evalmode.bundle.manifest import Frozen, Sha256

# The largest difference that rounding in float32 may cause, in standard deviations of the
# reference. Measured: torch against float64 6.5e-7, ONNX Runtime against torch 1.6e-6. The smallest
# leak that must be found, p = 0.001 at four sites, causes 8.2e-3.
TOLERANCE = 1e-5


class Verdict(StrEnum):
    """The result of a rule or of a whole certificate."""

    PASS = "pass"
    FAIL = "fail"
    UNPROVEN = "unproven"
    NOT_APPLICABLE = "not applicable"


class Severity(StrEnum):
    """The weight of a finding: an error makes its rule fail, an unproven finding makes it unproven,
    and a warning changes nothing.
    """

    ERROR = "error"
    UNPROVEN = "unproven"
    WARNING = "warning"


class Finding(Frozen):
    """One reason why a rule does not hold, and how to fix it.

    `node` is the path of a node (through subgraphs and functions), of a module or of a tensor. `op`
    is its operator or class. Both are empty for a finding about the whole model.
    """

    severity: Severity
    node: str = ""
    op: str = ""
    why: str
    fix: str = ""

    def __str__(self) -> str:
        subject = f"{self.node} ({self.op})".strip() if self.op else self.node
        return f"{subject}: {self.why}" if subject else self.why


class Record(Frozen):
    """The result of one rule.

    `why` is one sentence. `measured` and `limit` are text for people. `sites` lists what the rule
    examined, for rules where this is of interest even if nothing is wrong.
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
        """The record of a rule with these findings, which decide the verdict.

        Its sentence is `fine` when the rule passes, else `otherwise`.
        """
        findings = tuple(findings)
        severities = {finding.severity for finding in findings}
        if Severity.ERROR in severities:
            verdict = Verdict.FAIL
        elif Severity.UNPROVEN in severities:
            verdict = Verdict.UNPROVEN
        else:
            verdict = Verdict.PASS
        return cls(
            rule=rule,
            verdict=verdict,
            why=fine if verdict is Verdict.PASS else otherwise,
            measured=measured,
            limit=limit,
            findings=findings,
            sites=sites,
        )

    @classmethod
    def not_applicable(cls, rule: str, why: str) -> Record:
        """The record of a rule that does not apply to the subject; it changes no verdict."""
        return cls(rule=rule, verdict=Verdict.NOT_APPLICABLE, why=why)


class Reason(Frozen):
    """One reason why a statement does not hold: the path of a node or a tensor, and why."""

    node: str
    op: str = ""
    why: str

    def __str__(self) -> str:
        return f"{self.node}, {self.why}"


# The statement that nothing in the graph rounds, and the one that no integer product saturates.
EXACT_ARITHMETIC = "exact-arithmetic"
INTEGER_SATURATION = "integer-saturation"


class Statement(Frozen):
    """Something about a graph that holds or does not, beside the verdicts: it changes none.

    `why` is one sentence: `proved`, or `not proved: NODE, a partial sum of 16 products may need
    53.3 bits`. `measured` is text for people. The first of `reasons` is the first in the graph.
    """

    name: str
    holds: bool
    why: str
    measured: str = ""
    reasons: tuple[Reason, ...] = ()


def overall(records: Iterable[Record]) -> Verdict:
    """The verdict of all records together: the worst of them.

    Without a record that applies nothing is proven, so the verdict is unproven.
    """
    verdicts = {record.verdict for record in records}
    for verdict in (Verdict.FAIL, Verdict.UNPROVEN, Verdict.PASS):
        if verdict in verdicts:
            return verdict
    return Verdict.UNPROVEN


class PlatformDifference(Frozen):
    """One difference between the certifying platform ("there") and this one ("here")."""

    what: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.what} {self.there} there, {self.here} here"


class Platform(Frozen):
    """What bits depend on besides the bundle: runtime, provider, number of threads, and CPU."""

    runtime: str
    provider: str
    threads: int
    architecture: str
    cpu_features: tuple[str, ...]

    def differences(self, here: Platform) -> tuple[PlatformDifference, ...]:
        """How the platform `here` differs from this one, the certifying platform.

        For each platform, the CPU features are named that the other one lacks.
        """
        there_only = sorted(set(self.cpu_features) - set(here.cpu_features))
        here_only = sorted(set(here.cpu_features) - set(self.cpu_features))
        pairs = {
            "ONNX Runtime": (
                self.runtime.removeprefix("onnxruntime "),
                here.runtime.removeprefix("onnxruntime "),
            ),
            "provider": (self.provider, here.provider),
            "threads": (str(self.threads), str(here.threads)),
            "architecture": (self.architecture, here.architecture),
            "CPU features": (
                ", ".join(there_only) or "none more",
                ", ".join(here_only) or "none more",
            ),
        }
        return tuple(
            PlatformDifference(what=what, there=value_there, here=value_here)
            for what, (value_there, value_here) in pairs.items()
            if value_there != value_here
        )


class Certificate(Frozen):
    """The records of all rules for the bundle with this digest, made on this platform.

    `row_counts` lists, for each padded length, the batch sizes at which a row has the bits that it
    has alone. `seal` is the sha256 of the canonical JSON with an empty seal. It detects a changed
    byte, but it is no signature: anyone can compute it for another content.

    Version 2 of the schema added statements. A certificate without statements is written as version
    1, which earlier releases can read: `certificate_schema_version`.
    """

    schema_version: Literal[1, 2] = 2
    digest: Sha256
    platform: Platform
    records: tuple[Record, ...]
    row_counts: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    tolerance: float = TOLERANCE
    statements: tuple[Statement, ...] = Field(
        default=(), exclude_if=lambda statements: not statements
    )
    seal: str = ""

    @model_validator(mode="after")
    def _require_schema_version(self) -> Certificate:
        if self.schema_version < certificate_schema_version(self.statements):
            raise ValueError("schema_version 1 has no statements: use 2")
        return self

    def statement(self, name: str) -> Statement | None:
        """The statement with this name; None if the certificate has none."""
        return next((item for item in self.statements if item.name == name), None)

    @property
    def is_exact(self) -> bool:
        """Whether it is proved that nothing in the graph rounds or saturates.

        Such a graph has the same bits wherever float32 is float32: on every processor and provider.
        """
        exact = self.statement(EXACT_ARITHMETIC)
        unsaturated = self.statement(INTEGER_SATURATION)
        if exact is None or unsaturated is None:
            return False
        return exact.holds and unsaturated.holds

    @property
    def verdict(self) -> Verdict:
        """The verdict of all records together."""
        return overall(self.records)

    def sealed(self) -> Certificate:
        """The same certificate with the seal of its content."""
        return self.model_copy(update={"seal": self._expected_seal()})

    @property
    def seal_holds(self) -> bool:
        """Whether the content is the one that was sealed."""
        return self.seal == self._expected_seal()

    def _expected_seal(self) -> str:
        return hashlib.sha256(self.model_copy(update={"seal": ""}).canonical()).hexdigest()


def certificate_schema_version(statements: Iterable[Statement]) -> Literal[1, 2]:
    """The earliest version of the certificate's schema that can hold these statements."""
    return 2 if any(True for _ in statements) else 1


def relative_difference(
    actual: npt.NDArray[np.generic], reference: npt.NDArray[np.generic]
) -> float:
    """The largest difference in standard deviations: max|actual - reference| / std(reference).

    Computed in float64, over the finite elements of the reference. It is inf where the shapes
    differ, or where a NaN or an infinity is in only one of the two.
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
    return float(np.abs(a[finite] - r[finite]).max()) / scale_of(reference)


def scale_of(reference: npt.NDArray[np.generic]) -> float:
    """The standard deviation of the finite elements: the unit of differences.

    It is 1 if the standard deviation is 0, as for a constant: then absolute differences count.
    """
    numbers = reference.astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return (float(numbers.std()) if numbers.size else 0.0) or 1.0
