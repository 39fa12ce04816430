"""Predictions of texts with a bundle in this process, without a server.

A server uses the same model in the same engine, so a text gets the same bits here and there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from evalmode import DEFAULT_TOP_K
from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import find_bundle
from evalmode.service.batching.engine import Engine
from evalmode.service.batching.limits import Limits
from evalmode.service.cpu_quota import cpu_quota
from evalmode.service.models.calibration import Calibration
from evalmode.service.models.model import Model
from evalmode.service.models.tensors import content_of
from evalmode.service.models.text import Prediction

# The only caller waits for all of its answers, so limits would protect no other caller.
_UNBOUNDED = Limits(queue_rows=sys.maxsize, queue_bytes=sys.maxsize, max_run_s=math.inf)


class Predictor:
    """An open model of text with an engine. Open it as a context, or `close` it.

    Example:
        with Predictor.open(Path("bundles/languages")) as predictor:
            for prediction in predictor.predict(["good morning"]):
                print(prediction.top[0].label)
    """

    def __init__(self, model: Model, *, parallel: int) -> None:
        self.model = model
        self._engine = Engine(parallel=parallel, limits=_UNBOUNDED, content=content_of)

    @classmethod
    def open(
        cls,
        bundle_path: Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        parallel: int | None = None,
        allow_uncertified: bool = False,
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
    ) -> Predictor:
        """Open the bundle at `bundle_path`.

        `parallel` batches run at once, each on `threads` threads. By default, they use the CPU
        quota. Raises BundleError for a bundle that must not be used, and ProviderUnavailable for a
        provider that is not installed.
        """
        model = Model.open(
            find_bundle(bundle_path),
            provider=provider,
            threads=threads,
            allow_uncertified=allow_uncertified,
            calibration=calibration,
        )
        if not model.is_text:
            raise BundleError(
                f"{model.bundle.path} has no front end: it takes tensors and no texts; `evalmode"
                f" serve` serves it at /v2/models/{model.name}/infer"
            )
        return cls(model, parallel=parallel or max(1, cpu_quota() // threads))

    def predict(
        self, texts: Sequence[str], *, top_k: int = DEFAULT_TOP_K, truncate: bool = True
    ) -> list[Prediction]:
        """The predictions for `texts`, in their order.

        Each has its `top_k` best labels, or all if there are fewer. A text that is longer than the
        model reads is cut. With `truncate=False` it raises InvalidField instead.
        """
        jobs, truncated = self.model.text_rows(texts, truncate=truncate)
        return self.model.predictions(self._engine.answer(jobs), truncated, top_k=top_k)

    async def predict_async(
        self, texts: Sequence[str], *, top_k: int = DEFAULT_TOP_K, truncate: bool = True
    ) -> list[Prediction]:
        """`predict` without blocking the event loop."""
        jobs, truncated = await self.model.text_rows_async(texts, truncate=truncate)
        return self.model.predictions(await self._engine.answer_async(jobs), truncated, top_k=top_k)

    def close(self) -> None:
        """Answer the requests in progress, and accept no more."""
        self._engine.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
