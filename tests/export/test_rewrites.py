"""Operators that torch's exporter refuses are rewritten for the trace, with the same results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evalmode.bundle.session import open_session
from evalmode.export.convert import convert
from evalmode.export.graph import serialise
from evalmode.export.module.forward import answers_of

MASK = torch.ones(3, 5, dtype=torch.long).tril(2)


class Computes(nn.Module):
    """A forward that is one function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(x, mask)


def attention(query: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=causal)


def mixture_of_experts(rows: Tensor, _mask: Tensor) -> Tensor:
    """Groups of rows for three experts; the last rows belong to none."""
    weight = torch.arange(3 * 4 * 2, dtype=torch.float32).reshape(3, 4, 2).cos()
    flat = rows.reshape(-1, 4)
    count = flat.shape[0]
    ends = torch.tensor([1, 0, 0], dtype=torch.int32) * (count // 4)
    ends = torch.stack([ends[0], ends[0] * 2, ends[0] * 3]).to(torch.int32)
    if torch.compiler.is_exporting():
        return torch._grouped_mm(flat, weight, offs=ends)
    numbers = torch.arange(count)
    answer = torch.zeros(count, 2)
    for index, start in enumerate((0, *ends[:-1].tolist())):
        is_in_group = (numbers >= start) & (numbers < ends[index])
        answer[is_in_group] = flat[is_in_group] @ weight[index]
    return answer


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, mask: (1.0 - mask) * -1e4, id="float minus int"),
        pytest.param(lambda x, mask: 1.0 - mask.int(), id="float minus int32"),
        pytest.param(lambda x, mask: torch.rsub(mask, 1.0, alpha=2), id="rsub"),
        pytest.param(lambda x, mask: x * (1.0 - torch.arange(4)), id="float minus a range"),
        pytest.param(lambda x, mask: 1 - mask, id="int minus int"),
        pytest.param(lambda x, mask: mask // 2.0, id="int by float"),
        pytest.param(lambda x, mask: mask.softmax(-1, dtype=torch.float32), id="softmax of int"),
        pytest.param(lambda x, mask: attention(x), id="three axes"),
        pytest.param(lambda x, mask: attention(x, causal=True), id="three axes, causal"),
        pytest.param(lambda x, mask: attention(x, mask[:, None, :] > 0), id="three axes, mask"),
        pytest.param(lambda x, mask: attention(x, torch.ones(5, 5).tril() > 0), id="one mask"),
        pytest.param(lambda x, mask: attention(x[:, None, None]), id="five axes"),
        pytest.param(lambda x, mask: attention(x[0]), id="two axes"),
        pytest.param(lambda x, mask: F.rrelu(x, 0.1, 0.5), id="rrelu"),
        pytest.param(mixture_of_experts, id="experts"),
    ],
)
def test_the_graph_answers_as_the_module(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    module = Computes(function).eval()
    inputs = {"x": torch.randn(3, 5, 4), "mask": MASK}
    axes = {"x": {0: "batch"}, "mask": {0: "batch"}}
    model = convert(module, inputs, dynamic_axes=axes, outputs=["y"]).model
    session = open_session(serialise(model))
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    feeds = {item.name: arrays[item.name] for item in session.inputs}
    (expected,) = answers_of(module, arrays).values()
    answer = session.run(feeds)["y"]
    assert answer.dtype == expected.dtype
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


class Casts(nn.Module):
    """A layer that each forward casts to the type that it already has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.linear = self.linear.to(x.dtype)
        answer: Tensor = self.linear(x)
        return answer


class Causal(nn.Module):
    """The language model of the PyTorch tutorial."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        answer: Tensor = self.encoder(x, mask=mask)
        return answer


class TakesMore(nn.Module):
    """A forward with keyword arguments that its signature does not name."""

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return x * more["scale"][:, None, None]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Casts(), {"x": torch.randn(3, 5, 4)}),
        (Causal(), {"x": torch.randn(3, 5, 16)}),
        (TakesMore(), {"x": torch.randn(3, 5, 4), "scale": torch.rand(3)}),
    ],
)
def test_modules_that_only_look_untraceable_are_traced(
    module: nn.Module, inputs: dict[str, Tensor]
) -> None:
    axes = {name: {0: "batch"} for name in inputs}
    model = convert(module.eval(), inputs, dynamic_axes=axes, outputs=["y"]).model
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    (expected,) = answers_of(module, arrays).values()
    answer = open_session(serialise(model)).run(arrays)["y"]
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


def test_an_export_leaves_torch_unchanged() -> None:
    apply, detect = nn.Module._apply, nn.modules.transformer._detect_is_causal_mask
    convert(Casts().eval(), {"x": torch.randn(3, 5, 4)}, dynamic_axes={}, outputs=["y"])
    assert nn.Module._apply is apply
    assert nn.modules.transformer._detect_is_causal_mask is detect
