"""A user's module becomes a bundle: every rule checks it, and an export in another process is
compared.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.session import open_session
from evalmode.bundle.store import open_bundle
from evalmode.export.from_module import release_module
from evalmode.export.release import ExportRefused, Released
from evalmode.export.verify.verify import verify

NET = '''
import functools
import random
import numpy as np
import torch
from torch import nn

MADE_AT_IMPORT = torch.from_numpy(np.random.rand(4).astype("float32"))

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.plain = torch.rand(4)
        self.register_buffer("kept", torch.rand(4))

    def forward(self, x, y):
        out = self.drop(self.linear(x)) + y
        if self.kind == "import":
            out = out * MADE_AT_IMPORT
        if self.kind == "attribute":
            out = out * self.plain
        if self.kind == "buffer":
            out = out * self.kept
        return {"sum": out, "pair": (out.mean(-1), out > 0)}

class Hidden(nn.Module):
    """Parameters that no state_dict holds, and a buffer that none saves."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4).eval()]
        self.register_buffer("kept", torch.rand(4), persistent=False)

    def forward(self, x): return self.layers[0](x) * self.kept

class Table(nn.Module):
    """A table of positions that the first call makes, and keeps in one place or another."""

    shared = None

    def __init__(self, place):
        super().__init__()
        self.place, self.table, self.linear = place, None, nn.Linear(4, 4)

    def forward(self, x):
        if self.place == "class":
            if Table.shared is None:
                Table.shared = angles(16)
            table = Table.shared
        elif self.place == "cache":
            table = cached(16)
        elif self.place == "buffer":
            if not hasattr(self, "angles"):
                self.register_buffer("angles", angles(16), persistent=False)
            table = self.angles
        elif self.place == "grows":
            if self.table is None or len(self.table) < x.shape[1]:
                self.table = angles(x.shape[1])
            table = self.table
        else:
            if self.table is None:
                self.table = angles(16)
            table = self.table
        return self.linear(x + table[: x.shape[1]])

def angles(count): return (torch.arange(count)[:, None] / 10.0 ** torch.arange(4)).sin()
cached = functools.lru_cache(angles)

class Drawn(nn.Module):
    """A mask that was drawn in one way or another when the network was made."""

    shared = None

    def __init__(self, draw, place):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        mask = torch.as_tensor(draw()) > 0.3
        if place == "class":
            Drawn.shared = mask
        self.masks = {"list": [mask], "closure": lambda: mask}.get(place, mask)

    def forward(self, x):
        masks = Drawn.shared if Drawn.shared is not None else self.masks
        if callable(masks) and not torch.is_tensor(masks):
            masks = masks()
        return self.linear(x * (masks[0] if isinstance(masks, list) else masks))

def seeded(draw, place):
    torch.manual_seed(0)
    np.random.seed(0)
    return Drawn(draw, place)

def torch_in_list(): return seeded(lambda: torch.rand(4), "list")
def numpy_in_closure(): return seeded(lambda: np.random.rand(4), "closure")
def generator_on_class():
    generator = torch.Generator().manual_seed(1)
    return seeded(lambda: torch.rand(4, generator=generator), "class")
def numpy_generator(): return seeded(lambda: np.random.default_rng(3).random(4), "")
def python_generator(): return seeded(lambda: [random.Random(3).random() for _ in range(4)], "")
def hidden():
    torch.manual_seed(0)
    return Hidden()
def table_kept(): return Table("")
def table_of_class(): return Table("class")
def table_in_cache(): return Table("cache")
def table_in_buffer(): return Table("buffer")
def table_that_grows(): return Table("grows")
def sequences(): return [torch.randn(3, 5, 4), torch.randn(2, 7, 4)]

def clean(): return Net("")
def buffer(): return Net("buffer")
def at_import(): return Net("import")
def attribute(): return Net("attribute")
def other_each_time():
    count = random.SystemRandom().randrange(1, 10**3)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)])

def inputs(): return {"x": torch.randn(3, 4), "y": torch.zeros(3, 1)}
def one(): return torch.randn(3, 4)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"owned_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


def release(factory: str, inputs: str, root: Path) -> Released:
    return release_module(
        factory, inputs, root=root, name="theirs", version="1", progress=lambda step: None
    )


def refusal_of(factory: str, inputs: str, root: Path) -> ExportRefused:
    with pytest.raises(ExportRefused) as caught:
        release(factory, inputs, root)
    assert list(root.iterdir()) == []
    return caught.value


