"""A candidate has the names, axes and evidence that samples show, and the module is unchanged."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.samples import candidate_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.linear(self.norm(x)) * scale


@pytest.mark.parametrize(
    "sample", [X, (X,), {"x": X}, {"x": X.numpy()}], ids=["tensor", "tuple", "mapping", "numpy"]
)
def test_a_sample_may_be_a_tensor_a_tuple_or_a_mapping(sample: object) -> None:
    candidate = candidate_of(Net().eval(), [sample])
    assert list(candidate.example) == ["x"]
    assert candidate.evidence.dynamic_axes == {"x": {0: "batch"}}
    assert candidate.outputs == ("output_0",)


def test_the_module_is_not_run_and_not_changed() -> None:
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    candidate_of(module, [X])
    assert module.calls == 0
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_module_that_cannot_be_copied_is_restored_after_it_ran() -> None:
    module = Net().train()
    module.lock = threading.Lock()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    candidate_of(module, [X])
    assert module.calls == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_is_bound_and_is_no_input() -> None:
    module = Net().eval()
    candidate = candidate_of(module, [{"x": X, "scale": 2.0}])
    assert list(candidate.example) == ["x"]
    assert candidate.constants == {"scale": 2.0}
    torch.testing.assert_close(module(x=X), module.linear(module.norm(X)) * 2.0)


def test_probes_are_the_samples_and_other_inputs_that_the_module_reads() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 5:
                raise ValueError("too many")
            return torch.log(x - 1.5)

    sample = torch.rand(3, 4) + 2.0
    candidate = candidate_of(Picky().eval(), [sample])
    np.testing.assert_array_equal(candidate.evidence.probes[0]["x"], sample.numpy())
    sizes = {probe["x"].shape[0] for probe in candidate.evidence.probes}
    assert sizes == {1, 2, 3, 5}, "65 rows it does not read"
    for probe in candidate.evidence.probes:
        assert np.isfinite(np.log(probe["x"] - 1.5)).all(), (
            "an input that is answered with NaN is no probe"
        )


def test_single_rows_are_grouped_by_length_and_differ() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    candidate = candidate_of(Pool().eval(), [torch.randn(3, 9, 4), torch.randn(2, 16, 4)])
    assert {length: len(rows) for length, rows in candidate.evidence.rows.items()} == {9: 8, 16: 8}
    assert {row["x"].shape for row in candidate.evidence.rows[9]} == {(1, 9, 4)}
    assert len({row["x"].tobytes() for row in candidate.evidence.rows[9]}) == 8


@pytest.mark.parametrize(
    "answer", [lambda x: x.sum(), lambda x: x[:1], lambda x: x.T], ids=["scalar", "one", "other"]
)
def test_a_module_whose_answer_has_no_row_for_each_row_is_not_batched(answer: Any) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return answer(x)

    assert candidate_of(Calls().eval(), [X]).evidence.rows == {}


def test_the_example_that_is_traced_has_more_than_one_row() -> None:
    assert candidate_of(Net().eval(), [X[:1]]).example["x"].shape == (2, 4)


def test_outputs_have_the_names_of_the_module_and_other_answers_are_reported() -> None:
    class Rich(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": x, "hidden": (x, x + 1), "cache": object(), "loss": None}

    candidate = candidate_of(Rich().eval(), [X])
    assert candidate.outputs == ("logits", "hidden_0", "hidden_1")
    assert candidate.left_out == ("cache (object)",)


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Anything(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


@pytest.mark.parametrize(
    ("module", "samples", "message"),
    [
        (Net(), [(X, 1.0, X)], "cannot be called with the sample: too many positional"),
        (Net(), [{"y": X}], r"fails on the sample \(y \[3, 4\]\): TypeError"),
        (Pair(), [(X, X)], r"fails on the sample \(a \[3, 4\], b \[3, 4\]\): RuntimeError"),
        (Anything(), [X], r"forward takes \*args, so its inputs have no names"),
        (
            Net(),
            [{"x": X, "scale": object()}],
            "input 'scale' must be a tensor or a plain constant, got object",
        ),
        (
            Net(),
            [{"x": X, "scale": 1.0}, {"x": X, "scale": 2.0}],
            "they must be equal in all samples",
        ),
        (Net(), [{"scale": 1.0}], "holds no tensor"),
        (Net(), [], "there is no sample"),
        (Net(), [X[:0]], "input 'x' is empty in a sample"),
        (Net(), [X.to_sparse()], "input 'x' is sparse"),
        (Net(), [X.bfloat16()], "input 'x' is torch.bfloat16, which NumPy does not have"),
        (
            nn.DataParallel(Net()),
            [X],
            r"takes \*args, .*, or export its \.module, which it only wraps",
        ),
        (
            Net(),
            [X, {"x": X.double()}],
            "input 'x' has different types, or numbers of axes, in two samples",
        ),
        (Pair(), [{"a": X, "b": X.T}, {"a": X}], "the samples have different inputs: a, b and a"),
    ],
)
def test_samples_that_the_module_cannot_be_called_with_are_refused_in_one_sentence(
    module: nn.Module, samples: list[object], message: str
) -> None:
    with pytest.raises(UnusableInputs, match=message):
        candidate_of(module.eval(), samples)


def test_an_answer_without_a_tensor_is_refused_in_one_sentence() -> None:
    class Talks(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "hello"

    with pytest.raises(UnusableInputs, match="Talks returns no tensor but str"):
        candidate_of(Talks().eval(), [X])


def test_a_scripted_or_traced_module_is_refused_in_one_sentence() -> None:
    traced = torch.jit.trace(nn.Linear(4, 2), X)
    with pytest.raises(UnusableInputs, match="export the Python module that it was made from"):
        candidate_of(traced.eval(), [X])


def test_a_first_axis_of_one_size_only_is_no_batch() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(3, 2, 2)

    candidate = candidate_of(Fixed().eval(), [X])
    assert candidate.evidence.dynamic_axes == {"x": {}}
    assert candidate.evidence.rows == {}


def test_a_bound_argument_is_gone_from_the_signature() -> None:
    class Needs(nn.Module):
        def forward(self, x: Tensor, mode: str, times: int) -> Tensor:
            return x * times if mode == "fast" else x

    module = Needs().eval()
    candidate_of(module, [{"x": X, "mode": "fast", "times": 3}])
    assert list(inspect.signature(module.forward).parameters) == ["x"]
    assert torch.equal(module(X), X * 3)


def test_a_dataclass_answers_with_its_fields() -> None:
    @dataclasses.dataclass
    class Answer:
        logits: Tensor
        hidden: tuple[Tensor, ...]

    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Answer:
            return Answer(x + 1, (x, x * 2))

    assert candidate_of(Wraps().eval(), [X]).outputs == ("logits", "hidden_0", "hidden_1")


def test_an_output_with_the_name_of_an_input_gets_another_name() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1, "y": x}

    assert candidate_of(Same().eval(), [X]).outputs == ("x_out", "y")
