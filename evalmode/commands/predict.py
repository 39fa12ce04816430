"""`evalmode predict`: labels texts of the command line or of stdin, or every line of a file.

1. `predict` declares the flags. `_refuse_conflicting_flags` refuses those that contradict each
   other or have no effect, by the table `_FLAG_RULES`.
2. Without --input, `_predict_texts` runs a bundle in this process on all texts at once. It prints a
   table or JSON.
3. With --input, `_predict_file` answers the file in chunks (client/transfer.py). A server answers
   them (client/remote.py), or a bundle in this process (client/local.py). The output has a line of
   JSON for each text.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from evalmode import DEFAULT_TOP_K
from evalmode.errors import EvalmodeError
from evalmode.terminal import EXIT_FINDINGS, open_console, print_error

if TYPE_CHECKING:
    from evalmode.client.transfer import Backend, Source

EPILOG = (
    "Examples:  evalmode predict 'Dit is een zin.'   |   cat texts.txt | evalmode predict --json  "
    " |   evalmode predict --url http://localhost:8000 --input texts.jsonl --output answers.jsonl"
)
_DEFAULT_BUNDLES = Path("bundles")
_FILE_PANEL = "Files of texts"
_SERVER_PANEL = "A server that answers"

# As a shell reports a program that SIGINT ended: 128 + 2.
_EXIT_INTERRUPTED = 130

# Servers refuse requests of more rows than this, unless their setting `max_rows` is raised.
_MAX_CHUNK_LINES = 256
# So many retries take about a minute (`backoff_s` in client/remote.py): a server can restart.
_RETRIES = 8


class _FlagRule(NamedTuple):
    """A flag that needs or excludes another flag, and why.

    The message of a broken rule is the flag with the reason behind it, for example
    "--api-key needs --url, the address of the server".
    """

    flag: str
    relation: Literal["needs", "excludes"]
    other_flag: str
    reason: str


_NEEDS_INPUT = "needs --input FILE with the texts; - is stdin"
_NEEDS_URL = "needs --url, the address of the server"
# The first rule that is broken is reported.
_FLAG_RULES = (
    _FlagRule("--output", "needs", "--input", _NEEDS_INPUT),
    # Texts of the command line are never sent to a server.
    _FlagRule("--url", "needs", "--input", _NEEDS_INPUT),
    _FlagRule("--chunk-lines", "needs", "--input", _NEEDS_INPUT),
    _FlagRule("--concurrency", "needs", "--input", _NEEDS_INPUT),
    _FlagRule(
        "--model",
        "needs",
        "--url",
        "names a model of the server at --url; without --url use --bundle",
    ),
    _FlagRule("--api-key", "needs", "--url", _NEEDS_URL),
    _FlagRule("--ca", "needs", "--url", _NEEDS_URL),
    _FlagRule("--retries", "needs", "--url", _NEEDS_URL),
    _FlagRule(
        "--bundle",
        "excludes",
        "--url",
        "runs in this process, --url uses a server: give one of them",
    ),
    _FlagRule(
        "--provider", "excludes", "--url", "is for --bundle; the server at --url has its own"
    ),
    _FlagRule(
        "--json",
        "excludes",
        "--input",
        "is for texts; the answers of --input are JSON lines already",
    ),
)


def predict(
    context: typer.Context,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts. Without any, each line of stdin is a text.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles. \\[default: bundles]")
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Labels per text, the best first.")
    ] = DEFAULT_TOP_K,
    truncate: Annotated[
        bool,
        typer.Option(help="Cut a text that is longer than the model reads, or report an error."),
    ] = True,
    provider: Annotated[
        str, typer.Option(help="cpu, cuda, openvino, webgpu, or ONNX Runtime's name of a provider.")
    ] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON that a server would send.")
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help=(
                'A file with a JSON string or {"text": ..., "id": ...} per line. With the suffix'
                " .txt each line is a text. - reads JSON lines from stdin."
            ),
            show_default=False,
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Write an answer per line to this file. The same command continues a run that was"
                " interrupted. \\[default: stdout]"
            ),
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    chunk_lines: Annotated[
        int,
        typer.Option(
            min=1, max=_MAX_CHUNK_LINES, help="Lines in one request.", rich_help_panel=_FILE_PANEL
        ),
    ] = _MAX_CHUNK_LINES,
    concurrency: Annotated[
        int,
        typer.Option(min=1, max=64, help="Requests at once.", rich_help_panel=_FILE_PANEL),
    ] = 4,
    url: Annotated[
        str | None,
        typer.Option(
            help="Send the file to the server at this address.",
            show_default=False,
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="MODEL or MODEL/VERSION of the server. \\[default: the server's default]",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="EVALMODE_API_KEY",
            help="The server's API key.",
            show_default=False,
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="A PEM file of the authorities that may sign the server's certificate.",
            show_default=False,
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0, help="Retries in a row before giving up.", rich_help_panel=_SERVER_PANEL
        ),
    ] = _RETRIES,
) -> None:
    """Label texts, or each line of a file, in this process or with a server.

    The answers are the same bits either way.

    Exit 0 when every text is answered, 1 when a line of a file could not be answered, 2 when a
    flag, a file, a bundle or the server is unusable.
    """
    _refuse_conflicting_flags(context)
    if texts and input_file is not None:
        raise EvalmodeError(f"give texts as arguments or as --input {input_file}, not both")

    if input_file is None:
        _predict_texts(
            texts or _texts_from_stdin(),
            bundle=bundle or _DEFAULT_BUNDLES,
            provider=provider,
            top_k=top_k,
            truncate=truncate,
            as_json=as_json,
        )
        return

    from evalmode.client.transfer import Source

    # Nothing is opened yet: `_predict_file` enters the backend, after it has checked the files.
    backend: AbstractAsyncContextManager[Backend]
    if url is not None:
        from evalmode.client.remote import connect

        backend = connect(
            url,
            model=model,
            top_k=top_k,
            truncate=truncate,
            api_key=api_key,
            ca=ca,
            connections=concurrency,
            retries=retries,
        )
    else:
        from evalmode.client.local import open_model

        backend = open_model(
            bundle or _DEFAULT_BUNDLES, provider=provider, top_k=top_k, truncate=truncate
        )
    _predict_file(
        Source(path=input_file, chunk_lines=chunk_lines),
        output,
        backend,
        concurrency=concurrency,
        answer_options={"top_k": top_k, "truncate": truncate},
    )


def _refuse_conflicting_flags(context: typer.Context) -> None:
    """Raise EvalmodeError for the first rule of `_FLAG_RULES` that the command line breaks.

    A value from an environment variable does not count: a shell may set it for all commands.
    """
    flags = set()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            flags.add(parameter.opts[0])

    for rule in _FLAG_RULES:
        if rule.flag not in flags:
            continue
        is_present = rule.other_flag in flags
        is_broken = is_present if rule.relation == "excludes" else not is_present
        if is_broken:
            raise EvalmodeError(f"{rule.flag} {rule.reason}")


def _texts_from_stdin() -> list[str]:
    """Each line of stdin as a text."""
    if sys.stdin.isatty():
        raise EvalmodeError(
            "there is no text: give texts as arguments, or pipe one per line into stdin"
        )
    # Bytes, because text mode would raise at the first byte that is not UTF-8.
    return [line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer]


def _predict_texts(
    texts: Sequence[str], *, bundle: Path, provider: str, top_k: int, truncate: bool, as_json: bool
) -> None:
    """Print the predictions for `texts`, as a table or as the JSON that a server would send."""
    from evalmode.service.predictor import Predictor

    with Predictor.open(bundle, provider=provider) as predictor:
        predictions = predictor.predict(texts, top_k=top_k, truncate=truncate)
        if as_json:
            from evalmode.service.http.v1_schemas import predict_json

            print(predict_json(predictor.model, predictions).decode())
            return

    from evalmode.tables import predictions_table

    labels_and_scores = [
        [(scored.label, scored.score) for scored in prediction.top] for prediction in predictions
    ]
    open_console().print(predictions_table(texts, labels_and_scores))


def _predict_file(
    source: Source,
    output: Path | None,
    backend: AbstractAsyncContextManager[Backend],
    *,
    concurrency: int,
    answer_options: Mapping[str, object],
) -> None:
    """Answer the lines of `source` into `output`, and print a summary on stderr.

    `output` is a file, or stdout if it is None or `-`. `answer_options` are the flags that the
    answers depend on: a later run with other options is refused. Raises typer.Exit with 1
    when a line could not be answered, and with 130 after Ctrl-C.
    """
    from evalmode.client.answers_file import AnswersFile, Stdout, identity_of
    from evalmode.client.transfer import Transfer
    from evalmode.tables import pairs_table

    # Before the output is created: an input that cannot be read leaves no file behind.
    source.require_readable()
    writer: AnswersFile | Stdout
    if output is None or output == Path("-"):
        writer = Stdout()
    else:
        # A later run continues the file only if its input is the same. A pipe has no identity.
        identity = identity_of(source.path) if source.repeatable else None
        writer = AnswersFile(output, answer_options={**answer_options, "input": identity})

    async def answer_all_lines() -> None:
        async with backend as opened_backend:
            await Transfer(
                source=source, backend=opened_backend, writer=writer, concurrency=concurrency
            ).run()

    with writer:
        # An output that is continued has lines of earlier runs, which do not count for the speed.
        started, earlier_lines = time.monotonic(), writer.lines
        try:
            asyncio.run(answer_all_lines())
        except KeyboardInterrupt as interrupt:
            print_error(f"interrupted; {writer.how_to_continue}")
            raise typer.Exit(_EXIT_INTERRUPTED) from interrupt
        seconds = time.monotonic() - started

        answered_lines = writer.lines - earlier_lines
        lines_per_s = answered_lines / max(seconds, 1e-9)
        summary = {
            "lines": f"{writer.lines:,}",
            "lines with an error": f"{writer.errors:,}",
            "answered now": f"{answered_lines:,} in {seconds:.1f} s, {lines_per_s:,.0f} a second",
            "digest": writer.digest or "no line was answered",
        }
        open_console(stderr=True).print(pairs_table(summary, title="predict"))
        # Errors of an earlier run count: the exit code is about the whole file.
        if writer.errors:
            raise typer.Exit(EXIT_FINDINGS)