def baked_noise_record(error: ExportRefused) -> Record:
    (record,) = [
        record for record in error.records if record.verdict is not Verdict.PASS and record.findings
    ]
    assert record.rule == "baked-noise"
    return record


def test_several_inputs_and_outputs_become_a_bundle_that_opens_verifies_and_answers(
    project: str, tmp_path: Path
) -> None:
    result = release(f"{project}:clean", f"{project}:inputs", tmp_path / "bundles")
    bundle = open_bundle(result.path)
    assert [(item.name, item.shape) for item in bundle.manifest.inputs] == [
        ("x", (-1, 4)),
        ("y", (-1, 1)),
    ]
    assert [item.name for item in bundle.manifest.outputs] == ["sum", "pair_0", "pair_1"]
    assert bundle.manifest.frontend is None
    assert bundle.manifest.provenance["module"] == f"{project}:clean"
    assert len(bundle.known_answers()) == 8
    assert verify(result.path).verdict is Verdict.PASS
    answer = open_session(bundle.model).run(
        {"x": np.ones((5, 4), np.float32), "y": np.zeros((5, 1), np.float32)}
    )
    assert answer["sum"].shape == (5, 4)


def test_a_random_buffer_passes(project: str, tmp_path: Path) -> None:
    assert (
        release(f"{project}:buffer", f"{project}:inputs", tmp_path / "bundles").certificate.verdict
        is Verdict.PASS
    )


@pytest.mark.parametrize("factory", ["at_import", "attribute"])
def test_a_random_constant_that_is_no_buffer_is_refused_by_name(
    project: str, tmp_path: Path, factory: str
) -> None:
    record = baked_noise_record(
        refusal_of(f"{project}:{factory}", f"{project}:inputs", tmp_path / "bundles")
    )
    assert record.verdict is Verdict.FAIL
    assert "its values differ in another export, under other seeds" in str(record.findings[0])


def test_a_factory_whose_networks_differ_is_unproven(project: str, tmp_path: Path) -> None:
    record = baked_noise_record(
        refusal_of(f"{project}:other_each_time", f"{project}:one", tmp_path / "bundles")
    )
    assert record.verdict is Verdict.UNPROVEN
    assert "a second export could not be compared: " in str(record.findings[0])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_hugging_face_networks_are_exported_without_any_option(name: str, tmp_path: Path) -> None:
    here = "tests.export.hugging_face"
    result = release(f"{here}:{name}", f"{here}:inputs", tmp_path / "bundles")
    assert result.certificate.verdict is Verdict.PASS
    bundle = open_bundle(result.path)
    assert [item.shape for item in bundle.manifest.inputs] == [(-1, -1), (-1, -1)]
    assert [item.name for item in bundle.manifest.outputs] == ["logits"]
    left_out = {"bert": [], "gpt2": ["past_key_values (DynamicCache)"]}
    assert bundle.manifest.provenance["left out"] == left_out[name]


def test_a_refusal_leaves_no_process(project: str, tmp_path: Path) -> None:
    source = (tmp_path / f"{project}.py").read_text()
    (tmp_path / f"{project}.py").write_text(
        source.replace("self.drop(self.linear(x))", "self.linear(x) * torch.rand(1)")
    )
    refusal_of(f"{project}:clean", f"{project}:inputs", tmp_path / "bundles")
    running = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert f"{project}:clean" not in running


@pytest.mark.parametrize(
    "factory",
    [
        "torch_in_list",
        "numpy_in_closure",
        "generator_on_class",
        "numpy_generator",
        "python_generator",
    ],
)
def test_a_random_constant_is_found_even_if_the_factory_sets_a_seed(
    project: str, tmp_path: Path, factory: str
) -> None:
    error = refusal_of(f"{project}:{factory}", f"{project}:one", tmp_path / "out")
    record = next(record for record in error.records if record.rule == "baked-noise")
    assert record.verdict is Verdict.FAIL
    assert "its values differ in another export, under other seeds" in str(record.findings[0])


def test_hidden_parameters_and_unsaved_buffers_are_weights(project: str, tmp_path: Path) -> None:
    release(f"{project}:hidden", f"{project}:one", tmp_path / "out")


@pytest.mark.parametrize(
    "factory",
    ["table_kept", "table_of_class", "table_in_cache", "table_in_buffer", "table_that_grows"],
)
def test_a_table_that_the_first_call_computes_is_no_noise(
    project: str, tmp_path: Path, factory: str
) -> None:
    release(f"{project}:{factory}", f"{project}:sequences", tmp_path / "out")
