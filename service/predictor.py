"""Texts -> predictions with a bundle, in this process: what `evalmode predict` and the server both answer with.

Knows no HTTP. Opening it checks the bundle, replays its known answers, and measures which batch sizes keep a row's
bits; so whatever else is asked at the same time, a text gets the bits it gets alone.

Shapes: B rows, T positions, G ids a position, C labels.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import FrontEnd, Ids, collate
from evalmode.bundle.known_answers import KnownAnswer, Replay, replay
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import Bundle, find_bundle, open_bundle
from evalmode.service.engine import Engine
from evalmode.service.errors import InvalidField, RunFailed
from evalmode.service.quota import cpu_quota
from evalmode.service.warmup import measure_row_counts, rows_to_measure

LOGITS = "logits"

# Encoding takes some 30 microseconds a text and a microsecond a character; above this it would hold the event loop up.
_INLINE_CHARACTERS = 2_000


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A label with its probability."""

    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one text: the best labels, best first, and whether it read all of the text."""

    top: tuple[Scored, ...]
    truncated: bool

    @property
    def label(self) -> str:
        """The best label."""
        return self.top[0].label

    @property
    def score(self) -> float:
        """The best label's probability."""
        return self.top[0].score


class Predictor:
    """An open bundle that answers texts; use `Predictor.open`, and `close` it or enter it as a context."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        frontend: FrontEnd,
        session: Session,
        replayed: Replay | None,
        row_counts: Mapping[int, tuple[int, ...]],
        workers: int,
    ) -> None:
        self.bundle = bundle
        self.replayed = replayed
        self.platform = session.platform
        self.row_counts = row_counts
        self.workers = workers
        self.labels = _labels(bundle, session)
        self._frontend = frontend
        self._session = session
        self._engine = Engine(self._run, key=self._padded_length, row_counts=row_counts, workers=workers)

    @classmethod
    def open(
        cls,
        bundle_path: Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        workers: int | None = None,
        allow_uncertified: bool = False,
    ) -> Predictor:
        """Open the bundle that `bundle_path` means, ready to answer.

        `workers` batches run at once, each on `threads` threads; by default as many as the CPU quota holds. Raises
        BundleError for a bundle that must not be served and ProviderUnavailable for a provider that is not there.
        """
        bundle = open_bundle(find_bundle(bundle_path), allow_uncertified=allow_uncertified)
        frontend = bundle.frontend()
        if frontend is None:
            raise BundleError(f"{bundle.path} has no front end: it takes tensors, and only models of text are served")
        answers = bundle.known_answers()
        session = open_session(bundle.model, provider=provider, threads=threads)
        replayed = _replay(bundle, answers, session=session, frontend=frontend)
        rows = rows_to_measure(answers, frontend=frontend)
        return cls(
            replace(bundle, contents={}),  # the session has the model now: a second copy would double the memory
            frontend=frontend,
            session=session,
            replayed=replayed,
            row_counts=measure_row_counts(session.run, rows, path=bundle.path),
            workers=workers or max(1, cpu_quota() // threads),
        )

    def predict(self, texts: Sequence[str], *, top_k: int = 3, truncate: bool = True) -> list[Prediction]:
        """The predictions of `texts`, in their order, each with its `top_k` best labels (all, if there are fewer).

        A text longer than the model reads is cut, or with `truncate=False` refused with InvalidField.
        """
        rows, truncated = self._encode(texts, truncate=truncate)
        return self._predictions(self._engine.answer(rows), truncated, top_k=top_k)

    async def predict_async(self, texts: Sequence[str], *, top_k: int = 3, truncate: bool = True) -> list[Prediction]:
        """The same, without blocking the event loop."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            rows, truncated = self._encode(texts, truncate=truncate)
        else:
            rows, truncated = await asyncio.to_thread(self._encode, texts, truncate=truncate)
        return self._predictions(await self._engine.answer_async(rows), truncated, top_k=top_k)

    def close(self) -> None:
        """Finish what was asked and answer nothing more."""
        self._engine.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _encode(self, texts: Sequence[str], *, truncate: bool) -> tuple[list[Ids], list[bool]]:
        encoded = [self._frontend.encode(text) for text in texts]
        for place, row in enumerate(encoded):
            if row.truncated and not truncate:
                field = f"inputs.{place}"
                longest = self._frontend.spec.lengths[-1]
                raise InvalidField(
                    f"{field} is longer than the {longest} positions that the model reads: shorten it, or let it be "
                    'cut with "truncate": true',
                    field=field,
                )
        return [row.ids for row in encoded], [row.truncated for row in encoded]

    def _padded_length(self, row: Ids) -> int:
        return self._frontend.spec.padded_length(len(row))

    def _run(self, rows: Sequence[Ids]) -> list[list[float]]:
        """The probabilities (B, C) of rows of one padded length."""
        logits = self._session.run(collate(rows, length=self._padded_length(rows[0])))[LOGITS]  # (B, C)
        return [softmax(row) for row in logits.tolist()]

    def _predictions(
        self, scores: Sequence[Sequence[float]], truncated: Sequence[bool], *, top_k: int
    ) -> list[Prediction]:
        return [
            Prediction(
                top=tuple(Scored(label=self.labels[index], score=row[index]) for index in best(row, top_k)),
                truncated=cut,
            )
            for row, cut in zip(scores, truncated, strict=True)
        ]


def softmax(logits: Sequence[float]) -> list[float]:
    """The probabilities of one row's logits, in float64.

    In plain Python on purpose: a vectorised exp or sum may take another path, and with it other last bits, for another
    number of rows or another alignment; `math.exp` sees one number and `math.fsum` rounds once, whatever stands beside.
    Raises RunFailed for logits without probabilities (NaN or infinite).
    """
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(powers)
    if not math.isfinite(total):  # one NaN or +inf anywhere makes it so, and so do logits that are all -inf
        raise RunFailed("the model answered a row of this request with numbers that are not finite")
    return [power / total for power in powers]


def best(scores: Sequence[float], count: int) -> list[int]:
    """The indices of the `count` highest scores, highest first; of equal ones the lower index first."""
    return heapq.nsmallest(count, range(len(scores)), key=lambda index: (-scores[index], index))


def _labels(bundle: Bundle, session: Session) -> tuple[str, ...]:
    """The label of each logit; where the manifest names none, its number."""
    shape = next((output.shape for output in session.outputs if output.name == LOGITS), ())
    labels = bundle.manifest.labels
    if len(shape) != 2 or shape[1] < 1 or (labels is not None and len(labels) != shape[1]):
        wanted = "labels" if labels is None else f"{len(labels)} labels"
        raise BundleError(
            f"{bundle.path} cannot be served as a text classifier: it wants an output {LOGITS!r} of shape "
            f"(batch, {wanted}), the model has {[(output.name, output.shape) for output in session.outputs]}"
        )
    return labels or tuple(map(str, range(shape[1])))


def _replay(bundle: Bundle, answers: tuple[KnownAnswer, ...], *, session: Session, frontend: FrontEnd) -> Replay | None:
    if bundle.certificate is None:
        return None  # nothing says on which platform, and within which tolerance, they must come out
    return replay(answers, session.run, certificate=bundle.certificate, platform=session.platform, frontend=frontend)
