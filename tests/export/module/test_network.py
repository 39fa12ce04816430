from __future__ import annotations

import functools
import random
import threading
import types
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalmode.export.module.network import Network

BESIDE = random.Random(0)


class Holds(nn.Module):
    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x


class Plain:
    def __init__(self, inside: object) -> None:
        self.inside = inside

    def call(self) -> None: ...


class LoadedWhenAsked(types.ModuleType):
    """The kind of module that large libraries replace themselves with."""


def closing_over(value: object) -> object:
    return lambda: value


def empty_closure() -> object:
    def call() -> object:
        return later

    if call is None:
        later = None
    return call


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(1, 1)
        self.listed = [nn.Dropout(0.1), (nn.Dropout(0.2),)]
        self.keyed = {"head": nn.Dropout(0.3)}
        self.itself = self.child


def test_modules_in_plain_containers_are_found_and_named_as_code_reaches_them() -> None:
    assert set(Network.of(Hiding()).parts) == {
        "",
        "child",
        "listed[0]",
        "listed[1][0]",
        "keyed['head']",
    }


def test_a_module_that_two_names_share_is_found_once() -> None:
    assert "itself" not in Network.of(Hiding()).parts


def test_hidden_modules_are_found_at_any_depth() -> None:
    assert "0.listed[0]" in Network.of(nn.Sequential(Hiding())).parts


def test_a_container_that_holds_itself_is_walked_once() -> None:
    module = Hiding()
    module.listed.append(module.listed)  # type: ignore[arg-type]
    assert "listed[0]" in Network.of(module).parts


@pytest.mark.parametrize(
    ("wrapped", "path"),
    [
        (lambda part: {part}, "held[0]"),
        (lambda part: frozenset({part}), "held[0]"),
        (lambda part: deque([part]), "held[0]"),
        (lambda part: functools.partial(part), "held.func"),
        (lambda part: functools.partial(print, part), "held.args[0]"),
        (lambda part: functools.partial(print, end=part), "held.keywords['end']"),
        (closing_over, "held.<value>"),
        (lambda part: part.extra_repr, "held.__self__"),
        (Plain, "held.inside"),
        (lambda part: Plain([part]).call, "held.__self__.inside[0]"),
    ],
    ids=[
        "set",
        "frozenset",
        "deque",
        "partial",
        "its args",
        "its keywords",
        "closure",
        "method",
        "object",
        "depth",
    ],
)
def test_a_module_is_found_wherever_an_attribute_leads_to_it(
    wrapped: Callable[[object], object], path: str
) -> None:
    part = nn.Dropout(0.1)
    parts = Network.of(Holds(wrapped(part))).parts
    assert parts[path] is part
    assert set(parts) == {"", path}


def test_an_attribute_with_an_underscore_is_walked_too() -> None:
    module = Holds(None)
    module._drops = [nn.Dropout(0.1)]
    assert set(Network.of(module).parts) == {"", "_drops[0]"}


def test_a_child_has_its_own_name_and_not_that_of_torchs_registry() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].register_buffer("table", torch.ones(1))
    module.register_forward_hook(nn.Dropout(0.1))  # type: ignore[arg-type]
    assert set(Network.of(module).parts) == {"", "0"}


def test_a_closure_whose_variable_is_not_bound_yet_is_skipped() -> None:
    assert set(Network.of(Holds(empty_closure())).parts) == {""}


def test_the_objects_of_libraries_are_not_walked() -> None:
    library = LoadedWhenAsked("library")
    library.drop = nn.Dropout(0.1)
    assert set(
        Network.of(Holds([torch.ones(1), np.ones(1), nn.Dropout, torch, library])).parts
    ) == {""}


def test_generators_are_found_by_the_same_paths_and_as_globals_beside_a_forward() -> None:
    held = {
        "a": random.Random(0),
        "b": (np.random.default_rng(0),),
        "c": Plain(np.random.RandomState(0)),
    }
    generators = Network.of(nn.Sequential(Holds(held))).generators
    assert set(generators) == {
        "0.held['a']",
        "0.held['b'][0]",
        "0.held['c'].inside",
        "global BESIDE",
    }
    assert generators["global BESIDE"] is BESIDE
    assert generators["0.held['a']"] is held["a"]


def test_a_network_without_a_generator_has_none() -> None:
    assert Network.of(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))).generators == {}


def test_a_copy_shares_the_parameters_and_not_the_buffers() -> None:
    module = Net()
    other = Network.of(module).copy().module
    assert other.linear.weight is module.linear.weight
    assert other.norm.running_mean is not module.norm.running_mean


def test_a_module_that_cannot_be_copied_is_returned_itself() -> None:
    module = Net()
    module.lock = threading.Lock()
    assert Network.of(module).copy().module is module


def test_a_module_whose_copy_would_run_parts_of_the_original_is_returned_itself() -> None:
    module = Net()
    module.forward = lambda x: module.linear(x)
    assert Network.of(module).copy().module is module
