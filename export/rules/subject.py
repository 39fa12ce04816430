"""What a rule judges: a module, the graph made of it, the evidence, a bundle.

A subject has some of these parts; `Subject.has` says whether a rule's needs are met. Importing this
file loads no torch, so that the structure of a file can be checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.manifest import Bound
from evalmode.bundle.row_counts import stable_row_counts
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import Bundle
from evalmode.export.graph import Graph, serialise
from evalmode.export.rules.registry import Needs

if TYPE_CHECKING:
    from torch import nn

    from evalmode.export.audit.audit import Audit
    from evalmode.export.convert import Condition
    from evalmode.export.inputs.candidate import Twin
    from evalmode.export.inputs.evidence import Evidence
    from evalmode.export.module.network import Network
    from evalmode.export.module.randomness import Draw

# The batch sizes at which a row is compared with the same row alone.
COUNTS = tuple(range(1, 65))


@dataclass(frozen=True, kw_only=True)
class Export:
    """What only the exporter knows about a graph.

    unoptimised     the graph before constants were folded
    bounds          axis -> the largest size for which the trace holds
    conditions      what else the trace assumes about sizes
    index_bounds    input -> which of its values are indices, and their bounds
    twins           functions that export the same weights under other seeds
    """

    unoptimised: onnx.ModelProto | None = None
    bounds: Mapping[str, int] = field(default_factory=dict)
    conditions: Sequence[Condition] = ()
    index_bounds: Mapping[str, tuple[Bound, ...]] = field(default_factory=dict)
    twins: Sequence[Twin] = ()


class Subject:
    """The parts that rules judge. Reading an absent part is a bug: call `has` first.

    network     the module that is exported, in eval mode
    module      the module that the graph is compared with; by default the network's
    graph       the ONNX model
    evidence    the probes and rows that everything runs on
    draws       the sites that drew while the evidence was made
    export      what only the exporter knows
    bundle      the bundle that the graph came from
    audit       the audit of the module in training
    file        the path of the graph, where it came from a file

    Sessions of the graph run on `provider` with `threads` threads.
    """

    def __init__(
        self,
        *,
        network: Network | None = None,
        module: nn.Module | None = None,
        graph: Graph | None = None,
        evidence: Evidence | None = None,
        draws: Sequence[Draw] = (),
        export: Export | None = None,
        bundle: Bundle | None = None,
        audit: Audit | None = None,
        file: Path | None = None,
        provider: str = "cpu",
        threads: int = 1,
    ) -> None:
        if module is None and network is not None:
            module = network.module
        self._network, self._graph, self._evidence = network, graph, evidence
        self._bundle, self._audit = bundle, audit
        self.module = module
        self.export, self.draws = export or Export(), draws
        self.file, self.provider, self.threads = file, provider, threads

    def has(self, needs: Needs) -> bool:
        """Whether the parts are present that a rule with these needs reads."""
        runs = self._graph is not None and self._evidence is not None
        return {
            Needs.MODULE: self._network is not None and self._evidence is not None,
            Needs.GRAPH: self._graph is not None,
            Needs.EXPORT: runs and self._network is not None,
            Needs.COMPARISON: runs and self.module is not None,
            Needs.RUN: runs,
            Needs.AUDIT: self._audit is not None,
            Needs.BUNDLE: self._bundle is not None,
        }[needs]

    @property
    def network(self) -> Network:
        """The module that is exported, in eval mode."""
        assert self._network is not None, "only a rule that needs the module reads it"
        return self._network

    @property
    def graph(self) -> Graph:
        """The ONNX model."""
        assert self._graph is not None, "only a rule that needs a graph reads it"
        return self._graph

    @property
    def evidence(self) -> Evidence:
        """The probes and rows that everything runs on."""
        assert self._evidence is not None, "only a rule that needs inputs reads them"
        return self._evidence

    @property
    def bundle(self) -> Bundle:
        """The bundle that the graph came from."""
        assert self._bundle is not None, "only a rule that needs a bundle reads it"
        return self._bundle

    @property
    def audit(self) -> Audit:
        """The audit of the module in training."""
        assert self._audit is not None, "only a rule that needs an audit reads it"
        return self._audit

    @cached_property
    def data(self) -> bytes:
        """The model's bytes as the bundle holds them: equal for equal models."""
        return serialise(self.graph.proto)

    @cached_property
    def row_counts(self) -> dict[int, tuple[int, ...]]:
        """Padded length -> the batch sizes of COUNTS at which a row has the bits it has alone."""
        rows = self.evidence.rows
        return {length: stable_row_counts(self.served.run, rows[length], COUNTS) for length in rows}

    @cached_property
    def served(self) -> Session:
        """A session as the service opens it."""
        return open_session(self.file or self.data, provider=self.provider, threads=self.threads)

    @cached_property
    def plain(self) -> Session:
        """A session without graph optimisation.

        The optimiser deletes a Dropout in training mode, and with it the noise that it adds.
        """
        source = self.file or self.data
        return open_session(
            source, provider=self.provider, threads=self.threads, optimisation="off"
        )

    @cached_property
    def _runs(self) -> list[tuple[Tensors, Tensors]]:
        """The probes that the graph reads, each with the graph's answer.

        Raises ModelRunFailed where the graph reads none of them.
        """
        runs: list[tuple[Tensors, Tensors]] = []
        errors: list[ModelRunFailed] = []
        for probe in self.evidence.probes:
            try:
                runs.append((probe, self.served.run(probe)))
            except ModelRunFailed as error:
                errors.append(error)
        if errors and not runs:
            raise errors[0]
        return runs

    @property
    def probes(self) -> Sequence[Tensors]:
        """The probes that the graph reads; the rule dynamic-axes names the others."""
        return [probe for probe, _ in self._runs]

    @cached_property
    def answers(self) -> list[tuple[Tensors, Tensors]]:
        """For each probe, the module's answer and the graph's.

        The module's is empty where there is no module.
        """
        if self.module is None:
            return [({}, answer) for _, answer in self._runs]
        return [(self.reference(probe), answer) for probe, answer in self._runs]

    def reference(self, inputs: Tensors, *, plain: bool = False) -> Tensors:
        """The module's own answer, by the names of the graph's outputs.

        The module runs as it is used. With `plain` it runs without PyTorch's fast path for
        attention.
        """
        from evalmode.export.module.forward import answers_of  # loads torch

        assert self.module is not None, "only a rule that compares with the module asks it"
        names = [output.name for output in self.graph.proto.graph.output]
        answers = answers_of(self.module, inputs, plain=plain).values()
        return dict(zip(names, answers, strict=True))
