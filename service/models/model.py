"""An opened bundle, ready to run: its buckets, and the rows that go into them.

There are three kinds of models:

1. A model of text has a bucket for each padded length. The length of a row alone decides its
   bucket.
2. A model of tensors whose rows were proven independent has a bucket for each row shape of its
   known answers, in which rows are batched. Rows of all other shapes run alone, in the bucket
   OTHER.
3. Any other model runs each request as it is, in the bucket WHOLE.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Platform, Verdict
from evalmode.bundle.errors import (
    BundleError,
    BundleNotCertified,
    InputsRefused,
    ModelRunFailed,
)
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.known_answers import KnownAnswer, Replay, Run, Tensors, bits, replay
from evalmode.bundle.manifest import TensorSpec
from evalmode.bundle.operators import check_operators
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import Bundle, open_bundle
from evalmode.service.batching.bucket import Bucket, Job, Row
from evalmode.service.errors import BadRequest, TextTooLong
from evalmode.service.models.calibration import (
    Calibration,
    MeasuredBucket,
    every_size,
    slowest_run_s,
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
    split_rows,
    unknown_datatype,
)
from evalmode.service.models.text import (
    MASK,
    IdRow,
    Prediction,
    TextAnswer,
    id_rows,
    labels_of,
)

if TYPE_CHECKING:
    from evalmode.service.models.trial import Trial

# Encoding takes some 30 microseconds a text and a microsecond a character. More characters than
# these would block an event loop for too long.
INLINE_CHARACTERS = 2_000
# Encoding holds Python's lock, so more threads would not encode faster. Each would be one more that
# the event loop has to wait for.
_ENCODING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")

_log = logging.getLogger(__name__)

# The labels of the buckets without a length or a shape.
OTHER = "other"
WHOLE = "whole"

# Operators that repeat a body as often as the input says, so no measurement bounds their time.
_REPEATS = frozenset({("", "Loop"), ("", "Scan")})
# A model forgets how long rows take when it knows so many shapes. Clients choose the shapes.
_MAX_SHAPES = 1_024
# The rule that proves rows independent of one another.
_INDEPENDENCE_RULE = "batch-invariance"
# The rows that a bucket of tensors is measured with. With three rows of known answers, all sizes of
# a small product seemed stable, although half of its rows have other bits at sizes above 1.
_MEASURED_ROWS = 16
# The assumed seconds of a run, if the bundle has no input to measure with.
_UNMEASURED_S = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """An open model; use `Model.open`. Its memory is freed when nothing refers to it or to one of
    its buckets.

        model = Model.open(Path("bundles/languages/1"))
        jobs, truncated = model.text_rows(["Ez egy mondat."])
        answers = engine.answer(jobs)
        (prediction,) = model.predictions(answers, truncated, top_k=3)

    Attributes:
        bundle: the bundle, without the contents of its files.
        platform: what its bits depend on besides the bundle.
        replayed: how the known answers compared; None for a bundle without a certificate.
        graph_fault: why the graph contradicts a certificate, if it may be served nevertheless; else
            None.
        frontend: turns texts into ids; None for a model of tensors.
        labels: the label of each logit, if it has any.
        buckets: all its buckets. The model chooses the bucket of a row.
        measured: the measurements of its buckets on this machine, by label.
    """

    bundle: Bundle
    platform: Platform
    replayed: Replay | None
    graph_fault: str | None
    frontend: FrontEnd | None
    labels: tuple[str, ...] | None
    buckets: tuple[Bucket, ...]
    measured: Mapping[str, MeasuredBucket]
    _buckets_by_label: Mapping[str, Bucket]
    # By the shapes of the inputs, in the model's order.
    _buckets_by_shape: dict[tuple[tuple[int, ...], ...], Bucket]

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
        on_passed: Callable[[str], None] = lambda digest: None,
    ) -> Model:
        """Open the bundle folder `path`, replay its known answers, and measure which batch sizes
        keep the bits of a row.

        With a `trial` in another process that has passed, the answers are replayed once instead of
        twice, and the measurements are those of the trial. `on_step` is called with the name of
        each step before it begins, and `on_passed` with the digest when the answers came out.

        Raises BundleError for a bundle that must not be served, and ProviderUnavailable for an
        execution provider that is missing.
        """
        on_step("reading its files")
        bundle = open_bundle(path, allow_uncertified=allow_uncertified)
        if trial is not None and bundle.digest != trial.passed.result():
            raise BundleError(f"{path} was changed while it was opened")
        manifest = bundle.manifest
        frontend = bundle.frontend()
        answers = bundle.known_answers()
        labels = manifest.labels if frontend is None else labels_of(manifest, path=path)
        if spec := unknown_datatype([*manifest.inputs, *manifest.outputs]):
            raise BundleError(
                f"{path} cannot be served: {spec.name!r} is {spec.datatype}, which no request can"
                " carry"
            )

        # A certificate may be forged, so the operators of the graph are checked too.
        graph_fault = None
        has_steady_time = False
        try:
            operators = check_operators(bundle.model)
            has_steady_time = not operators & _REPEATS
        except BundleNotCertified as error:
            if not allow_uncertified:
                raise
            graph_fault = str(error)

        on_step("making a session of its graph")
        session = open_session(bundle.model, provider=provider, threads=threads)
        if session.provider != "CPUExecutionProvider":
            # A device may hang, and an event loop that waits for it could not report that.
            has_steady_time = False

        on_step("running its known answers")
        replayed = None
        # The platform and the tolerance to compare with are in the certificate.
        if bundle.certificate is not None:
            replayed = replay(
                answers,
                session.run,
                certificate=bundle.certificate,
                platform=session.platform,
                frontend=frontend,
                twice=trial is None,
            )

        on_passed(bundle.digest)
        if trial is not None:
            measured = trial.measured.result()
        else:
            on_step("measuring its batch sizes")
            measured = _measure(
                bundle, session, answers, frontend=frontend, calibration=calibration
            )

        is_exact = bundle.certificate is not None and bundle.certificate.is_exact
        is_text = frontend is not None
        run_rows = run_of_rows(session.run, is_text=is_text, whole=WHOLE in measured)
        pads_rows = False
        if is_exact and frontend is not None:
            inputs = {spec.name for spec in manifest.inputs}
            rows = text_rows_to_measure(answers, frontend=frontend, inputs=inputs)
            pads_rows = _padding_keeps_bits(run_rows, rows)
        buckets = {
            label: Bucket(
                model=manifest.name,
                version=manifest.version,
                digest=bundle.digest,
                label=label,
                positions=int(label) if is_text else 1,
                run=run_rows,
                costs=every_size(measurements) if is_exact else measurements.costs,
                measured_costs=measurements.costs,
                pads_rows=pads_rows,
                has_steady_time=has_steady_time,
                learns=label in (WHOLE, OTHER),
            )
            for label, measurements in measured.items()
        }
        return cls(
            # The session holds the model now: a second copy would double the memory.
            bundle=replace(bundle, contents={}),
            platform=session.platform,
            replayed=replayed,
            graph_fault=graph_fault,
            frontend=frontend,
            labels=labels,
            buckets=tuple(buckets.values()),
            measured=measured,
            _buckets_by_label=buckets,
            _buckets_by_shape={},
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
        """The bundle's digest: it identifies every byte of the model."""
        return self.bundle.digest

    @property
    def row_counts(self) -> dict[str, tuple[int, ...]]:
        """The batch sizes that keep the bits of a row, by the label of their bucket.

        The costs of a bucket have only those that are efficient.
        """
        return {label: measurements.stable for label, measurements in self.measured.items()}

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
        """A job for each text, and whether the text was cut because it is too long for the model.

        With `truncate=False` such a text is refused with TextTooLong. Raises BadRequest for a model
        of tensors.
        """
        frontend = self.frontend
        if frontend is None:
            raise BadRequest(f"model {self.name} takes tensors and no texts")
        jobs: list[Job] = []
        truncated: list[bool] = []
        for index, text in enumerate(texts):
            row = frontend.encode(text)
            if row.truncated and not truncate:
                raise TextTooLong(index, longest=frontend.spec.lengths[-1])
            jobs.append(self._text_job(frontend, IdRow(ids=row.ids)))
            truncated.append(row.truncated)
        return jobs, truncated

    async def text_rows_async(
        self, texts: Sequence[str], *, truncate: bool = True
    ) -> tuple[list[Job], list[bool]]:
        """The same, without blocking an event loop: many characters are encoded in a thread."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.text_rows(texts, truncate=truncate)
        # Imported here, because the process of a trial does not need it.
        import asyncio

        encode = partial(self.text_rows, texts, truncate=truncate)
        return await asyncio.get_running_loop().run_in_executor(_ENCODING, encode)

    def tensor_jobs(self, inputs: Tensors) -> list[Job]:
        """A job for each row of a request's tensors; one job for a model that runs requests whole.

        Raises BadRequest, with the name of the tensor and its fault.
        """
        if self.frontend is not None:
            tensors = check_inputs(inputs, self.inputs, optional=frozenset({MASK}))
            # Called for its errors.
            row_count(tensors)
            return [
                self._text_job(self.frontend, row) for row in id_rows(tensors, self.frontend.spec)
            ]
        tensors = check_inputs(inputs, self.inputs)
        if WHOLE in self._buckets_by_label:
            return [(self._bucket_of_shape(tensors), ModelRow(inputs=tensors))]
        rows = split_rows(tensors, row_count(tensors))
        # All rows of a tensor have one shape, so the first row decides the bucket of all.
        bucket = self._bucket_of_shape(rows[0])
        return [(bucket, ModelRow(inputs=row)) for row in rows]

    def join(
        self, answers: Sequence[Tensors], *, outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The answers of `tensor_jobs` or of `text_rows`, as one tensor for each of `outputs`, by
        default all.

        Raises BadRequest if rows of different lengths have answers of different shapes.
        """
        if outputs is None:
            outputs = [output.name for output in self.outputs]
        return join_rows(answers, outputs)

    def predictions(
        self, answers: Sequence[Tensors], truncated: Sequence[bool], *, top_k: int
    ) -> list[Prediction]:
        """The predictions of the answers of `text_rows`, each with its `top_k` best labels, or all
        if there are fewer.

        Raises RunFailed if the logits of a text are not finite.
        """
        assert self.labels is not None, "a model of text has labels"
        predictions: list[Prediction] = []
        for answer, is_truncated in zip(answers, truncated, strict=True):
            assert isinstance(answer, TextAnswer), "the rows of texts have such answers"
            predictions.append(answer.prediction(self.labels, top_k=top_k, truncated=is_truncated))
        return predictions

    def _bucket_of_shape(self, row: Tensors) -> Bucket:
        """The bucket of the rows, or requests, of this shape.

        A shape that was not measured gets a bucket of its own, which learns how long a row takes.
        """
        shape = tuple([row[spec.name].shape for spec in self.inputs])
        bucket = self._buckets_by_shape.get(shape)
        if bucket is None:
            label = WHOLE if WHOLE in self._buckets_by_label else label_of(row_shape_of(row))
            bucket = self._buckets_by_label.get(label, self._buckets_by_label.get(OTHER))
            assert bucket is not None, "a model of tensors has one of these buckets"
            if bucket.learns:
                bucket = replace(bucket)
            if len(self._buckets_by_shape) >= _MAX_SHAPES:
                self._buckets_by_shape.clear()
            self._buckets_by_shape[shape] = bucket
        return bucket

    def _text_job(self, frontend: FrontEnd, row: IdRow) -> Job:
        """The row padded to the first length of the ladder that holds it, and the bucket of that
        length.
        """
        length = frontend.spec.padded_length(len(row.ids))
        padded = row.padded(length)
        # A graph may take no attention mask.
        inputs = {spec.name: padded[spec.name] for spec in self.inputs if spec.name in padded}
        bucket = self._buckets_by_label[str(length)]
        return bucket, ModelRow(inputs=inputs, tokens=len(row.ids))


