"""`evalmode predict`: texts in this process, or files of texts here or on a server. Knows no HTTP
itself.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import FOUND, complain, open_console

if TYPE_CHECKING:
    from evalmode.client.answers_file import AnswersFile, Stdout
    from evalmode.client.transfer import Answerer, Source
    from evalmode.service.ndjson import Predicted
    from evalmode.service.predictor import Predictor

EPILOG = (
    "Examples:  evalmode predict 'Dit is een zin.'   |   cat texts.txt | evalmode predict --json  "
    " |   evalmode predict --url http://localhost:8000 --input texts.jsonl --output answers.jsonl"
)
_BUNDLES = Path("bundles")
_FILES = "Files of texts"
_SERVER = "A server that answers"
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """How texts are to be answered, wherever that is done."""

    top_k: int
    truncate: bool
    bundle: Path | None
    provider: str
    url: str | None
    model: str | None
    api_key: str | None
    ca: Path | None
    concurrency: int
    retries: int


def predict(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none reads a text a line from stdin.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles. \\[default: bundles]")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for each text.")] = 3,
    truncate: Annotated[
        bool, typer.Option(help="Cut a text that is longer than the model reads.")
    ] = True,
    provider: Annotated[
        str, typer.Option(help="cpu, cuda, tensorrt or ONNX Runtime's own name.")
    ] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what the server would answer, as JSON.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help=(
                'A file with a JSON string or {"text": ..., "id": ...} a line, or with the suffix'
                " .txt a text a line; "
                "- is stdin, of JSON lines."
            ),
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Write an answer a line into this file; where an earlier run ended, this one goes"
                " on. "
                "\\[default: stdout]"
            ),
            rich_help_panel=_FILES,
        ),
    ] = None,
    chunk_lines: Annotated[
        int,
        typer.Option(min=1, max=256, help="Lines that are asked together.", rich_help_panel=_FILES),
    ] = 256,
    concurrency: Annotated[
        int,
        typer.Option(min=1, max=64, help="Requests, or chunks, at once.", rich_help_panel=_FILES),
    ] = 4,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask this server for the file of texts.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Its model, or MODEL/VERSION. \\[default: its default]", rich_help_panel=_SERVER
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="EVALMODE_API_KEY",
            help="The key that it wants.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="Authorities that its certificate may be of.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0, help="Tries after one that failed, before giving up.", rich_help_panel=_SERVER
        ),
    ] = 8,
) -> None:
    """Predict here, without a server, or a file of texts on one; the scores have the same bits.

    Exit 0 when every text is answered, 1 when a line of a file could not be, 2 for what cannot be
    used.
    """
    ask = _Ask(
        top_k=top_k,
        truncate=truncate,
        bundle=bundle,
        provider=provider,
        url=url,
        model=model,
        api_key=api_key,
        ca=ca,
        concurrency=concurrency,
        retries=retries,
    )
    if source is None:
        for name, value in (("--output", output), ("--url", url)):
            if value is not None:
                raise EvalmodeError(f"{name} needs --input FILE, the texts; - is stdin")
        _predict_texts(texts or _lines_of_stdin(), ask, as_json=as_json)
    elif texts:
        raise EvalmodeError(f"give texts as arguments or as --input {source}, not both")
    else:
        from evalmode.client.transfer import Source

        _predict_file(Source(path=source, chunk_lines=chunk_lines), output, ask)


def _predict_texts(texts: Sequence[str], ask: _Ask, *, as_json: bool) -> None:
    from evalmode.service.predictor import Predictor

    with Predictor.open(ask.bundle or _BUNDLES, provider=ask.provider) as predictor:
        predictions = predictor.predict(texts, top_k=ask.top_k, truncate=ask.truncate)
        if as_json:
            from evalmode.service.http.v1_schemas import PredictResponse

            print(PredictResponse.of(predictor.model, predictions).model_dump_json())
            return
    from evalmode.tables import predictions_table

    answers = [
        [(scored.label, scored.score) for scored in prediction.top] for prediction in predictions
    ]
    open_console().print(predictions_table(texts, answers))


def _predict_file(source: Source, output: Path | None, ask: _Ask) -> None:
    if ask.url is None and ask.model is not None:
        raise EvalmodeError(
            "--model is of the server that --url names; in this process --bundle names the model"
        )
    if ask.url is not None and ask.bundle is not None:
        raise EvalmodeError(
            "--bundle is answered in this process and --url by a server: give one of them"
        )
    with _opened(source, output, ask) as writer:
        began, had = time.monotonic(), writer.lines
        try:
            asyncio.run(_transfer(source, writer, ask))
        except KeyboardInterrupt as interrupt:
            complain(f"interrupted; {writer.way_on}")
            raise typer.Exit(_INTERRUPTED) from interrupt
        _summarise(writer, answered=writer.lines - had, seconds=time.monotonic() - began)
        if writer.errors:
            raise typer.Exit(FOUND)


def _opened(source: Source, output: Path | None, ask: _Ask) -> AnswersFile | Stdout:
    from evalmode.client.answers_file import AnswersFile, Stdout, identity_of

    source.check()  # before anything is written
    if output is None or output == Path("-"):
        return Stdout()
    identity = identity_of(source.path) if source.repeatable else None
    return AnswersFile(
        output, asked={"top_k": ask.top_k, "truncate": ask.truncate, "input": identity}
    )


async def _transfer(source: Source, writer: AnswersFile | Stdout, ask: _Ask) -> None:
    from evalmode.client.transfer import Transfer

    async with _answerer(ask) as answerer:
        await Transfer(
            source=source, answerer=answerer, writer=writer, concurrency=ask.concurrency
        ).run()


@asynccontextmanager
async def _answerer(ask: _Ask) -> AsyncIterator[Answerer]:
    if ask.url is not None:
        from evalmode.client.remote import RemoteServer, open_client

        name, _, version = (ask.model or "").partition("/")
        named = {key: value for key, value in (("model", name), ("version", version)) if value}
        query = {"top_k": str(ask.top_k), "truncate": str(ask.truncate).lower(), **named}
        async with open_client(
            ask.url, api_key=ask.api_key, ca=ask.ca, connections=ask.concurrency
        ) as client:
            yield RemoteServer(client=client, query=query, retries=ask.retries)
        return
    from evalmode.service.predictor import Predictor

    with (
        open_console(stderr=True).status("opening the bundle")
        if sys.stderr.isatty()
        else nullcontext()
    ):
        predictor = Predictor.open(ask.bundle or _BUNDLES, provider=ask.provider)
    with predictor:
        yield _Here(predictor=predictor, ask=ask)


@dataclass(frozen=True, kw_only=True)
class _Here:
    """Answers lines in this process."""

    predictor: Predictor
    ask: _Ask

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """As a server answers them."""
        from evalmode.service.ndjson import answer_lines

        answers = await answer_lines(lines, first=first, predict=self._predict, inline_bytes=0)
        return answers, self.predictor.model.digest

    async def _predict(self, texts: Sequence[str]) -> Sequence[Predicted]:
        return await self.predictor.predict_async(
            texts, top_k=self.ask.top_k, truncate=self.ask.truncate
        )


def _summarise(writer: AnswersFile | Stdout, *, answered: int, seconds: float) -> None:
    from evalmode.tables import pairs_table

    facts = {
        "lines": f"{writer.lines:,}",
        "of them with an error": f"{writer.errors:,}",
        "answered now": (
            f"{answered:,} in {seconds:.1f} s, {answered / max(seconds, 1e-9):,.0f} a second"
        ),
        "digest": writer.digest or "no line was answered",
    }
    open_console(stderr=True).print(pairs_table(facts, title="predict"))


def _lines_of_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise EvalmodeError(
            "there is no text: give texts as arguments, or pipe one a line into stdin"
        )
    return [line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer]
