"""The statements of a certificate that come from the proof: exact-arithmetic, integer-saturation.

A statement stands beside the verdicts and fails nothing, unless a user requires it.
"""

from __future__ import annotations

from evalmode.bundle.certificate import (
    EXACT_ARITHMETIC,
    INTEGER_SATURATION,
    Reason,
    Statement,
)
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.prove import Proof, prove
from evalmode.export.exact.saturation import saturating_products
from evalmode.export.graph import Graph

# The significand bits that NVIDIA's TF32 keeps of an operand, with the leading one.
_TF32_BITS = 11

# A certificate lists at most so many reasons; the first is the one to look at.
_MOST_REASONS = 20


def statements_of(graph: Graph, limits: Limits | None = None) -> tuple[Statement, ...]:
    """Both statements about a graph. Names of limits that the graph does not have are ignored."""
    limits = (limits or Limits()).within(graph)
    proof = prove(graph, ranges=limits.ranges, largest=limits.largest)
    return exact_arithmetic(proof), integer_saturation(graph, proof)


def exact_arithmetic(proof: Proof) -> Statement:
    """Whether no operator rounds: `proved`, or `not proved: NODE, why`."""
    if not proof.proved:
        return Statement(
            name=EXACT_ARITHMETIC,
            holds=False,
            why=str(proof),
            measured=f"{len(proof.reasons)} reasons in {proof.node_count} nodes",
            reasons=proof.reasons[:_MOST_REASONS],
        )
    measured = f"{proof.node_count} nodes"
    if proof.widest.node:
        measured += f"; results of at most {proof.widest.bits:.1f} of 24 bits ({proof.widest.node})"
    if proof.widest_operand.node:
        bits = proof.widest_operand.bits
        fit = "fit" if bits <= _TF32_BITS else "do not fit"
        measured += (
            f"; operands of products of at most {bits:.0f} bits ({proof.widest_operand.node}),"
            f" which {fit} TF32's {_TF32_BITS}"
        )
    return Statement(name=EXACT_ARITHMETIC, holds=True, why="proved", measured=measured)


def integer_saturation(graph: Graph, proof: Proof) -> Statement:
    """Whether no product of bytes saturates on any processor."""
    count, reasons = saturating_products(graph, proof)
    measured = f"{len(reasons)} of {count} products of bytes" if count else ""
    if not reasons:
        why = "no product of bytes can saturate" if count else "there are no products of bytes"
        return Statement(name=INTEGER_SATURATION, holds=True, why=why, measured=measured)
    first: Reason = reasons[0]
    return Statement(
        name=INTEGER_SATURATION,
        holds=False,
        why=f"may saturate: {first}",
        measured=measured,
        reasons=reasons[:_MOST_REASONS],
    )