def _measure(
    bundle: Bundle,
    session: Session,
    answers: Sequence[KnownAnswer],
    *,
    frontend: FrontEnd | None,
    calibration: Calibration,
) -> dict[str, MeasuredBucket]:
    """The measurements of the buckets of a model, by label. The keys say which buckets it has."""
    measure = partial(
        calibration.measure,
        session.run,
        path=bundle.path,
        digest=bundle.digest,
        platform=session.platform,
    )
    if frontend is not None:
        inputs = {spec.name for spec in bundle.manifest.inputs}
        return measure(text_rows_to_measure(answers, frontend=frontend, inputs=inputs))

    # A bucket in which each row, or each request, runs alone.
    requests = [answer.inputs for answer in answers]
    run_s = slowest_run_s(session.run, requests, path=bundle.path)
    alone = MeasuredBucket(stable=(1,), costs={1: run_s or _UNMEASURED_S})
    rows = _rows_by_shape(bundle, requests, session.run)
    if rows is None:
        return {WHOLE: alone}
    return {**measure(rows), OTHER: alone}


def _padding_keeps_bits(
    run_rows: Callable[[Sequence[Row]], Sequence[Tensors]], rows: Mapping[str, Sequence[Tensors]]
) -> bool:
    """Whether rows of all lengths have the bits in one batch that each has alone.

    It is proved of an exact model. This checks the proof on this machine, with two of the `rows` of
    each length: one without padding, and one that is mostly padding.
    """
    mixed = [ModelRow(inputs=inputs) for of_a_length in rows.values() for inputs in of_a_length[:2]]
    for row, answer in zip(mixed, run_rows(mixed), strict=True):
        (alone,) = run_rows([row])
        if any(bits(alone[name]) != bits(tensor) for name, tensor in answer.items()):
            _log.error("the proof of this model does not hold here: padding changes its bits")
            return False
    return True


