"""What rules judge: a module, the graph made of it, the evidence, a bundle; each if it is there.

The module is loaded without torch, so that a file's structure is checked without it.
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

# The batch sizes that are measured.
COUNTS = tuple(range(1, 65))


@dataclass(frozen=True, kw_only=True)
class Export:
    """What only the exporter knows of a graph.

    `unoptimised` is the graph before constants were folded, `bounds` holds the sizes of axes up to
    which the graph was traced, `conditions` what else of sizes it was traced for, `index_bounds`
    which values of an input are indices, `twins` make exports of the same weights under other
    seeds.
    """

    unoptimised: onnx.ModelProto | None = None
    bounds: Mapping[str, int] = field(default_factory=dict)
    conditions: Sequence[Condition] = ()
    index_bounds: Mapping[str, tuple[Bound, ...]] = field(default_factory=dict)
    twins: Sequence[Twin] = ()


class Subject:
    """The parts that a rule judges. Reading a part that is not there is a bug: see `has`.

    `network` is the module that is exported. `module` is the one that the graph is compared with,
    by default the network's. `draws` are the places that drew while the evidence was made. `file`
    is where the graph lies, if it came from a file. `served` and `plain` are sessions of the graph
    on `provider` with `threads` threads.
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
        self._network, self._graph, self._evidence = network, graph, evidence
        self._bundle, self._audit = bundle, audit
        self.module = network.module if module is None and network is not None else module
        self.export, self.draws = export or Export(), draws
        self.file, self.provider, self.threads = file, provider, threads

    def has(self, needs: Needs) -> bool:
        """Whether the parts are there that a rule with these needs reads."""
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
        """The model as a rule reads it."""
        assert self._graph is not None, "only a rule that needs a graph reads it"
        return self._graph

    @property
    def evidence(self) -> Evidence:
        """The inputs on which everything is judged."""
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
        """The model's bytes, as they go into the bundle: the same for the same model."""
        return serialise(self.graph.proto)

    @cached_property
    def row_counts(self) -> dict[int, tuple[int, ...]]:
        """By padded length, the batch sizes of COUNTS at which a row has the bits it has alone."""
        rows = self.evidence.rows
        return {length: stable_row_counts(self.served.run, rows[length], COUNTS) for length in rows}

    @cached_property
    def served(self) -> Session:
        """A session opened as the service opens it."""
        return open_session(self.file or self.data, provider=self.provider, threads=self.threads)

    @cached_property
    def plain(self) -> Session:
        """A session without graph optimisation, which would delete a training-mode Dropout and its
        evidence.
        """
        source = self.file or self.data
        return open_session(source, provider=self.provider, threads=self.threads, optimise=False)

    @cached_property
    def _runs(self) -> list[tuple[Tensors, Tensors]]:
        """The probes that the graph reads, each with what it answers."""
        runs: list[tuple[Tensors, Tensors]] = []
        problem: ModelRunFailed | None = None
        for probe in self.evidence.probes:
            try:
                runs.append((probe, self.served.run(probe)))
            except ModelRunFailed as error:
                problem = problem or error
        if problem is not None and not runs:
            raise problem
        return runs

    @property
    def probes(self) -> Sequence[Tensors]:
        """The probes that the graph reads; the rule dynamic-axes names the others."""
        return [probe for probe, _ in self._runs]

    @cached_property
    def answers(self) -> list[tuple[Tensors, Tensors]]:
        """For each probe what the module answers (nothing without one) and what the graph does."""
        return [
            ({} if self.module is None else self.reference(probe), answer)
            for probe, answer in self._runs
        ]

    def reference(self, inputs: Tensors, *, plain: bool = False) -> Tensors:
        """What the module itself answers, by the names of the graph's outputs; `plain` is without
        PyTorch's fast path.
        """
        from evalmode.export.module.forward import answers_of  # loads torch

        assert self.module is not None, "only a rule that compares with the module asks it"
        names = [output.name for output in self.graph.proto.graph.output]
        answers = answers_of(self.module, inputs, plain=plain).values()
        return dict(zip(names, answers, strict=True))
