"""`evalmode serve`: a flag for every setting, made of the settings themselves. Knows no server
before it starts one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalmode.commands.generated import command_of
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console, write

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from evalmode.service.settings import Origin, Settings

EPILOG = (
    "Examples:  evalmode serve   |   evalmode serve bundles/languages/1 --port 9000 --provider cuda"
    "   |   evalmode serve --print-settings > evalmode.toml"
)
_HIDDEN = "(not shown)"


def serve() -> None:
    """Serve bundles over HTTP. Every option is also a variable, EVALMODE_PORT=9000, and a line of a
    TOML file.
    """


def serve_command() -> Any:
    """The command with its flags. Made when it is called: the settings take a tenth of a second to
    import.
    """

    def called(
        where: Path | None,
        config: Path | None,
        print_settings: bool,
        bundle: Path | None,
        **given: Any,
    ) -> None:
        if where is not None and bundle is not None:
            raise EvalmodeError(f"the bundle is given twice: {where} and --bundle {bundle}")
        # A flag that may be repeated is an empty list where it is not given.
        flags = {name: value for name, value in given.items() if value != []}
        _serve(config, print_settings=print_settings, bundle=where or bundle, **flags)

    return command_of(called, list(_parameters()), described_by=serve, epilog=EPILOG)


def _serve(config: Path | None, *, print_settings: bool, **given: Any) -> None:
    from evalmode.service.settings import trace_settings

    settings, origins = trace_settings(config=config, **given)
    if print_settings:
        _print(settings, origins)
        return
    from evalmode.service.process.server import serve as serve_settings

    serve_settings(settings)


def _parameters() -> Iterator[inspect.Parameter]:
    from evalmode.service.settings import CONFIG_VARIABLE, GROUPS, SECRETS, Settings

    where = typer.Argument(
        help="A bundle or a folder of bundles; the same as --bundle.",
        metavar="BUNDLE",
        show_default=False,
    )
    config = typer.Option(
        help=f"A TOML file of settings. \\[env: {CONFIG_VARIABLE}]", show_default=False
    )
    shown = typer.Option(
        "--print-settings", help="Print every setting and where it came from, and serve nothing."
    )
    yield _parameter("where", Annotated[Path | None, where], None)
    yield _parameter("config", Annotated[Path | None, config], None)
    yield _parameter("print_settings", Annotated[bool, shown], False)
    group = None
    for name, field in Settings.model_fields.items():
        group = GROUPS.get(name, group)
        if name not in SECRETS:
            yield _parameter(name, Annotated[_type_of(field), _option(name, field, group)], None)


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _option(name: str, field: FieldInfo, group: str | None) -> Any:
    said = field.description or ""
    help_text = f"{said[:1].upper()}{said[1:]}."
    if field.default not in (None, ()):
        default = ("no", "yes")[field.default] if isinstance(field.default, bool) else field.default
        help_text += f" \\[default: {default}]"
    flag = f"--{name.replace('_', '-')}"
    spelled = f"{flag}/--no-{flag.removeprefix('--')}" if field.annotation is bool else flag
    return typer.Option(spelled, help=help_text, rich_help_panel=group, show_default=False)


def _type_of(field: FieldInfo) -> Any:
    """The flag's type: None stands for a flag that is not given."""
    annotation: Any = field.annotation
    if annotation == tuple[str, ...]:
        return list[str] | None
    return annotation | None


def _print(settings: Settings, origins: Mapping[str, Origin]) -> None:
    """A table for a person; for a file, a file that sets the same."""
    if not sys.stdout.isatty():
        write("".join(_toml(settings, origins)))
        return
    from rich.table import Table
    from rich.text import Text

    from evalmode.service.settings import SECRETS

    table = Table("setting", "value", "from", title="settings", title_justify="left")
    for name, origin in origins.items():
        value = getattr(settings, name)
        shown = _HIDDEN if name in SECRETS and value is not None else _spelled(value)
        table.add_row(
            name,
            Text(shown, overflow="fold"),
            Text(origin, style="dim" if origin == "default" else "bold"),
        )
    open_console().print(table)


def _toml(settings: Settings, origins: Mapping[str, Origin]) -> Iterator[str]:
    from evalmode.service.settings import GROUPS, SECRETS, Settings

    yield (
        "# Settings of `evalmode serve --config FILE`. Flags and EVALMODE_* go before what stands"
        " here.\n"
    )
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            yield f"\n# {GROUPS[name]}.\n"
        value = getattr(settings, name)
        if name in SECRETS and value is not None:
            line = f'# {name} = "..."'
        else:
            line = f"# {name} =" if value is None else f"{name} = {_spelled(value)}"
        origin = "" if origins[name] == "default" else f" (from: {origins[name]})"
        yield f"{line}  # {field.description}{origin}\n"


def _spelled(value: object) -> str:
    """The value as TOML has it."""
    import json

    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple():
            return f"[{', '.join(map(_spelled, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
