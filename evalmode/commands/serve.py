"""`evalmode serve`: starts a server, or prints its settings.

A field of `Settings` in service/settings.py is a flag, unless it is a secret: the arguments of a
process are visible to every user of the machine. The flag's help text and its group are the
field's. Three more parameters are declared here: BUNDLE, `--config` and `--print-settings`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalmode.commands.generated import command_of, flag_parameter
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console, write

if TYPE_CHECKING:
    from evalmode.service.settings import Origin, Settings

EPILOG = (
    "Examples:  evalmode serve   |   evalmode serve bundles/languages/1 --port 9000 --provider cuda"
    "   |   evalmode serve --print-settings > evalmode.toml"
)
_HIDDEN = "(not shown)"


def serve() -> None:
    """Serve bundles over HTTP.

    Every option is also an environment variable, EVALMODE_PORT=9000, and a line of a TOML file.
    """


def serve_command() -> Any:
    """The click command with its flags.

    It is built when it is called: the settings take a tenth of a second to import.
    """
    return command_of(_run, list(_parameters()), described_by=serve, epilog=EPILOG)


def _run(
    *,
    positional_bundle: Path | None,
    config: Path | None,
    print_settings: bool,
    bundle: Path | None,
    **flags: Any,
) -> None:
    """Serve, or print the settings.

    `flags` are the fields of Settings. A flag that is not on the command line is None, or an empty
    list if it may be repeated.
    """
    from evalmode.service.settings import trace_settings

    if positional_bundle is not None and bundle is not None:
        raise EvalmodeError(f"the bundle is given twice: {positional_bundle} and --bundle {bundle}")
    # `trace_settings` ignores None, but an empty list would be a value.
    flags = {name: value for name, value in flags.items() if value != []}
    settings, origins = trace_settings(config=config, bundle=positional_bundle or bundle, **flags)
    if not print_settings:
        from evalmode.service.process.server import serve as serve_settings

        serve_settings(settings)
    elif sys.stdout.isatty():
        _print_table(settings, origins)
    else:
        write("".join(_toml_lines(settings, origins)))


def _parameters() -> Iterator[inspect.Parameter]:
    """BUNDLE, --config and --print-settings, then a flag for each setting in the order of Settings.

    Every default is None, so that a setting from a variable or a file is not overridden.
    """
    from evalmode.service.settings import CONFIG_VARIABLE, GROUPS, SECRETS, Settings

    positional_bundle = typer.Argument(
        help="A bundle or a folder of bundles; the same as --bundle.",
        metavar="BUNDLE",
        show_default=False,
    )
    config = typer.Option(
        help=f"A TOML file of settings. \\[env: {CONFIG_VARIABLE}]", show_default=False
    )
    print_settings = typer.Option(
        "--print-settings", help="Print every setting and its origin, and do not serve."
    )
    yield flag_parameter(
        "positional_bundle", Annotated[Path | None, positional_bundle], default=None
    )
    yield flag_parameter("config", Annotated[Path | None, config], default=None)
    yield flag_parameter("print_settings", Annotated[bool, print_settings], default=False)

    group = None
    for name, field in Settings.model_fields.items():
        group = GROUPS.get(name, group)
        if name in SECRETS:
            continue
        annotation: Any = field.annotation
        flag = f"--{name.replace('_', '-')}"
        default = field.default
        if annotation is bool:
            flag = f"{flag}/--no-{name.replace('_', '-')}"
            default = "yes" if default else "no"
        elif annotation == tuple[str, ...]:
            annotation = list[str]
        elif isinstance(default, str):
            # A number or a word, as 4 or "auto": the settings read it.
            annotation = str

        description = field.description or ""
        help_text = f"{description[:1].upper()}{description[1:]}."
        if default not in (None, ()):
            help_text += f" \\[default: {default}]"
        option = typer.Option(flag, help=help_text, rich_help_panel=group, show_default=False)
        yield flag_parameter(name, Annotated[annotation | None, option], default=None)


def _print_table(settings: Settings, origins: Mapping[str, Origin]) -> None:
    from rich.table import Table
    from rich.text import Text

    from evalmode.service.settings import SECRETS

    table = Table("setting", "value", "from", title="settings", title_justify="left")
    for name, origin in origins.items():
        value = getattr(settings, name)
        text = _HIDDEN if name in SECRETS and value is not None else _toml_value(value)
        style = "dim" if origin == "default" else "bold"
        table.add_row(name, Text(text, overflow="fold"), Text(origin, style=style))
    open_console().print(table)


def _toml_lines(settings: Settings, origins: Mapping[str, Origin]) -> Iterator[str]:
    """The lines of a file for --config with the same settings. Secrets are left out."""
    from evalmode.service.settings import GROUPS, SECRETS, Settings

    yield (
        "# Settings of `evalmode serve --config FILE`. Flags and EVALMODE_* override this file.\n"
    )
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            yield f"\n# {GROUPS[name]}.\n"
        # Not the number of cores of this machine, but the "auto" that gave it.
        value = field.default if origins[name] == "default" else getattr(settings, name)
        if value is None:
            line = f"# {name} ="
        elif name in SECRETS:
            line = f'# {name} = "..."'
        else:
            line = f"{name} = {_toml_value(value)}"
        origin = "" if origins[name] == "default" else f" (from: {origins[name]})"
        yield f"{line}  # {field.description}{origin}\n"


def _toml_value(value: object) -> str:
    """The value in TOML; empty for None, which TOML does not have."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple():
            return f"[{', '.join(map(_toml_value, value))}]"
    # A JSON string is a TOML string, except that TOML demands an escape for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
