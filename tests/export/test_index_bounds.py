"""The bounds of an input are those of its module: the service refuses the same indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.manifest import Bound, TensorSpec
from evalmode.export.convert import convert
from evalmode.export.index_bounds import index_bounds
from evalmode.service.errors import BadRequest
from evalmode.service.models.tensors import check_inputs

ROWS = 10


class Network(nn.Module):
    """A table of ten rows, two smaller ones, and a forward that is an argument."""

    offsets: Tensor

    def __init__(self, forward: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 2)
        self.bag = nn.EmbeddingBag(ROWS, 2)
        self.tables = nn.ModuleList([nn.Embedding(size, 2) for size in (5, 7)])
        self.register_buffer("offsets", torch.tensor([0, 4]))
        self._answer = forward

    def forward(self, ids: Tensor) -> Tensor:
        return self._answer(self, ids)


def by_columns(network: Network, *columns: Tensor) -> Tensor:
    tables = zip(network.tables, columns, strict=True)
    return sum((table(column) for table, column in tables), torch.zeros(()))


# The forwards get ids (B, 2).
EXACT: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "embedding": lambda network, ids: network.table(ids),
    "functional": lambda network, ids: F.embedding(ids, network.table.weight, padding_idx=0),
    "bag": lambda network, ids: network.bag(ids),
    "subscript": lambda network, ids: network.table.weight[ids],
    "subscript of the second axis": lambda network, ids: network.table.weight.T[:, ids],
    "index_select": lambda network, ids: network.table.weight.index_select(0, ids.flatten()).view(
        -1, 4
    ),
    "gather": lambda network, ids: (
        network.table.weight[:, 0].expand(ids.shape[0], ROWS).gather(1, ids)
    ),
    "scatter": lambda network, ids: torch.zeros(ids.shape[0], ROWS).scatter(1, ids, 1.0),
    "one_hot": lambda network, ids: F.one_hot(ids, ROWS).float() @ network.table.weight,
    "other type": lambda network, ids: network.table(ids.int()),
    "other axes": lambda network, ids: network.table(ids.T.unsqueeze(0).permute(2, 0, 1)),
    "other shape": lambda network, ids: network.table(ids.reshape(-1)).reshape(-1, 4),
    "joined with zeros": lambda network, ids: network.table(
        torch.cat([torch.zeros_like(ids), ids], 1)
    ),
    "stacked": lambda network, ids: network.table(torch.stack([ids, ids], 1)),
    "shifted": lambda network, ids: network.table(ids + 1),
    "shifted down": lambda network, ids: network.table(ids - 2),
    "number first": lambda network, ids: network.table(3 + ids),
    "two tables": lambda network, ids: network.table(ids) + network.tables[0](ids),
    "columns": lambda network, ids: by_columns(network, ids[:, 0], ids[:, 1]),
    "columns from the end": lambda network, ids: by_columns(network, ids[:, -2], ids[:, -1]),
    "transposed columns": lambda network, ids: by_columns(network, ids.T[0], ids.T[1]),
    "unbound columns": lambda network, ids: by_columns(network, *ids.unbind(1)),
    "split columns": lambda network, ids: by_columns(network, *ids.split(1, dim=1)),
    "chunks": lambda network, ids: by_columns(network, *ids.chunk(2, dim=1)),
    "the first column": lambda network, ids: network.table(ids[:, :1]),
    "the second column": lambda network, ids: network.table(ids[:, 1:]) + ids[:, :1, None],
    "all from the end": lambda network, ids: network.table(ids[:, -2:]),
    "all but the last": lambda network, ids: network.table(ids[:, :-1]),
    "columns in one table": lambda network, ids: network.table(ids + network.offsets),
    "columns in one table, by a list": lambda network, ids: network.table(
        ids + ids.new_tensor([[0, 4]])
    ),
    "two ways to index": lambda network, ids: network.table(ids) + network.tables[1].weight[ids],
    "clamped": lambda network, ids: network.table(ids.clamp(0, ROWS - 1)),
    "modulo": lambda network, ids: network.table(ids % ROWS),
    "a table of the input's own": lambda network, ids: network.table(ids[:1]).sum(1) + ids,
}
# These bounds are wider than the module's, since the analysis does not follow such operators.
WIDER: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "replaced": lambda network, ids: network.table(torch.where(ids > 0, ids, 0)),
    "masked": lambda network, ids: network.table(ids.masked_fill(ids < 0, 0)),
    "halved": lambda network, ids: network.table(ids // 2),
    "clamped below": lambda network, ids: network.table(ids.clamp(min=0)),
    "through floats": lambda network, ids: network.table(ids.float().long()),
    "asked and not demanded": lambda network, ids: network.table(ids % ROWS) + (ids >= 5).all(),
}


def spec_of(module: nn.Module) -> TensorSpec:
    ids = torch.tensor([[1, 2], [3, 4], [2, 0]])
    converted = convert(
        module.eval(), {"ids": ids}, dynamic_axes={"ids": {0: "batch"}}, outputs=["y"]
    )
    bounds = converted.index_bounds.get("ids", ())
    return TensorSpec(name="ids", datatype="INT64", shape=(-1, 2), bounds=bounds)


def outcomes(module: nn.Module) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The (column, value) pairs that the module refuses, and those that a service refuses."""
    spec = spec_of(module)
    refused: set[tuple[int, int]] = set()
    checked: set[tuple[int, int]] = set()
    for column in range(2):
        for value in range(-2 * ROWS, 2 * ROWS):
            ids = torch.tensor([[3, 3], [3, 3]])
            ids[0, column] = value
            try:
                module(ids)
            except (IndexError, RuntimeError):
                refused.add((column, value))
            try:
                check_inputs({"ids": ids.numpy()}, [spec])
            except BadRequest:
                checked.add((column, value))
    return refused, checked


