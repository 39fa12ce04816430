"""How a server is set up: frozen, from flags, `EVALMODE_*` and a file, refused when built if wrong. Opens nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from evalmode.service.errors import StartFailed

_PREFIX = "EVALMODE_"


class Settings(BaseSettings):
    """The settings of one server. Build it with `load_settings`, which says in one sentence what is wrong."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    # What is served.
    bundle: Path = Field(default=Path("bundles"), description="a bundle, or a folder of bundles")
    default_model: str | None = Field(default=None, description="who answers /v1 where no model is named; none: the only")
    versions: int = Field(default=1, ge=1, description="how many of a model's newest versions are served")
    poll_s: float = Field(default=2.0, ge=0, description="how often the folder is looked at for new versions; 0: never")
    model_control: bool = Field(default=True, description="let POST /v2/repository load and unload models")
    allow_uncertified: bool = Field(default=False, description="serve a bundle without a certificate that passes")
    # How it runs.
    provider: str = Field(default="cpu", min_length=1, description="the ONNX Runtime execution provider")
    threads: int = Field(default=1, ge=1, description="threads of one batch")
    parallel: int | None = Field(default=None, ge=1, description="batches at once in a process; none: by the CPU quota")
    workers: int = Field(default=1, ge=1, le=256, description="server processes that share the port")
    calibration_s: float = Field(default=1.0, ge=0, description="the longest that measuring a model may take at its load")
    cache: Path | None = Field(default=None, description="where measurements are kept; none: ~/.cache/evalmode")
    proof_fraction: float = Field(default=0.001, ge=0, le=1, description="share of answers that idle time computes again")
    # Where it listens.
    host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on")
    port: int = Field(default=8000, ge=0, le=65_535, description="the port to listen on; 0 takes a free one")
    ssl_certfile: Path | None = Field(default=None, description="the certificate for TLS")
    ssl_keyfile: Path | None = Field(default=None, description="its private key")
    ssl_keyfile_password: SecretStr | None = Field(default=None, description="the password of the private key")
    ssl_ca_certs: Path | None = Field(default=None, description="authorities; clients must then show a certificate of one")
    # What is accepted.
    max_body_bytes: int = Field(default=1_048_576, ge=1, description="the largest request body that is read")
    max_rows: int = Field(default=256, ge=1, description="the most texts, or rows of tensors, in a request")
    max_top_k: int = Field(default=100, ge=1, description="the most labels that are given for a text")
    max_header_bytes: int = Field(default=16_384, ge=256, description="the longest request line with its headers")
    header_timeout_s: float = Field(default=10.0, gt=0, description="the longest wait for a request's headers")
    body_timeout_s: float = Field(default=30.0, gt=0, description="the longest wait for more of a body, or to be read")
    keep_alive_s: int = Field(default=75, ge=1, description="how long a connection may lie idle between requests")
    api_keys: SecretStr | None = Field(default=None, description="keys, one of which a request must show, by commas")
    api_keys_file: Path | None = Field(default=None, description="a file with such keys, one a line, read as it changes")
    cors_origins: tuple[str, ...] = Field(default=(), description="origins whose pages may call this server")
    docs: bool = Field(default=True, description="show the documentation at /docs")
    # What happens under load.
    queue_rows: int = Field(default=4096, ge=1, description="the most rows that wait")
    queue_bytes: int = Field(default=67_108_864, ge=1, description="the most bytes of rows that wait")
    timeout_s: float = Field(default=30.0, gt=0, description="when an answer is given up; a request may ask for less")
    max_run_s: float = Field(default=30.0, gt=0, description="a batch that runs longer makes the server not ready")
    stuck_grace_s: float = Field(default=30.0, ge=0, description="after so much more it is not live either")
    # How it ends, and what it says.
    drain_s: float = Field(default=1.0, ge=0, description="after SIGTERM: not ready, and still answering, for so long")
    grace_s: int = Field(default=30, ge=1, description="the longest wait for requests in flight when told to stop")
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else JSON"
    )
    access_log: float = Field(default=1.0, ge=0, le=1, description="share of requests that are logged; failures always")
    metrics: bool = Field(default=True, description="show Prometheus metrics at /metrics")
    otlp_endpoint: str | None = Field(default=None, description="where OpenTelemetry traces are sent; none: nowhere")

    @model_validator(mode="after")
    def _a_request_fits_into_the_queue(self) -> Settings:
        if self.max_rows > self.queue_rows:
            raise ValueError(f"max_rows must be at most queue_rows, got {self.max_rows} > {self.queue_rows}")
        return self


def load_settings(**given: Any) -> Settings:
    """The settings: what is `given` (None counts as not given), else the environment, else the defaults.

    Raises StartFailed, naming the first field that is wrong and its value.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise StartFailed(f"settings: {first['msg'].removeprefix('Value error, ')}") from error
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise StartFailed(f"there is no setting {field}; there are {', '.join(Settings.model_fields)}") from error
        complaint = first["msg"].replace("Input should", "must").replace("String should", "must")
        spellings = f"--{field.replace('_', '-')}, {_PREFIX}{field.upper()}"
        raise StartFailed(f"setting {field} ({spellings}) {complaint}, got {first['input']!r}") from error
