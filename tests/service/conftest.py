"""A tiny certified bundle made by hand, and a real server process on a port of its own: no test
here needs torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from evalmode.bundle.certificate import Certificate, Record, Verdict
from evalmode.bundle.frontend import TOKENIZER_FILE, BpeSpec, NgramFrontEnd, NgramSpec, collate
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE, Manifest
from evalmode.bundle.session import Session, open_session
from evalmode.bundle.store import digest_of, hashes_of, write_bundle

SPEC = NgramSpec(lengths=(4, 8, 16), orders=3, characters=2, vocabulary=512)
LABELS = ("hu", "nl", "fi", "et", "de")
TEXTS = (
    "",
    "Ez egy rövid mondat.",
    "Dit is een zin.",
    "A",
    "Tämä on lyhyt lause, joka ei ole aivan lyhyt.",
)
READY_S = 30.0
END_S = 5.0
SERVER = ("-m", "evalmode.service.process.server")


def tiny_model(*, batchable: bool = True, bias: float = 0.0, labels: int = len(LABELS)) -> bytes:
    """Sum over n-grams, over positions, then a head: logits (B, C) for ids (B, T, G).

    `batchable` sums the positions by a matrix product, which gives a row the same bits at every
    batch size; without it a reduction does, whose one-row kernel adds in another order. A `bias`
    that is NaN or infinite spoils every answer.
    """
    random = np.random.default_rng(7)
    table = random.standard_normal((SPEC.vocabulary, 48)).astype(np.float32)
    table[0] = 0  # padding
    tensors = {
        "table": table,
        "head": (random.standard_normal((48, labels)) / 4).astype(np.float32),
        "bias": np.full(labels, bias, np.float32),
        "positions": np.array([1], np.int64),
        "grams": np.array([2], np.int64),
    }
    node = helper.make_node
    by_product = [
        node("ReduceMax", ["input_ids", "grams"], ["highest"], keepdims=0),  # (B, T)
        node("Sign", ["highest"], ["real"]),
        node("Cast", ["real"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "positions"], ["weights"]),  # (B, 1, T)
        node("MatMul", ["weights", "embedded"], ["pooled"]),  # (B, 1, D)
    ]
    # (B, 1, D)
    by_reduction = [node("ReduceSum", ["embedded", "positions"], ["pooled"], keepdims=1)]
    nodes = [
        node("Gather", ["table", "input_ids"], ["gathered"]),  # (B, T, G, D)
        node("ReduceSum", ["gathered", "grams"], ["embedded"], keepdims=0),  # (B, T, D)
        *(by_product if batchable else by_reduction),
        node("MatMul", ["pooled", "head"], ["headed"]),  # (B, 1, C)
        node("Squeeze", ["headed", "positions"], ["flat"]),
        node("Add", ["flat", "bias"], ["logits"]),  # (B, C)
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length", 6])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", labels])
    return onnx_model(nodes, inputs=[ids], outputs=[logits], weights=tensors)


def make_bundle(
    root: Path,
    *,
    model: bytes | None = None,
    labels: tuple[str, ...] | None = LABELS,
    frontend: NgramSpec | None = SPEC,
    name: str = "tiny",
    version: str = "1",
    change: Callable[[KnownAnswer], KnownAnswer] = lambda answer: answer,
    certify: Callable[[Certificate], Certificate] = lambda certificate: certificate,
) -> Path:
    """Write a bundle of text below `root` whose certificate is filled in by hand.

    `change` spoils its known answers, and `certify` what its certificate says.
    """
    model = model or tiny_model()
    session = open_session(model)
    answers = tuple(change(answer) for answer in _known_answers(session))
    return _written(
        root,
        model,
        session,
        answers,
        certify,
        name=name,
        version=version,
        labels=labels,
        frontend=frontend,
    )


def tensor_bundle(
    root: Path,
    *,
    model: bytes | None = None,
    known: Sequence[Mapping[str, np.ndarray]] | None = None,
    independent: bool = True,
    name: str = "tensors",
    version: str = "1",
) -> Path:
    """Write a bundle without a front end below `root`; its known answers are the model's for
    `known`.

    `independent` is whether its certificate says that rows do not depend on one another.
    """
    model = model or product_model()
    session = open_session(model)
    known = (
        [{"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}] if known is None else known
    )
    answers = tuple(KnownAnswer(inputs=inputs, outputs=session.run(inputs)) for inputs in known)
    invariance = Record(rule="batch-invariance", verdict=Verdict.PASS, why="a bundle of the tests")

    def certify(certificate: Certificate) -> Certificate:
        more = (invariance,) if independent else ()
        return certificate.model_copy(update={"records": (*certificate.records, *more)})

    return _written(root, model, session, answers, certify, name=name, version=version)


def token_bundle(root: Path, model: bytes, tokenizer: str, *, spec: BpeSpec) -> Path:
    """Write a bundle of text below `root` whose front end is a tokenizer; it has no known
    answers.
    """
    return _written(
        root,
        model,
        open_session(model),
        (),
        lambda found: found,
        frontend=spec,
        tokenizer=tokenizer,
    )


def product_model() -> bytes:
    """y = x @ w: (B, 2) for x (B, T) of 1 to 64 columns; w is as many rows long as x has
    columns.
    """
    weights = np.random.default_rng(3).standard_normal((64, 2)).astype(np.float32)
    node = helper.make_node
    return onnx_model(
        [
            node("Shape", ["x"], ["columns"], start=1, end=2),
            node("Slice", ["w", "zero", "columns", "zero"], ["some"]),
            node("MatMul", ["x", "some"], ["y"]),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "columns"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        weights={"w": weights, "zero": np.array([0], np.int64)},
    )


def onnx_model(
    nodes: Sequence[NodeProto],
    *,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """A model made by hand."""
    constants = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "by hand", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def _written(
    root: Path,
    model: bytes,
    session: Session,
    answers: tuple[KnownAnswer, ...],
    certify: Callable[[Certificate], Certificate],
    *,
    name: str = "tokens",
    version: str = "1",
    labels: tuple[str, ...] | None = None,
    frontend: NgramSpec | BpeSpec | None = None,
    tokenizer: str | None = None,
) -> Path:
    contents = {MODEL_FILE: model, KNOWN_ANSWERS_FILE: pack(answers)}
    if tokenizer is not None:
        contents[TOKENIZER_FILE] = tokenizer.encode()
    manifest = Manifest(
        name=name,
        version=version,
        opset=18,
        inputs=session.inputs,
        outputs=session.outputs,
        labels=labels,
        frontend=frontend,
        files=hashes_of(contents),
    )
    passed = Record(rule="by-hand", verdict=Verdict.PASS, why="a bundle of the tests")
    certificate = Certificate(
        digest=digest_of(manifest), platform=session.platform, records=(passed,)
    )
    return write_bundle(
        root, manifest=manifest, certificate=certify(certificate), contents=contents
    ).path


def _known_answers(session: Session) -> Iterator[KnownAnswer]:
    frontend = NgramFrontEnd(SPEC)
    for text in TEXTS:
        ids = frontend.encode(text).ids
        inputs = collate([ids], length=SPEC.padded_length(len(ids)))
        yield KnownAnswer(inputs=inputs, outputs=session.run(inputs), text=text)


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running server: where it is, what it wrote when it began, and its process."""

    url: str
    port: int
    started: dict[str, object]
    process: subprocess.Popen[str]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def environment(bundle: Path, **settings: object) -> dict[str, str]:
    """The environment of a server process."""
    given = {
        "bundle": bundle,
        "port": 0,
        "log_format": "json",
        "access_log": 0,
        "drain_s": 0,
        "parallel": 2,
        **settings,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVALMODE_")}
    return kept | {f"EVALMODE_{name.upper()}": str(value) for name, value in given.items()}


@contextmanager
def running(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> Iterator[Service]:
    """A server process that has said that it serves."""
    process = subprocess.Popen(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started = _started(process)
        url = str(started["url"])
        yield Service(url=url, port=int(url.rpartition(":")[2]), started=started, process=process)
    finally:
        if "workers" in settings:
            process.terminate()  # a supervisor that is killed leaves it to its workers to tidy up
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_S)
        process.kill()
        process.communicate()


def ended(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> subprocess.CompletedProcess[str]:
    """A server process that ended by itself."""
    return subprocess.run(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )


def refused(bundle: Path, **settings: object) -> str:
    """The sentence with which a server refuses to start; it is one, without a traceback, and the
    exit code is 2.
    """
    process = ended(bundle, **settings)
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    return process.stderr


def _started(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if '"serving"' in line:
            return json.loads(line)
    raise AssertionError(f"the server did not start: {''.join(seen)}")


@dataclass(frozen=True)
class Bundles:
    """What a test that wants a bundle of its own calls: importlib mode has no importing from a
    conftest.
    """

    spec = SPEC
    make = staticmethod(make_bundle)
    model = staticmethod(tiny_model)
    tensors = staticmethod(tensor_bundle)
    tokens = staticmethod(token_bundle)
    onnx = staticmethod(onnx_model)


@dataclass(frozen=True)
class Processes:
    """What a test that wants a server of its own calls."""

    running = staticmethod(running)
    ended = staticmethod(ended)
    refused = staticmethod(refused)


@pytest.fixture(scope="session", autouse=True)
def _a_home_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings are kept in the home folder: the tests leave none in the user's, and use none that
    they find there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def bundles() -> Bundles:
    return Bundles()


@pytest.fixture(scope="session")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 texts of every length the tiny model reads, empty, longer, and in several scripts."""
    random = np.random.default_rng(11)
    words = [
        "Ez",
        "egy",
        "rövid",
        "mondat",
        "Dit",
        "is",
        "een",
        "これは",
        "Это",
        "7",
        "👍",
        "ﷺ",
        "long-winded",
        "2026",
    ]
    found = ["", " ", "a", "\ud83d", "x" * 500]
    while len(found) < 200:
        found.append(" ".join(random.choice(words, random.integers(1, 10))))
    return found


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def service(bundle: Path) -> Iterator[Service]:
    with running(bundle, max_body_bytes=65_536, max_rows=256) as found:
        yield found
