"""An opened bundle of any kind, ready to run: its buckets, and the rows that go into them. Knows no
queue and no HTTP.

Three kinds. A model of text has a bucket for each padded length; a row's bucket is chosen by the
row's own length. A model of tensors whose rows were proven independent has one for each shape that
its known answers show, in which rows are batched, and one for all other shapes, in which each runs
alone. Of any other model a request runs whole, as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Platform, Verdict
from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.known_answers import KnownAnswer, Replay, Run, Tensors, replay
from evalmode.bundle.manifest import TensorSpec
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import Bundle, open_bundle
from evalmode.service.batching.bucket import Bucket
from evalmode.service.errors import BadRequest, TextTooLong
from evalmode.service.models.calibration import Calibration, Measured, alone_s, text_rows_to_measure
from evalmode.service.models.inference import answering
from evalmode.service.models.tensors import (
    ModelRow,
    checked,
    content_of,
    joined,
    label_of,
    row_count,
    signature_of,
    split,
    unknown_datatype,
)
from evalmode.service.models.text import (
    LOGITS,
    MASK,
    IdRow,
    Prediction,
    id_rows,
    labels_of,
    predicted,
)

__all__ = [
    "INLINE_CHARACTERS",
    "Job",
    "Model",
    "ModelBucket",
    "ModelRow",
    "Prediction",
    "content_of",
]

ModelBucket: TypeAlias = Bucket[ModelRow, Tensors]
Job: TypeAlias = tuple[ModelBucket, ModelRow]

# Encoding takes some 30 microseconds a text and a microsecond a character; above this it would hold
# an event loop up.
INLINE_CHARACTERS = 2_000

OTHER = "other"
WHOLE = "whole"

_INVARIANCE = "batch-invariance"  # the rule that proves rows independent of one another
_UNMEASURED_S = 0.01  # what a run is taken to cost where the bundle holds no input to measure with


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """An open model; use `Model.open`. It is let go of when nobody refers to it or to a bucket of
    it.

    Attributes:
        bundle: what it was opened from, without the contents.
        platform: what its bits depend on beside the bundle.
        replayed: how the known answers came out; None for a bundle without a certificate.
        frontend: what turns texts into ids; None for a model of tensors.
        labels: the label of each logit, where there are any.
        buckets: all of them; which one a row belongs to is the model's own business.
        row_counts: by a bucket's label, the row counts that were proven here; its costs hold
            those worth their time.
    """

    bundle: Bundle
    platform: Platform
    replayed: Replay | None
    frontend: FrontEnd | None
    labels: tuple[str, ...] | None
    buckets: tuple[ModelBucket, ...]
    row_counts: Mapping[str, tuple[int, ...]]
    _by_label: Mapping[str, ModelBucket]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        allow_uncertified: bool = False,
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
    ) -> Model:
        """Open the bundle folder `path`, replay its known answers, and measure which batch sizes
        keep a row's bits.

        Raises BundleError for a bundle that must not be served, and ProviderUnavailable for a
        provider that is not there.
        """
        bundle = open_bundle(path, allow_uncertified=allow_uncertified)
        frontend, answers, manifest = bundle.frontend(), bundle.known_answers(), bundle.manifest
        labels = manifest.labels if frontend is None else labels_of(manifest, path=path)
        if odd := unknown_datatype([*manifest.inputs, *manifest.outputs]):
            raise BundleError(
                f"{path} cannot be served: {odd.name!r} is {odd.datatype}, which no request can"
                " carry"
            )
        session = open_session(bundle.model, provider=provider, threads=threads)
        replayed = _replay(bundle, answers, session=session, frontend=frontend)
        measured = _measure(bundle, session, answers, frontend=frontend, calibration=calibration)
        buckets = _buckets(bundle, session.run, measured, is_text=frontend is not None)
        return cls(
            # the session has the model now: a second copy would double the memory
            bundle=replace(bundle, contents={}),
            platform=session.platform,
            replayed=replayed,
            frontend=frontend,
            labels=labels,
            buckets=tuple(buckets.values()),
            row_counts={label: found.stable for label, found in measured.items()},
            _by_label=buckets,
        )

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        """The manifest's version."""
        return self.bundle.manifest.version

    @property
    def digest(self) -> str:
        """The bundle's digest: it names every byte of the model."""
        return self.bundle.digest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that it takes."""
        return self.bundle.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that it answers with."""
        return self.bundle.manifest.outputs

    @property
    def is_text(self) -> bool:
        """Whether it reads texts."""
        return self.frontend is not None

    def text_rows(
        self, texts: Sequence[str], *, truncate: bool = True
    ) -> tuple[list[Job], list[bool]]:
        """A row for each text, and whether the text was longer than the model reads and was cut.

        With `truncate=False` a longer one is refused with TextTooLong. Raises BadRequest for a
        model of tensors.
        """
        frontend = self.frontend
        if frontend is None:
            raise BadRequest(f"model {self.name} takes tensors and no texts")
        encoded = [frontend.encode(text) for text in texts]
        for place, row in enumerate(encoded):
            if row.truncated and not truncate:
                raise TextTooLong(place, longest=frontend.spec.lengths[-1])
        return [self._text_job(frontend, IdRow(ids=row.ids)) for row in encoded], [
            row.truncated for row in encoded
        ]

    async def text_rows_async(
        self, texts: Sequence[str], *, truncate: bool = True
    ) -> tuple[list[Job], list[bool]]:
        """The same, without holding an event loop up: many characters are encoded in a thread."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.text_rows(texts, truncate=truncate)
        return await asyncio.to_thread(self.text_rows, texts, truncate=truncate)

    def tensor_jobs(self, inputs: Tensors) -> list[Job]:
        """The rows of one request's raw tensors; of a model that takes requests whole, the one job
        that this is.

        Raises BadRequest, naming the tensor and what is wrong with it.
        """
        if self.frontend is not None:
            fitting = checked(inputs, self.inputs, optional=frozenset({MASK}))
            row_count(fitting)
            return [
                self._text_job(self.frontend, row) for row in id_rows(fitting, self.frontend.spec)
            ]
        fitting = checked(inputs, self.inputs)
        if whole := self._by_label.get(WHOLE):
            return [(whole, ModelRow(inputs=fitting))]
        rows = [ModelRow(inputs=row) for row in split(fitting)]
        label = label_of(signature_of(rows[0].inputs))  # a tensor's rows have one shape
        return [(self._by_label.get(label, self._by_label[OTHER]), row) for row in rows]

    def join(
        self, answers: Sequence[Tensors], *, outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The answers of `tensor_jobs`, or of `text_rows`, as one tensor for each of `outputs`
        (None: all).

        Raises BadRequest where rows of different lengths have answers of different shapes.
        """
        return joined(
            answers, [output.name for output in self.outputs] if outputs is None else outputs
        )

    def predictions(
        self, answers: Sequence[Tensors], truncated: Sequence[bool], *, top_k: int
    ) -> list[Prediction]:
        """What the answers of `text_rows` say, each with its `top_k` best labels (all, if there are
        fewer).
        """
        assert self.labels is not None, "a model of text has labels"
        return [
            predicted(answer[LOGITS][0].tolist(), self.labels, truncated=cut, top_k=top_k)
            for answer, cut in zip(answers, truncated, strict=True)
        ]

    def _text_job(self, frontend: FrontEnd, row: IdRow) -> Job:
        length = frontend.spec.padded_length(len(row.ids))
        padded = row.padded(length)
        taken = {spec.name: padded[spec.name] for spec in self.inputs if spec.name in padded}
        return self._by_label[str(length)], ModelRow(inputs=taken, tokens=len(row.ids))


