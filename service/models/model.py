"""An opened bundle of any kind, ready to run: its buckets, and the rows that go into them.

There are three kinds. A model of text has a bucket for each padded length; the length of a row
alone decides its bucket. A model of tensors whose rows were proven independent has one bucket for
each row shape of its known answers, in which rows are batched, and one for all other shapes, in
which each row runs alone. Any other model runs each request whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Platform, Verdict
from evalmode.bundle.errors import BundleError, BundleNotCertified
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.known_answers import KnownAnswer, Replay, Run, Tensors, replay
from evalmode.bundle.manifest import TensorSpec
from evalmode.bundle.operators import check_operators
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import Bundle, open_bundle
from evalmode.service.batching.bucket import Bucket, Job
from evalmode.service.errors import BadRequest, TextTooLong
from evalmode.service.models.calibration import (
    Calibration,
    MeasuredBucket,
    alone_s,
    text_rows_to_measure,
)
from evalmode.service.models.inference import run_of_rows
from evalmode.service.models.tensors import (
    ModelRow,
    check_inputs,
    join_rows,
    label_of,
    row_count,
    row_shape_of,
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
    predict,
)

# Encoding takes some 30 microseconds a text and a microsecond a character; above this it would hold
# an event loop up.
INLINE_CHARACTERS = 2_000
# Encoding holds Python's lock, so more threads would encode no more; each would be one more that
# the event loop has to wait for.
_ENCODING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")

OTHER = "other"
WHOLE = "whole"

_INVARIANCE = "batch-invariance"  # the rule that proves rows independent of one another
_UNMEASURED_S = 0.01  # the assumed cost of a run, where the bundle has no input to measure with


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What another process on this machine has found out about a bundle: it opens, its known
    answers come out, twice the same, and these row counts may run.
    """

    digest: str
    measured: dict[str, MeasuredBucket]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """An open model; use `Model.open`. Its memory is freed when nothing refers to it or to one of
    its buckets.

    Attributes:
        bundle: what it was opened from, without the contents.
        platform: what its bits depend on besides the bundle.
        replayed: how the known answers compared; None for a bundle without a certificate.
        doubt: why the graph itself does not look certified, where that was allowed; else None.
        frontend: turns texts into ids; None for a model of tensors.
        labels: the label of each logit, where there are any.
        buckets: all of them; the model chooses the bucket of a row.
        measured: by a bucket's label, the row counts that were proven on this machine, and what
            they cost.
    """

    bundle: Bundle
    platform: Platform
    replayed: Replay | None
    doubt: str | None
    frontend: FrontEnd | None
    labels: tuple[str, ...] | None
    buckets: tuple[Bucket, ...]
    measured: Mapping[str, MeasuredBucket]
    _by_label: Mapping[str, Bucket]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        allow_uncertified: bool = False,
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
        trial: Trial | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> Model:
        """Open the bundle folder `path`, replay its known answers, and measure which batch sizes
        keep a row's bits.

        The certificate alone is not believed: the operators of the graph are read as well.
        After a `trial` of this digest the answers are replayed once, and nothing is measured again.
        `on_step` is told each step before it begins.
        Raises BundleError for a bundle that must not be served, and ProviderUnavailable for a
        provider that is not there.
        """
        on_step("reading its files")
        bundle = open_bundle(path, allow_uncertified=allow_uncertified)
        if trial is not None and bundle.digest != trial.digest:
            raise BundleError(f"{path} was changed while it was opened")
        frontend, answers, manifest = bundle.frontend(), bundle.known_answers(), bundle.manifest
        labels = manifest.labels if frontend is None else labels_of(manifest, path=path)
        if odd := unknown_datatype([*manifest.inputs, *manifest.outputs]):
            raise BundleError(
                f"{path} cannot be served: {odd.name!r} is {odd.datatype}, which no request can"
                " carry"
            )
        doubt = None
        try:
            check_operators(bundle.model)
        except BundleNotCertified as error:
            if not allow_uncertified:
                raise
            doubt = str(error)
        on_step("making a session of its graph")
        session = open_session(bundle.model, provider=provider, threads=threads)
        on_step("running its known answers")
        replayed = _replay(bundle, answers, session=session, frontend=frontend, twice=trial is None)
        if trial is not None:
            measured = trial.measured
        else:
            on_step("measuring its batch sizes")
            measured = _measure(
                bundle, session, answers, frontend=frontend, calibration=calibration
            )
        buckets = _buckets(bundle, session.run, measured, is_text=frontend is not None)
        return cls(
            # the session has the model now: a second copy would double the memory
            bundle=replace(bundle, contents={}),
            platform=session.platform,
            replayed=replayed,
            doubt=doubt,
            frontend=frontend,
            labels=labels,
            buckets=tuple(buckets.values()),
            measured=measured,
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
    def row_counts(self) -> dict[str, tuple[int, ...]]:
        """By a bucket's label, the row counts that were proven; the costs of the bucket hold those
        that are efficient.
        """
        return {label: bucket.stable for label, bucket in self.measured.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its input tensors."""
        return self.bundle.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Its output tensors."""
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
        """The same, without blocking an event loop: many characters are encoded in a thread."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.text_rows(texts, truncate=truncate)
        encode = partial(self.text_rows, texts, truncate=truncate)
        return await asyncio.get_running_loop().run_in_executor(_ENCODING, encode)

    def tensor_jobs(self, inputs: Tensors) -> list[Job]:
        """The rows of one request's raw tensors; one job for a model that runs requests whole.

        Raises BadRequest, naming the tensor and what is wrong with it.
        """
        if self.frontend is not None:
            tensors = check_inputs(inputs, self.inputs, optional=frozenset({MASK}))
            row_count(tensors)
            return [
                self._text_job(self.frontend, row) for row in id_rows(tensors, self.frontend.spec)
            ]
        tensors = check_inputs(inputs, self.inputs)
        if whole := self._by_label.get(WHOLE):
            return [(whole, ModelRow(inputs=tensors))]
        rows = [ModelRow(inputs=row) for row in split(tensors)]
        label = label_of(row_shape_of(rows[0].inputs))  # a tensor's rows have one shape
        return [(self._by_label.get(label, self._by_label[OTHER]), row) for row in rows]

    def join(
        self, answers: Sequence[Tensors], *, outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The answers of `tensor_jobs`, or of `text_rows`, as one tensor for each of `outputs`
        (None: all).

        Raises BadRequest where rows of different lengths have answers of different shapes.
        """
        return join_rows(
            answers, [output.name for output in self.outputs] if outputs is None else outputs
        )

    def predictions(
        self, answers: Sequence[Tensors], truncated: Sequence[bool], *, top_k: int
    ) -> list[Prediction]:
        """The predictions of the answers of `text_rows`, each with its `top_k` best labels (all, if
        there are fewer).

        Raises RunFailed where the logits of a text are not finite.
        """
        assert self.labels is not None, "a model of text has labels"
        return [
            predict(answer[LOGITS][0].tolist(), self.labels, truncated=cut, top_k=top_k)
            for answer, cut in zip(answers, truncated, strict=True)
        ]

    def _text_job(self, frontend: FrontEnd, row: IdRow) -> Job:
        length = frontend.spec.padded_length(len(row.ids))
        padded = row.padded(length)
        inputs = {spec.name: padded[spec.name] for spec in self.inputs if spec.name in padded}
        return self._by_label[str(length)], ModelRow(inputs=inputs, tokens=len(row.ids))


def _replay(
    bundle: Bundle,
    answers: tuple[KnownAnswer, ...],
    *,
    session: Session,
    frontend: FrontEnd | None,
    twice: bool,
) -> Replay | None:
    if bundle.certificate is None:
        return None  # the platform and the tolerance to compare with are in the certificate
    return replay(
        answers,
        session.run,
        certificate=bundle.certificate,
        platform=session.platform,
        frontend=frontend,
        twice=twice,
    )


def _measure(
    bundle: Bundle,
    session: Session,
    answers: Sequence[KnownAnswer],
    *,
    frontend: FrontEnd | None,
    calibration: Calibration,
) -> dict[str, MeasuredBucket]:
    """The row counts that may run in each bucket, by its label."""

    def measure(rows: Mapping[str, Sequence[Tensors]]) -> dict[str, MeasuredBucket]:
        return calibration.measure(
            session.run, rows, path=bundle.path, digest=bundle.digest, platform=session.platform
        )

    if frontend is not None:
        names = {spec.name for spec in bundle.manifest.inputs}
        rows_by_length = text_rows_to_measure(answers, frontend=frontend)
        return measure(
            {
                length: [{name: row[name] for name in row if name in names} for row in rows]
                for length, rows in rows_by_length.items()
            }
        )
    requests = [answer.inputs for answer in answers]
    alone = MeasuredBucket(
        stable=(1,), costs={1: alone_s(session.run, requests, path=bundle.path) or _UNMEASURED_S}
    )
    rows = _rows_by_shape(bundle, requests, session.run)
    return {WHOLE: alone} if rows is None else {**measure(rows), OTHER: alone}


def _rows_by_shape(
    bundle: Bundle, requests: Sequence[Tensors], run: Run
) -> dict[str, list[Tensors]] | None:
    """Single rows of the known answers by the label of their shape; None where requests must not be
    split.
    """
    records = bundle.certificate.records if bundle.certificate else ()
    proven = any(
        record.rule == _INVARIANCE and record.verdict is Verdict.PASS for record in records
    )
    tensors = (*bundle.manifest.inputs, *bundle.manifest.outputs)
    if not proven or any(spec.shape[:1] != (-1,) for spec in tensors):
        return None
    rows: dict[str, list[Tensors]] = {}
    for inputs in requests:
        for row in split(inputs):
            label = label_of(row_shape_of(row))
            if label not in rows and any(answer.shape[:1] != (1,) for answer in run(row).values()):
                return None  # the first axis of an output does not count rows
            rows.setdefault(label, []).append(row)
    return rows


def _buckets(
    bundle: Bundle, run: Run, measured: Mapping[str, MeasuredBucket], *, is_text: bool
) -> dict[str, Bucket]:
    run_rows = run_of_rows(run, is_text=is_text, whole=WHOLE in measured)
    return {
        label: Bucket(
            model=bundle.manifest.name,
            version=bundle.manifest.version,
            digest=bundle.digest,
            label=label,
            positions=int(label) if is_text else 1,
            run=run_rows,
            costs=bucket.costs,
        )
        for label, bucket in measured.items()
    }
