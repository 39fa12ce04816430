"""How a server is set up: frozen, from flags, `EVALMODE_*` and a file, refused when built if wrong.

A flag goes before the environment, the environment before the file, the file before the default.
Nothing that a setting names is opened here.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from evalmode.service.errors import StartFailed

_PREFIX = "EVALMODE_"
CONFIG_VARIABLE = f"{_PREFIX}CONFIG"
# The folder in which the processes of one server share their metrics; the name is that of
# prometheus_client, which reads it itself.
METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# Where the value of a setting came from.
Origin = Literal["flag", "environment", "file", "default"]

# What a group of settings is called, by the first of them.
GROUPS = {
    "bundle": "What is served",
    "provider": "How it runs",
    "host": "Where it listens",
    "max_body_bytes": "What is accepted",
    "queue_rows": "What happens under load",
    "drain_s": "How it ends, and what it says",
}


class Settings(BaseSettings):
    """The settings of one server. Build it with `load_settings`, which says in one sentence what is
    wrong.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, frozen=True, extra="forbid", allow_inf_nan=False
    )

    # What is served.
    bundle: Path = Field(default=Path("bundles"), description="a bundle, or a folder of bundles")
    default_model: str | None = Field(
        default=None, description="who answers where no model is named; none: the only"
    )
    versions: int = Field(
        default=1, ge=1, description="how many of a model's newest versions are served"
    )
    poll_s: float = Field(
        default=2.0,
        ge=0,
        description="how often the folder is looked at for new versions; 0: never",
    )
    model_control: bool = Field(
        default=True, description="let POST /v2/repository load and unload models"
    )
    control_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "host names, besides local ones, under which models are loaded and unloaded; * is all"
        ),
    )
    allow_uncertified: bool = Field(
        default=False,
        description="serve a bundle without a certificate that passes, or that can draw or train",
    )
    # How it runs.
    provider: str = Field(
        default="cpu", min_length=1, description="the ONNX Runtime execution provider"
    )
    threads: int = Field(default=1, ge=1, description="threads of one batch")
    parallel: int | None = Field(
        default=None, ge=1, description="batches at once in a process; none: by the CPU quota"
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="server processes that share the port"
    )
    calibration_s: float = Field(
        default=1.0, ge=0, description="the longest that measuring a model may take"
    )
    load_timeout_s: float = Field(
        default=120.0,
        ge=0,
        description="the longest that opening a bundle may take; 0: any time, without a trial",
    )
    cache: Path | None = Field(
        default=None, description="where measurements are kept; none: ~/.cache/evalmode"
    )
    proof_fraction: float = Field(
        default=0.001, ge=0, le=1, description="share of answers that idle time checks again"
    )
    # Where it listens.
    host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65_535, description="the port to listen on; 0 takes a free one"
    )
    ssl_certfile: Path | None = Field(default=None, description="the certificate for TLS")
    ssl_keyfile: Path | None = Field(default=None, description="its private key")
    ssl_keyfile_password: SecretStr | None = Field(
        default=None, description="the password of the private key"
    )
    ssl_ca_certs: Path | None = Field(
        default=None, description="authorities: clients must show a certificate of one"
    )
    # What is accepted.
    max_body_bytes: int = Field(
        default=1_048_576, ge=1, description="the largest request body that is read"
    )
    max_rows: int = Field(
        default=256, ge=1, description="the most texts, or rows of tensors, in a request"
    )
    max_top_k: int = Field(
        default=100, ge=1, description="the most labels that are given for a text"
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="connections at once in a process; none: by the limit of open files",
    )
    max_header_bytes: int = Field(
        default=16_384, ge=256, description="the longest request line with its headers"
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="the longest wait for a request's headers"
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="the longest wait for more of a body, or to be read"
    )
    keep_alive_s: int = Field(
        default=75, ge=1, description="how long a connection may lie idle between requests"
    )
    api_keys: SecretStr | None = Field(
        default=None, description="keys, one of which a request must show, by commas"
    )
    api_keys_file: Path | None = Field(
        default=None, description="a file of API keys, one a line, read as it changes"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="origins whose pages may call this server; by commas in the environment",
    )
    docs: bool = Field(default=True, description="show the documentation at /docs")
    # What happens under load.
    queue_rows: int = Field(default=4096, ge=1, description="the most rows that wait")
    queue_bytes: int = Field(
        default=67_108_864, ge=1, description="the most bytes of rows that wait"
    )
    queue_s: float = Field(
        default=1.0, gt=0, description="the longest wait that a request may expect and be let in"
    )
    timeout_s: float = Field(
        default=30.0, gt=0, description="when an answer is given up; a request may ask for less"
    )
    max_run_s: float = Field(
        default=30.0, gt=0, description="a batch that runs longer makes the server not ready"
    )
    stuck_grace_s: float = Field(
        default=30.0, ge=0, description="after so much more it is not live either"
    )
    # How it ends, and what it says.
    drain_s: float = Field(
        default=1.0, ge=0, description="after SIGTERM: not ready, and still answering, for so long"
    )
    grace_s: int = Field(
        default=30, ge=1, description="the longest wait for requests in flight when told to stop"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else JSON"
    )
    access_log: float = Field(
        default=1.0, ge=0, le=1, description="share of requests that are logged; failures always"
    )
    slow_request_s: float = Field(
        default=1.0, gt=0, description="a request that takes longer is always logged, a stream not"
    )
    metrics: bool = Field(default=True, description="show Prometheus metrics at /metrics")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]",
        description="where OpenTelemetry traces are sent; none: nowhere",
    )

    @field_validator("control_hosts", "cors_origins", mode="before")
    @classmethod
    def _by_commas(cls, value: object) -> object:
        return (
            [part.strip() for part in value.split(",") if part.strip()]
            if isinstance(value, str)
            else value
        )

    @field_validator("control_hosts")
    @classmethod
    def _without_scheme_and_port(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if re.search(r"[\s/@:]", host):
                raise ValueError("must be host names without a scheme and without a port")
        return hosts

    @model_validator(mode="after")
    def _a_request_fits_into_the_queue(self) -> Settings:
        if self.max_rows > self.queue_rows:
            raise ValueError(
                f"max_rows must be at most queue_rows, got {self.max_rows} > {self.queue_rows}"
            )
        return self


# Never a flag: what stands on a command line is read by everyone on the machine.
SECRETS = frozenset(
    name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
)


def load_settings(*, config: Path | None = None, **flags: Any) -> Settings:
    """The settings: `flags` (None counts as absent), else the environment, else the file, else the
    defaults.

    The file is TOML with the settings' names: `config`, or what EVALMODE_CONFIG names. Raises
    StartFailed, naming the first field that is wrong and its value.
    """
    return trace_settings(config=config, **flags)[0]


def trace_settings(
    *, config: Path | None = None, **flags: Any
) -> tuple[Settings, dict[str, Origin]]:
    """The settings as `load_settings` finds them, and where the value of each came from."""
    file = config or (
        Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None
    )
    sources: dict[Origin, Mapping[str, Any]] = {
        # Not TomlConfigSettingsSource, which passes over a file that is missing.
        "file": _read_file(file) if file is not None else {},
        "environment": EnvSettingsSource(Settings)(),
        "flag": {name: value for name, value in flags.items() if value is not None},
    }
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(Settings.model_fields, "default")
    for origin, source in sources.items():  # each overrides those before it
        values |= source
        origins |= dict.fromkeys(source, origin)
    try:
        return Settings(**values), origins
    except ValidationError as error:
        raise StartFailed(_sentence(error.errors()[0], origins, file)) from error


def strange_variables() -> dict[str, str]:
    """The variables that look like settings and are none, each with a sentence: a misspelt one must
    not go unseen.
    """
    known = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields} | {
        CONFIG_VARIABLE,
        f"{_PREFIX}TRACEBACK",
    }
    strange = sorted(
        name
        for name in os.environ
        if name.upper().startswith(_PREFIX) and name.upper() not in known
    )
    return {name: _unknown(name[len(_PREFIX) :].lower()) for name in strange}


