from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.session import open_session
from evalmode.export.convert import NotConvertible, NotInEvalMode, convert
from evalmode.export.graph import module_of, serialise

X = {"x": torch.ones(3, 4)}
AXES = {"x": {0: "batch"}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_a_module_in_training_is_refused_with_its_sites_and_not_put_into_eval() -> None:
    module = Net().eval()
    module.body[1].train()
    with pytest.raises(NotInEvalMode, match=r"body\.1 \(Dropout\)"):
        convert(module, X, dynamic_axes=AXES, outputs=["y"])
    assert module.body[1].training


def test_nodes_are_named_after_the_modules_they_came_from() -> None:
    model = convert(Net().eval(), X, dynamic_axes=AXES, outputs=["y"]).model
    assert {module_of(node.name) for node in model.graph.node} == {"body.0", "body.2"}


def test_axes_and_outputs_have_the_requested_names() -> None:
    model = convert(Net().eval(), X, dynamic_axes=AXES, outputs=["y"]).model
    assert [output.name for output in model.graph.output] == ["y"]
    assert [
        size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim
    ] == [
        "batch",
        4,
    ]


def test_no_path_of_this_machine_and_no_stack_trace_is_in_the_file() -> None:
    model = convert(Net().eval(), X, dynamic_axes=AXES, outputs=["y"]).model
    model.graph.ClearField("initializer")  # weights are any bytes at all
    data = serialise(model)
    for word in (b".py", b"stack_trace", b"ExportedProgram", b"forward", str(Path.cwd()).encode()):
        assert word not in data, word


def test_another_process_writes_the_same_bytes() -> None:
    program = (
        "import hashlib, sys, torch; sys.path.insert(0, sys.argv[1]); import test_convert as t\n"
        "print(t.digest_of_a_conversion())"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert process.stdout.split()[-1] == digest_of_a_conversion()


def digest_of_a_conversion() -> str:
    torch.manual_seed(0)
    digest = hashlib.sha256()
    model = convert(Net().eval(), X, dynamic_axes=AXES, outputs=["y"]).model
    digest.update(serialise(model))
    # onnxscript writes an EmbeddingBag as a loop and keeps its values in a set, whose order could
    # depend on the hash seed.
    bag, ids = nn.EmbeddingBag(9, 4).eval(), {"input": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    axes = {"input": {0: "batch"}}
    digest.update(serialise(convert(bag, ids, dynamic_axes=axes, outputs=["y"]).model))
    return digest.hexdigest()


def test_an_unexportable_module_is_refused_in_one_sentence() -> None:
    with pytest.raises(NotConvertible, match="Branching cannot be exported"):
        convert(Branching().eval(), X, dynamic_axes=AXES, outputs=["y"])


class ReturnsItsInput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        twice = x * 2
        return x, twice, twice


def test_a_returned_input_and_a_tensor_returned_twice_are_separate_outputs() -> None:
    model = convert(ReturnsItsInput().eval(), X, dynamic_axes=AXES, outputs=["a", "b", "c"]).model
    answer = open_session(serialise(model)).run({"x": np.full((2, 4), 3, np.float32)})
    assert [float(answer[name][0, 0]) for name in "abc"] == [3, 6, 6]


def test_a_recurrent_layer_keeps_its_dynamic_length_at_the_second_export() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    for _ in range(2):
        model = convert(
            Recurrent().eval(),
            {"x": torch.ones(3, 5, 4)},
            dynamic_axes={"x": {0: "batch", 1: "length"}},
            outputs=["y"],
        ).model
        assert open_session(serialise(model)).run({"x": np.ones((2, 9, 4), np.float32)})[
            "y"
        ].shape == (2, 9, 3)


def test_a_branch_on_a_size_bounds_its_axis() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] <= 16 else x

    assert convert(Branches().eval(), X, dynamic_axes=AXES, outputs=["y"]).bounds == {"batch": 16}
    assert convert(Net().eval(), X, dynamic_axes=AXES, outputs=["y"]).bounds == {}


class Named(nn.Module):
    """A network whose output is named, in the tests, like an intermediate value of its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.linear(self.table(ids)).exp())


@pytest.mark.parametrize("name", ["embedding", "linear", "linear_1", "exp", "val_0", "logits"])
def test_an_output_may_have_the_name_of_an_intermediate_value_in_torch(name: str) -> None:
    torch.manual_seed(0)
    module = Named().eval()
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    converted = convert(module, {"ids": ids}, dynamic_axes={"ids": {0: "batch"}}, outputs=[name])
    for model in (converted.model, converted.unoptimised):
        onnx.checker.check_model(model)
        assert [output.name for output in model.graph.output] == [name]
        answers = open_session(serialise(model)).run({"ids": ids.numpy()})
        expected = module(ids).detach().numpy()
        np.testing.assert_allclose(answers[name], expected, rtol=1e-5, atol=1e-6)


class Buffered(nn.Module):
    """Buffers with the names that torch gives to intermediate values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name in ("val_0", "val_1", "exp", "mul", "add"):
            self.register_buffer(name, torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.linear(x * self.val_0) + self.add).exp()
        return hidden.mean(1, keepdim=True) * self.mul + self.val_1 * self.exp


def test_a_buffer_may_have_the_name_of_an_intermediate_value_in_torch() -> None:
    module = Buffered().eval()
    converted = convert(module, X, dynamic_axes=AXES, outputs=["y"])
    for model in (converted.model, converted.unoptimised):
        onnx.checker.check_model(model)
        inputs = {name: tensor.numpy() for name, tensor in X.items()}
        answer = open_session(serialise(model)).run(inputs)["y"]
        expected = module(**X).detach().numpy()
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
