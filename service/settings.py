"""How a server is set up: frozen, from `EVALMODE_*` and flags, refused when built if wrong. Opens nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from evalmode.service.errors import StartFailed

_PREFIX = "EVALMODE_"


class Settings(BaseSettings):
    """The settings of one server. Build it with `load_settings`, which says in one sentence what is wrong."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    bundle: Path = Field(default=Path("bundles"), description="a bundle, or a folder of bundles")
    host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on")
    port: int = Field(default=8000, ge=0, le=65_535, description="the port to listen on; 0 takes a free one")
    provider: str = Field(default="cpu", min_length=1, description="the ONNX Runtime execution provider")
    threads: int = Field(default=1, ge=1, description="threads of one batch")
    workers: int | None = Field(default=None, ge=1, description="batches at once; none: as the CPU quota allows")
    max_body_bytes: int = Field(default=1_048_576, ge=1, description="the largest request body that is read")
    max_rows: int = Field(default=256, ge=1, description="the most texts in a request")
    max_top_k: int = Field(default=100, ge=1, description="the most labels that are given for a text")
    allow_uncertified: bool = Field(default=False, description="serve a bundle without a certificate that passes")
    grace_s: int = Field(default=30, ge=1, description="the longest wait for requests in flight when told to stop")
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else JSON"
    )


def load_settings(**given: Any) -> Settings:
    """The settings: what is `given` (None counts as not given), else the environment, else the defaults.

    Raises StartFailed, naming the first field that is wrong and its value.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise StartFailed(f"there is no setting {field}; there are {', '.join(Settings.model_fields)}") from error
        complaint = first["msg"].replace("Input should", "must").replace("String should", "must")
        spellings = f"--{field.replace('_', '-')}, {_PREFIX}{field.upper()}"
        raise StartFailed(f"setting {field} ({spellings}) {complaint}, got {first['input']!r}") from error
