"""Tiny bundles with a certificate made by hand, so that a test can serve one without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from evalmode.bundle.certificate import (
    EXACT_ARITHMETIC,
    INTEGER_SATURATION,
    Certificate,
    Record,
    Statement,
    Verdict,
)
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


def on_another_platform(certificate: Certificate) -> Certificate:
    """The certificate with the platform of another ONNX Runtime on another CPU."""
    platform = certificate.platform.model_copy(
        update={"runtime": "onnxruntime 1.0", "cpu_features": ("neon",)}
    )
    return certificate.model_copy(update={"platform": platform})


def tiny_model(
    *,
    batchable: bool = True,
    bias: float = 0.0,
    labels: int = len(LABELS),
    dropout: float | None = None,
) -> bytes:
    """A model that sums over n-grams and positions and applies a head: ids (B, T, G) -> (B, C).

    If `batchable`, a matrix product sums the positions, and a row has the same bits at every batch
    size. Otherwise a reduction does, whose kernel for one row adds in another order. A `bias` that
    is NaN or infinite makes every answer so. `dropout` is the rate of a Dropout in training mode on
    the pooled values.
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
    product_nodes = [
        node("ReduceMax", ["input_ids", "grams"], ["highest"], keepdims=0),  # (B, T)
        node("Sign", ["highest"], ["real"]),
        node("Cast", ["real"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "positions"], ["weights"]),  # (B, 1, T)
        node("MatMul", ["weights", "embedded"], ["pooled"]),  # (B, 1, D)
    ]
    # (B, 1, D)
    reduction_nodes = [node("ReduceSum", ["embedded", "positions"], ["pooled"], keepdims=1)]
    pooled, dropout_nodes = "pooled", []
    if dropout is not None:
        # ONNX Runtime 1.31 removes a Dropout whose mode is constant, even if it is True. So the
        # mode is computed from the ids.
        dropout_nodes = [
            node("ReduceMax", ["input_ids"], ["largest"], keepdims=0),
            node("GreaterOrEqual", ["largest", "zero"], ["on"]),
            node("Dropout", ["pooled", "ratio", "on"], ["dropped"]),
        ]
        pooled = "dropped"
        tensors |= {"ratio": np.array(dropout, np.float32), "zero": np.array(0, np.int64)}
    nodes = [
        node("Gather", ["table", "input_ids"], ["gathered"]),  # (B, T, G, D)
        node("ReduceSum", ["gathered", "grams"], ["embedded"], keepdims=0),  # (B, T, D)
        *(product_nodes if batchable else reduction_nodes),
        *dropout_nodes,
        node("MatMul", [pooled, "head"], ["headed"]),  # (B, 1, C)
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
    """Write a bundle of text below `root` with a certificate made by hand.

    `change` may falsify its known answers, and `certify` its certificate.
    """
    model = model or tiny_model()
    session = open_session(model)
    answers = tuple(change(answer) for answer in _known_answers(session))
    return write_certified(
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


def as_proved(certificate: Certificate) -> Certificate:
    """The certificate with statements that the model is exact, true or not."""
    statements = tuple(
        Statement(name=name, holds=True, why="proved")
        for name in (EXACT_ARITHMETIC, INTEGER_SATURATION)
    )
    return certificate.model_copy(update={"schema_version": 2, "statements": statements})


def tensor_bundle(
    root: Path,
    *,
    model: bytes | None = None,
    known_inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    independent: bool = True,
    name: str = "tensors",
    version: str = "1",
) -> Path:
    """Write a bundle without a front end below `root`, with known answers for `known_inputs`.

    If `independent`, its certificate says that a row does not depend on the other rows.
    """
    model = model or product_model()
    session = open_session(model)
    if known_inputs is None:
        known_inputs = [{"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}]
    answers = tuple(
        KnownAnswer(inputs=inputs, outputs=session.run(inputs)) for inputs in known_inputs
    )
    invariance = Record(rule="batch-invariance", verdict=Verdict.PASS, why="a bundle of the tests")

    def certify(certificate: Certificate) -> Certificate:
        records = (invariance,) if independent else ()
        return certificate.model_copy(update={"records": (*certificate.records, *records)})

    return write_certified(root, model, session, answers, certify, name=name, version=version)


def token_bundle(root: Path, model: bytes, tokenizer: str, *, spec: BpeSpec) -> Path:
    """Write a bundle of text with a tokenizer below `root`, without known answers."""
    return write_certified(
        root,
        model,
        open_session(model),
        (),
        lambda certificate: certificate,
        frontend=spec,
        tokenizer=tokenizer,
    )


def product_model() -> bytes:
    """y = x @ w[:T]: (B, 2) for x (B, T), T from 1 to 64.

    Written as a sum of products. A MatMul has other bits for one row alone than for several.
    """
    weights = np.random.default_rng(3).standard_normal((64, 2)).astype(np.float32)
    node = helper.make_node
    return onnx_model(
        [
            node("Shape", ["x"], ["columns"], start=1, end=2),
            node("Slice", ["w", "zero", "columns", "zero"], ["some"]),
            node("Unsqueeze", ["x", "two"], ["numbers"]),
            node("Mul", ["numbers", "some"], ["products"]),
            node("ReduceSum", ["products", "one"], ["y"], keepdims=0),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "columns"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        weights={
            "w": weights,
            "zero": np.array([0], np.int64),
            "one": np.array([1], np.int64),
            "two": np.array([2], np.int64),
        },
    )


def onnx_model(
    nodes: Sequence[NodeProto],
    *,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """A serialised model of these nodes."""
    constants = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "by hand", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def write_certified(
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
    """Write a bundle below `root` with the tensors and the platform of `session`."""
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
