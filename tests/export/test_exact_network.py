"""The exact network as ONNX: the bits of PyTorch under every setting of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.store import open_bundle
from evalmode.export.convert import convert
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.model.exact.network import ExactTransformer
from tests.conftest import make_checkpoint, small_config

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
# Everything that the graph may contain: exact operations, and what moves or names numbers.
OPERATORS = {
    *("Add", "Sub", "Mul", "MatMul", "Gemm", "Floor", "Clip", "Cast", "Gather", "GatherElements"),
    *("ReduceMax", "ReduceSum"),
    *("Shape", "Concat", "Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze"),
}


def network(**changes: object) -> ExactTransformer:
    torch.manual_seed(0)
    module = ExactTransformer(small_config(arithmetic="exact", **changes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3)
        module.embedding.table.weight[0].zero_()
    return module.eval()


def inputs_of(groups: int, *, rows: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 512, (rows, length, groups), generator=draw)
    ids[1:, length - 2 :] = 0
    if groups > 1:
        return {"input_ids": ids}
    return {"input_ids": ids.squeeze(-1), "attention_mask": (ids != 0).any(-1).long()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ids_per_position": 1, "ngram_dropout": 0.0},
        {"causal": True, "dropout_kind": "classic", "weight_bits": 7},
    ],
    ids=str,
)
def test_onnx_runtime_gives_the_bits_of_pytorch_at_every_level_and_number_of_threads(
    changes: dict[str, object],
) -> None:
    module = network(**changes)
    groups = module.config.ids_per_position
    batches = [(1, 5), (3, 9), (3, 16), (32, 7)]
    inputs = [inputs_of(groups, rows=rows, length=length) for rows, length in batches]
    expected = [module(**tensors).detach().numpy() for tensors in inputs]
    module.freeze()
    graph = convert(
        module,
        inputs[1],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs[0]},
        outputs=["logits"],
    ).model
    assert {node.op_type for node in graph.graph.node} <= OPERATORS
    for level in LEVELS:
        for threads in (1, 2):
            options = ort.SessionOptions()
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            options.intra_op_num_threads = threads
            session = ort.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            for tensors, logits in zip(inputs, expected, strict=True):
                feed = {name: tensor.numpy() for name, tensor in tensors.items()}
                (answer,) = session.run(["logits"], feed)
                assert np.asarray(answer).tobytes() == logits.tobytes()


@pytest.mark.parametrize("kernels", ["float", "integer"])
@pytest.mark.parametrize("kind", ["inverted", "classic"])
def test_a_checkpoint_becomes_a_bundle_that_passes_every_rule(
    tmp_path: Path, kind: str, kernels: str
) -> None:
    released = release_checkpoint(
        # Of 7 bits: products of 8-bit weights saturate on processors without VNNI.
        make_checkpoint(network(dropout_kind=kind, weight_bits=7)),
        root=tmp_path,
        name="exact",
        version="1",
        progress=lambda step: None,
        kernels=kernels,
    )
    bundle = open_bundle(released.path)
    assert bundle.certificate is not None
    records = {record.rule: record for record in bundle.certificate.records}
    assert {record.verdict for record in records.values()} == {Verdict.PASS}
    assert records["census"].measured == "10 sites, 0 present"
    assert records["parity"].measured.startswith("0.00e+00 standard deviations")
    assert "at every batch size 1..64" in records["batch-invariance"].measured