@pytest.mark.parametrize("name", EXACT)
def test_the_service_refuses_exactly_the_indices_that_the_module_refuses(name: str) -> None:
    refused, checked = outcomes(Network(EXACT[name]))
    assert checked == refused


@pytest.mark.parametrize("name", WIDER)
def test_the_service_accepts_every_index_that_the_module_accepts(name: str) -> None:
    refused, checked = outcomes(Network(WIDER[name]))
    assert checked <= refused


def bounds_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, tuple[Bound, ...]]:
    axes = {name: {0: "batch"} for name in inputs}
    return convert(module.eval(), inputs, dynamic_axes=axes, outputs=["y"]).index_bounds


class Gathers(nn.Module):
    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        return x.gather(0, position) * mask


def test_an_index_into_an_axis_that_varies_has_only_a_minimum() -> None:
    inputs = {"x": torch.rand(4), "position": torch.tensor([1, 0, 3, 2]), "mask": torch.ones(4)}
    assert bounds_of(Gathers(), inputs) == {"position": (Bound(minimum=0),)}


class SizesThatVary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        half, _ = ids.split([length // 2, length - length // 2], dim=1)
        pieces = ids.split(length // 2, dim=1)
        return (
            self.table(half).sum(1)
            + self.table(pieces[0]).sum(1)
            + self.table(ids[:, : length // 2]).sum(1)
            + self.table((ids + length) % 6).sum(1)
            + self.table(ids[:, length // 2] % 6)
        )


def test_indices_that_depend_on_a_size_have_no_bounds() -> None:
    """Only traced, since torch's exporter cannot write every operator here as ONNX."""
    program = torch.export.export(
        SizesThatVary().eval(),
        (torch.ones(2, 8, dtype=torch.long),),
        dynamic_shapes={"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}},
    )
    assert index_bounds(program) == {}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(30, 4), nn.Embedding(2, 4)

    def forward(self, input_ids: Tensor, type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors = self.words(input_ids) + self.kinds(type_ids)
        return (vectors * attention_mask[..., None]).sum(1)


def test_each_input_has_its_own_bounds_and_a_mask_has_none() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    inputs = {"input_ids": ids, "type_ids": ids, "attention_mask": ids}
    assert bounds_of(TwoInputs(), inputs) == {
        "input_ids": (Bound(minimum=0, maximum=29),),
        "type_ids": (Bound(minimum=0, maximum=1),),
    }


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.table(torch.cat([left, right + 1], 1))


def test_concatenated_inputs_have_separate_bounds() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert bounds_of(Joined(), {"left": ids, "right": ids}) == {
        "left": (Bound(minimum=0, maximum=5),),
        "right": (Bound(minimum=-1, maximum=4),),
    }
