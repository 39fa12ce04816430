"""The settings of a server: frozen, and refused when they are built if a value is wrong.

A value comes from the first source that has it: a flag, the environment (`EVALMODE_*`), a TOML
file, the default. No file or address that a setting names is opened here.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from evalmode.service.cpu_quota import cpu_quota
from evalmode.service.errors import StartFailed

_PREFIX = "EVALMODE_"
CONFIG_VARIABLE = f"{_PREFIX}CONFIG"

# The source of a setting's value.
Origin = Literal["flag", "environment", "file", "default"]

# The setting `workers` that asks for one process a core, and the most that a server may have.
_AUTO = "auto"
_MAX_WORKERS = 256

# The titles of the groups in `--help`, each by the first setting of its group. The comments in
# `Settings` repeat them.
GROUPS = {
    "bundle": "What is served",
    "provider": "How it runs",
    "host": "Where it listens",
    "max_body_bytes": "What is accepted",
    "queue_rows": "What happens under load",
    "drain_s": "How it ends, and what it reports",
}


class Settings(BaseSettings):
    """The settings of one server. Build them with `load_settings`: its errors are one sentence."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, frozen=True, extra="forbid", allow_inf_nan=False
    )

    # What is served.
    bundle: Path = Field(default=Path("bundles"), description="a bundle, or a folder of bundles")
    default_model: str | None = Field(
        default=None, description="the model for requests that name none; none: the only model"
    )
    versions: int = Field(
        default=1, ge=1, description="how many of a model's newest versions are served"
    )
    poll_s: float = Field(
        default=2.0,
        ge=0,
        description="the interval of checks for new versions in the folder; 0: never",
    )
    model_control: bool = Field(
        default=True, description="let POST /v2/repository load and unload models"
    )
    control_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "host names, besides local ones, under which models can be loaded and unloaded; *: all"
        ),
    )
    allow_uncertified: bool = Field(
        default=False,
        description="serve a bundle without a passing certificate, or one that can draw or train",
    )
    # How it runs.
    provider: str = Field(
        default="cpu", min_length=1, description="the ONNX Runtime execution provider"
    )
    threads: int = Field(default=1, ge=1, description="threads of one batch")
    parallel: int | None = Field(
        default=None, ge=1, description="parallel batches in a process; none: by the CPU quota"
    )
    workers: int = Field(
        default=_AUTO,
        ge=1,
        le=_MAX_WORKERS,
        validate_default=True,
        description=(
            "server processes that share the port; auto: on cpu, the CPU quota divided by threads;"
            " elsewhere 1"
        ),
    )
    calibration_s: float = Field(
        default=1.0, ge=0, description="the longest time for measuring a model"
    )
    load_timeout_s: float = Field(
        default=120.0,
        ge=0,
        description="the longest time for opening a bundle; 0: no limit, and no trial",
    )
    cache: Path | None = Field(
        default=None, description="the folder for measurements; none: ~/.cache/evalmode"
    )
    proof_fraction: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="the share of answers that are computed again in idle time",
    )
    # Where it listens.
    host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65_535, description="the port to listen on; 0: a free one"
    )
    ssl_certfile: Path | None = Field(default=None, description="the certificate for TLS")
    ssl_keyfile: Path | None = Field(default=None, description="its private key")
    ssl_keyfile_password: SecretStr | None = Field(
        default=None, description="the password of the private key"
    )
    ssl_ca_certs: Path | None = Field(
        default=None,
        description="the authorities of client certificates, which clients must then show",
    )
    # What is accepted.
    max_body_bytes: int = Field(
        default=1_048_576, ge=1, description="the largest request body that is read"
    )
    max_rows: int = Field(
        default=256, ge=1, description="the most texts, or rows of tensors, in a request"
    )
    max_top_k: int = Field(
        default=100, ge=1, description="the most labels in the answer for a text"
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="open connections in a process; none: by the limit of open files",
    )
    max_header_bytes: int = Field(
        default=16_384, ge=256, description="the longest request line and headers together"
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="the longest wait for a request's headers"
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="the longest wait for more of a body, or for a client to read",
    )
    keep_alive_s: int = Field(
        default=75, ge=1, description="how long a connection may be idle between requests"
    )
    api_keys: SecretStr | None = Field(
        default=None, description="API keys, separated by commas; every request must have one"
    )
    api_keys_file: Path | None = Field(
        default=None, description="a file of API keys, one on each line, read again when it changes"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="origins whose pages may call this server; in the environment with commas",
    )
    docs: bool = Field(default=True, description="serve the documentation at /docs")
    # What happens under load.
    queue_rows: int = Field(default=4096, ge=1, description="the most rows that may wait")
    queue_bytes: int = Field(
        default=67_108_864, ge=1, description="the most bytes of rows that may wait"
    )
    queue_s: float = Field(
        default=1.0, gt=0, description="a request with a longer expected wait is refused"
    )
    timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="the time limit of an answer; a request may set a shorter one",
    )
    max_run_s: float = Field(
        default=30.0,
        gt=0,
        description="the time limit of a batch; beyond it the server is not ready",
    )
    stuck_grace_s: float = Field(
        default=30.0,
        ge=0,
        description="beyond max_run_s by this much, the server is not live either",
    )
    # How it ends, and what it reports.
    drain_s: float = Field(
        default=1.0,
        ge=0,
        description="after SIGTERM, how long it is not ready and still accepts requests",
    )
    grace_s: int = Field(
        default=30, ge=1, description="after that, the longest wait for requests in flight"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="the form of log lines; auto: console on a terminal, else JSON"
    )
    access_log: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="the share of requests that are logged; failures always are",
    )
    slow_request_s: float = Field(
        default=1.0,
        gt=0,
        description="a request that takes longer is always logged, except a stream",
    )
    metrics: bool = Field(default=True, description="serve Prometheus metrics at /metrics")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]",
        description="the address for OpenTelemetry traces; none: no traces",
    )

    @field_validator("workers", mode="wrap")
    @classmethod
    def _resolve_workers(
        cls, value: object, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> int:
        if value != _AUTO:
            try:
                workers: int = validate(value)
            except ValidationError as error:
                raise ValueError(
                    f"must be a whole number from 1 to {_MAX_WORKERS}, or {_AUTO}"
                ) from error
            return workers
        # On a device, each process would hold the model in the device's memory.
        if info.data.get("provider", "").lower() not in ("cpu", "cpuexecutionprovider"):
            return 1
        # `threads` is missing if it is wrong, and then its error is the one that is reported.
        threads: int = info.data.get("threads", 1)
        return min(_MAX_WORKERS, max(1, cpu_quota() // threads))

    @field_validator("control_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("control_hosts")
    @classmethod
    def _require_bare_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if re.search(r"[\s/@:]", host):
                raise ValueError("must be host names without a scheme and without a port")
        return hosts

    @model_validator(mode="after")
    def _require_queue_for_a_request(self) -> Settings:
        if self.max_rows > self.queue_rows:
            raise ValueError(
                f"max_rows must be at most queue_rows, got {self.max_rows} > {self.queue_rows}"
            )
        return self


# Secrets have no flag, because every user of the machine can read a command line.
SECRETS = frozenset(
    name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
)


def load_settings(*, config: Path | None = None, **flags: Any) -> Settings:
    """The settings from `flags` (None means absent), the environment, a file, and the defaults.

    The file is TOML with the names of the settings: `config`, else the one that EVALMODE_CONFIG
    names. Raises StartFailed, which names the first wrong setting and its value.
    """
    return trace_settings(config=config, **flags)[0]


def trace_settings(
    *, config: Path | None = None, **flags: Any
) -> tuple[Settings, dict[str, Origin]]:
    """The settings as `load_settings` returns them, and the origin of each value."""
    file = config
    if file is None and os.environ.get(CONFIG_VARIABLE):
        file = Path(os.environ[CONFIG_VARIABLE])
    file_values: Mapping[str, Any] = {}
    if file is not None:
        # Not with pydantic's TomlConfigSettingsSource, which ignores a missing file.
        try:
            file_values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise StartFailed(
                f"the settings file {file} cannot be read: {error.strerror}"
            ) from error
        except ValueError as error:
            raise StartFailed(f"the settings file {file} is not valid TOML: {error}") from error
        for name in file_values:
            if name not in Settings.model_fields:
                raise StartFailed(f"{file}: {_no_such_setting(name)}")

    sources: dict[Origin, Mapping[str, Any]] = {
        "file": file_values,
        "environment": EnvSettingsSource(Settings)(),
        "flag": {name: value for name, value in flags.items() if value is not None},
    }
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(Settings.model_fields, "default")
    # Each source overrides those before it.
    for origin, source in sources.items():
        values |= source
        origins |= dict.fromkeys(source, origin)
    try:
        return Settings(**values), origins
    except ValidationError as error:
        raise StartFailed(_sentence_of(error.errors()[0], origins, file)) from error


def strange_variables() -> dict[str, str]:
    """The variables that look like settings but are none, each with a sentence.

    A misspelt variable has no effect, so the server reports it.
    """
    expected = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields}
    expected |= {CONFIG_VARIABLE, f"{_PREFIX}TRACEBACK"}
    problems = {}
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and name.upper() not in expected:
            problems[name] = _no_such_setting(name[len(_PREFIX) :].lower())
    return problems


def setting_named(field: str) -> str:
    """The setting with its flag and its variable, for a sentence.

    >>> setting_named("max_rows")
    'setting max_rows (--max-rows, EVALMODE_MAX_ROWS)'
    """
    flag = "" if field in SECRETS else f"--{field.replace('_', '-')}, "
    return f"setting {field} ({flag}{_PREFIX}{field.upper()})"


def _sentence_of(error: ErrorDetails, origins: Mapping[str, Origin], file: Path | None) -> str:
    """pydantic's error as one sentence with the setting, its flag and variable, and its value."""
    # Errors of our own validators.
    message = error["msg"].removeprefix("Value error, ")
    # An error without a field is about several settings.
    if not error["loc"]:
        return f"settings: {message}"
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return _no_such_setting(field)

    if error["type"] == "path_type":
        problem = "must be a path"
    elif error["type"] == "string_pattern_mismatch":
        problem = "must be an address that begins with http:// or https://"
    else:
        # pydantic writes "Input should be a valid integer".
        problem = message.replace("Input should", "must").replace("String should", "must")
    value = "a value that is not shown" if field in SECRETS else repr(error["input"])
    if origins[field] == "file":
        return f"{file}: {field} {problem}, got {value}"
    return f"{setting_named(field)} {problem}, got {value}"


def _no_such_setting(name: str) -> str:
    names: Collection[str] = Settings.model_fields
    similar = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1)
    if similar:
        return f"there is no setting {name}; did you mean {similar[0]}?"
    return f"there is no setting {name}; there are {', '.join(names)}"
