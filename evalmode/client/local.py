"""Answers lines with a bundle in this process, with the bits that a server would send."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from evalmode.service.ndjson import Predicted, answer_lines
from evalmode.service.predictor import Predictor
from evalmode.terminal import open_console


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """An open bundle that answers lines; the counterpart of `remote.RemoteServer`."""

    predictor: Predictor
    top_k: int
    truncate: bool

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers to `lines`, numbered from `first`, and the digest of the bundle."""

        async def predict(texts: Sequence[str]) -> Sequence[Predicted]:
            return await self.predictor.predict_async(
                texts, top_k=self.top_k, truncate=self.truncate
            )

        # With `inline_bytes=0` all lines are parsed in a thread, and the event loop stays free for
        # other chunks.
        answers = await answer_lines(lines, first=first, predict=predict, inline_bytes=0)
        return answers, self.predictor.model.digest


@asynccontextmanager
async def open_model(
    bundle: Path, *, provider: str, top_k: int, truncate: bool
) -> AsyncIterator[LocalModel]:
    """The model of the bundle at `bundle`, or of the newest one below it, as a context.

    Raises BundleError for a bundle that must not be used, and ProviderUnavailable.
    """
    # Opening measures the batch sizes. That takes seconds, so a terminal shows a status.
    if sys.stderr.isatty():
        status = open_console(stderr=True).status("opening the bundle")
    else:
        status = nullcontext()
    with status:
        predictor = Predictor.open(bundle, provider=provider)
    with predictor:
        yield LocalModel(predictor=predictor, top_k=top_k, truncate=truncate)
