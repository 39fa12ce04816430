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

GLOBAL_GENERATOR = random.Random(0)


class HasValue(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x


class PlainObject:
    def __init__(self, inside: object) -> None:
        self.inside = inside

    def call(self) -> None: ...


class LazyLibrary(types.ModuleType):
    """A lazy module, with which large libraries replace themselves in `sys.modules`."""


def closure_over(value: object) -> object:
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


class HidesModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(1, 1)
        self.listed = [nn.Dropout(0.1), (nn.Dropout(0.2),)]
        self.keyed = {"head": nn.Dropout(0.3)}
        self.itself = self.child


def test_modules_in_containers_are_named_by_the_expression_that_reaches_them() -> None:
    assert set(Network.of(HidesModules()).parts) == {
        "",
        "child",
        "listed[0]",
        "listed[1][0]",
        "keyed['head']",
    }


def test_a_module_that_two_names_share_is_found_once() -> None:
    assert "itself" not in Network.of(HidesModules()).parts


def test_hidden_modules_are_found_at_any_depth() -> None:
    assert "0.listed[0]" in Network.of(nn.Sequential(HidesModules())).parts


def test_a_container_that_holds_itself_is_walked_once() -> None:
    module = HidesModules()
    module.listed.append(module.listed)  # type: ignore[arg-type]
    assert "listed[0]" in Network.of(module).parts


@pytest.mark.parametrize(
    ("wrapped", "path"),
    [
        (lambda part: {part}, "value[0]"),
        (lambda part: frozenset({part}), "value[0]"),
        (lambda part: deque([part]), "value[0]"),
        (lambda part: functools.partial(part), "value.func"),
        (lambda part: functools.partial(print, part), "value.args[0]"),
        (lambda part: functools.partial(print, end=part), "value.keywords['end']"),
        (closure_over, "value.<value>"),
        (lambda part: part.extra_repr, "value.__self__"),
        (PlainObject, "value.inside"),
        (lambda part: PlainObject([part]).call, "value.__self__.inside[0]"),
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
def test_a_module_is_found_through_any_kind_of_attribute(
    wrapped: Callable[[object], object], path: str
) -> None:
    part = nn.Dropout(0.1)
    parts = Network.of(HasValue(wrapped(part))).parts
    assert parts[path] is part
    assert set(parts) == {"", path}


def test_an_attribute_with_an_underscore_is_walked_too() -> None:
    module = HasValue(None)
    module._drops = [nn.Dropout(0.1)]
    assert set(Network.of(module).parts) == {"", "_drops[0]"}


def test_a_child_is_not_found_a_second_time_in_the_registries_of_torch() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].register_buffer("table", torch.ones(1))
    module.register_forward_hook(nn.Dropout(0.1))  # type: ignore[arg-type]
    assert set(Network.of(module).parts) == {"", "0"}


def test_a_closure_whose_variable_is_not_bound_yet_is_skipped() -> None:
    assert set(Network.of(HasValue(empty_closure())).parts) == {""}


def test_the_objects_of_libraries_are_not_walked() -> None:
    library = LazyLibrary("library")
    library.drop = nn.Dropout(0.1)
    assert set(
        Network.of(HasValue([torch.ones(1), np.ones(1), nn.Dropout, torch, library])).parts
    ) == {""}


def test_generators_are_found_in_attributes_and_in_the_globals_of_a_forward() -> None:
    value = {
        "a": random.Random(0),
        "b": (np.random.default_rng(0),),
        "c": PlainObject(np.random.RandomState(0)),
    }
    generators = Network.of(nn.Sequential(HasValue(value))).generators
    assert set(generators) == {
        "0.value['a']",
        "0.value['b'][0]",
        "0.value['c'].inside",
        "global GLOBAL_GENERATOR",
    }
    assert generators["global GLOBAL_GENERATOR"] is GLOBAL_GENERATOR
    assert generators["0.value['a']"] is value["a"]


def test_a_network_without_a_generator_has_none() -> None:
    assert Network.of(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))).generators == {}


def test_a_copy_shares_the_parameters_and_not_the_buffers() -> None:
    module = Net()
    copy = Network.of(module).copy().module
    assert copy.linear.weight is module.linear.weight
    assert copy.norm.running_mean is not module.norm.running_mean


def test_a_module_that_cannot_be_copied_is_returned_as_it_is() -> None:
    module = Net()
    module.lock = threading.Lock()
    assert Network.of(module).copy().module is module


def test_a_module_whose_copy_would_run_parts_of_the_original_is_returned_as_it_is() -> None:
    module = Net()
    module.forward = lambda x: module.linear(x)
    assert Network.of(module).copy().module is module