def _replay(
    bundle: Bundle, answers: tuple[KnownAnswer, ...], *, session: Session, frontend: FrontEnd | None
) -> Replay | None:
    if bundle.certificate is None:
        return (
            None  # nothing says on which platform, and within which tolerance, they must come out
        )
    return replay(
        answers,
        session.run,
        certificate=bundle.certificate,
        platform=session.platform,
        frontend=frontend,
    )


def _measure(
    bundle: Bundle,
    session: Session,
    answers: Sequence[KnownAnswer],
    *,
    frontend: FrontEnd | None,
    calibration: Calibration,
) -> dict[str, Measured]:
    """What may run in each bucket, by its label."""

    def measure(rows: Mapping[str, Sequence[Tensors]]) -> dict[str, Measured]:
        return calibration.measure(
            session.run, rows, path=bundle.path, digest=bundle.digest, platform=session.platform
        )

    if frontend is not None:
        names = {spec.name for spec in bundle.manifest.inputs}
        made = text_rows_to_measure(answers, frontend=frontend)
        return measure({label: [_only(row, names) for row in rows] for label, rows in made.items()})
    asked = [answer.inputs for answer in answers]
    alone = Measured(
        stable=(1,), costs={1: alone_s(session.run, asked, path=bundle.path) or _UNMEASURED_S}
    )
    rows = _rows_by_shape(bundle, asked, session.run)
    return {WHOLE: alone} if rows is None else {**measure(rows), OTHER: alone}


def _rows_by_shape(
    bundle: Bundle, asked: Sequence[Tensors], run: Run
) -> dict[str, list[Tensors]] | None:
    """Single rows of the known answers by the label of their shape; None where a request must not
    be taken apart.
    """
    records = bundle.certificate.records if bundle.certificate else ()
    proven = any(
        record.rule == _INVARIANCE and record.verdict is Verdict.PASS for record in records
    )
    tensors = (*bundle.manifest.inputs, *bundle.manifest.outputs)
    if not proven or any(spec.shape[:1] != (-1,) for spec in tensors):
        return None
    found: dict[str, list[Tensors]] = {}
    for inputs in asked:
        for row in split(inputs):
            label = label_of(signature_of(row))
            if label not in found and any(answer.shape[:1] != (1,) for answer in run(row).values()):
                return None  # a first axis of another kind, whatever it is called
            found.setdefault(label, []).append(row)
    return found


def _buckets(
    bundle: Bundle, run: Run, measured: Mapping[str, Measured], *, is_text: bool
) -> dict[str, ModelBucket]:
    answer = answering(run, is_text=is_text, whole=WHOLE in measured)
    return {
        label: Bucket(
            model=bundle.manifest.name,
            version=bundle.manifest.version,
            digest=bundle.digest,
            label=label,
            positions=int(label) if is_text else 1,
            run=answer,
            costs=found.costs,
        )
        for label, found in measured.items()
    }


def _only(row: Tensors, names: set[str]) -> Tensors:
    return {name: tensor for name, tensor in row.items() if name in names}
