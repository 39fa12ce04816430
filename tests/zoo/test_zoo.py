"""Architectures of all families are certified or refused as they deserve, and each certificate is
confirmed without the rules that gave it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evalmode.errors import EvalmodeError
from evalmode.export.from_module import release_module
from tests.zoo.confirm import confirm
from tests.zoo.entries import ENTRIES, table
from tests.zoo.entry import Entry

_PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
_SEED = 7


def _parameters() -> list[object]:
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.everyday else pytest.mark.zoo)
        for entry in ENTRIES
    ]


@pytest.mark.filterwarnings(
    # What torch says of the way that its own encoder takes in use.
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"
)
@pytest.mark.parametrize("entry", _parameters())
def test_a_network_gets_the_verdict_that_it_deserves(
    entry: Entry, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("zoo", entry.name)
    record_property("family", entry.family)
    model, refusal = release(entry, tmp_path)
    record_property("reason", refusal)
    if model is None:
        right = entry.refused is not None and entry.refused in refusal
        record_property("verdict", "refused" if right else "REFUSED WRONGLY")
        assert right, refusal
        return
    record_property("verdict", "CERTIFIED WRONGLY")  # until it is confirmed
    assert entry.refused is None, "a certificate was given"
    seed()
    difference = confirm(entry, entry.build().eval(), model)
    record_property("verdict", "certified")
    record_property("reason", f"differs by at most {difference:.1e} deviations")


def release(entry: Entry, folder: Path) -> tuple[Path | None, str]:
    """The graph in the bundle that the entry is released as, or None and why it is refused."""
    seed()
    try:
        released = release_module(
            f"{entry.reference}.build",
            f"{entry.reference}.inputs",
            root=folder,
            name="zoo",
            version="1",
            progress=lambda step: None,
        )
    except EvalmodeError as error:
        return None, str(error)
    return released.path / "model.onnx", ""


def seed() -> None:
    """Seed all generators, so that a factory that draws its weights returns the same ones again."""
    torch.manual_seed(_SEED)
    np.random.seed(_SEED)
    random.seed(_SEED)


def test_the_zoo_has_each_name_once_and_eight_entries_for_every_day() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert sum(entry.everyday for entry in ENTRIES) == 8


def test_the_page_has_the_table_of_the_entries() -> None:
    assert "\n".join(table()) in _PAGE.read_text()