def _rows_by_shape(
    bundle: Bundle, requests: Sequence[Tensors], run: Run
) -> dict[str, list[Tensors]] | None:
    """The single rows of the known answers, by the label of their shape.

    None if requests must not be split. They are split only if all of these hold:

    1. The certificate proves that rows are independent.
    2. The manifest declares that the first axis of all inputs and outputs varies.
    3. A single row of the known answers gives a single row of each output.
    """
    records = bundle.certificate.records if bundle.certificate else ()
    is_proven = any(
        record.rule == _INDEPENDENCE_RULE and record.verdict is Verdict.PASS for record in records
    )
    if not is_proven:
        return None
    for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        if spec.shape[:1] != (-1,):
            return None

    rows: dict[str, list[Tensors]] = {}
    for inputs in requests:
        for row in split_rows(inputs, row_count(inputs)):
            label = label_of(row_shape_of(row))
            # One run for each shape decides.
            if label not in rows:
                for output in run(row).values():
                    if output.shape[:1] != (1,):
                        return None
            rows.setdefault(label, []).append(row)
    for shape_rows in rows.values():
        shape_rows += _mixed_rows(shape_rows, run, count=_MEASURED_ROWS - len(shape_rows))
    return rows


def _mixed_rows(rows: Sequence[Tensors], run: Run, *, count: int) -> list[Tensors]:
    """Up to `count` rows of the same shape, from the numbers in `rows`; fewer if they cannot run.

    Each number is that of a row drawn at random. Floating-point numbers are also multiplied by
    factors from 0.5 to 1.5, so that few known answers, or round ones, do not hide another order of
    a sum.
    """
    # Seeded: two servers of one bundle measure with the same rows.
    rng = np.random.default_rng(0)
    mixed: list[Tensors] = []
    for _ in range(max(0, count)):
        row: dict[str, npt.NDArray[np.generic]] = {}
        for name, first in rows[0].items():
            numbers = np.stack([known[name] for known in rows])
            drawn = rng.integers(len(rows), size=first.shape)
            row[name] = np.take_along_axis(numbers, drawn[None], axis=0)[0]
            if np.issubdtype(first.dtype, np.floating):
                factors = rng.uniform(0.5, 1.5, size=first.shape)
                row[name] = np.multiply(row[name], factors, dtype=first.dtype, casting="unsafe")
        try:
            run(row)
        except (InputsRefused, ModelRunFailed):
            # The numbers of several rows need not fit together.
            continue
        mixed.append(row)
    return mixed
