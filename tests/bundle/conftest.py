"""A bundle whose model is arbitrary bytes, which the store does not look into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from evalmode.bundle.certificate import Certificate, Platform, Record, Verdict
from evalmode.bundle.frontend import NgramSpec
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE, Manifest, TensorSpec
from evalmode.bundle.store import digest_of, hashes_of, write_bundle

PLATFORM = Platform(
    runtime="onnxruntime 1.0",
    provider="CPUExecutionProvider",
    threads=1,
    architecture="x86_64",
    cpu_features=("avx2",),
)
ANSWER = KnownAnswer(
    text="Ez egy rövid mondat.",
    inputs={"input_ids": np.arange(8, dtype=np.int64).reshape(1, 2, 4)},
    outputs={"logits": np.array([[0.5, -1.0, 2.0]], np.float32)},
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The arguments of `write_bundle`."""

    manifest: Manifest
    certificate: Certificate
    contents: dict[str, bytes]

    def write(self, root: Path) -> Path:
        return write_bundle(
            root, manifest=self.manifest, certificate=self.certificate, contents=self.contents
        ).path


def make_parts(
    *,
    version: str = "1",
    model: bytes = b"any bytes " * 40,
    verdicts: tuple[Verdict, ...] = (Verdict.PASS, Verdict.NOT_APPLICABLE),
) -> Parts:
    contents = {
        MODEL_FILE: model,
        KNOWN_ANSWERS_FILE: pack((ANSWER,)),
        "notes/origin.txt": b"made by hand\n",
    }
    manifest = Manifest(
        name="any",
        version=version,
        opset=18,
        inputs=(TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1, 16)),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),),
        labels=("hu", "nl", "fi"),
        frontend=NgramSpec(),
        metrics={"accuracy": 0.5},
        files=hashes_of(contents),
    )
    records = tuple(
        Record(rule=f"rule-{index}", verdict=verdict, why="why")
        for index, verdict in enumerate(verdicts)
    )
    certificate = Certificate(
        digest=digest_of(manifest), platform=PLATFORM, records=records, row_counts={4: (1, 2)}
    )
    return Parts(manifest=manifest, certificate=certificate, contents=contents)


@pytest.fixture
def parts() -> Callable[..., Parts]:
    """`make_parts` as a fixture: in importlib mode a test cannot import from a conftest."""
    return make_parts


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A bundle on disk."""
    return make_parts().write(tmp_path / "bundles")


@pytest.fixture
def platform() -> Platform:
    return PLATFORM


@pytest.fixture
def answer() -> KnownAnswer:
    return ANSWER