def _read_file(file: Path) -> Mapping[str, Any]:
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise StartFailed(f"the settings file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StartFailed(f"the settings file {file} is not valid TOML: {error}") from error
    for name in written:
        if name not in Settings.model_fields:
            raise StartFailed(f"{file}: {_unknown(name)}")
    return written


def _sentence(error: ErrorDetails, origins: Mapping[str, Origin], file: Path | None) -> str:
    """pydantic's complaint as one sentence that names the setting, where it may be set, and its
    value.
    """
    if not error["loc"]:
        return f"settings: {error['msg'].removeprefix('Value error, ')}"
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return _unknown(field)
    complaint = error["msg"].replace("Input should", "must").replace("String should", "must")
    complaint = complaint.removeprefix("Value error, ")
    if error["type"] == "path_type":
        complaint = "must be a path"
    if error["type"] == "string_pattern_mismatch":
        complaint = "must be an address that begins with http:// or https://"
    value = "a value that is not shown" if field in SECRETS else repr(error["input"])
    if origins[field] == "file":
        return f"{file}: {field} {complaint}, got {value}"
    return f"{setting_named(field)} {complaint}, got {value}"


def setting_named(field: str) -> str:
    """The setting with its flag and its variable, as a sentence names it."""
    flag = "" if field in SECRETS else f"--{field.replace('_', '-')}, "
    return f"setting {field} ({flag}{_PREFIX}{field.upper()})"


def _unknown(name: str) -> str:
    known: Collection[str] = Settings.model_fields
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    return f"there is no setting {name}; " + (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    )
