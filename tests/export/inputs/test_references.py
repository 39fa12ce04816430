"""The user's code: an error in it is one sentence with the line that raised it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from evalmode.export.inputs.references import (
    UserCodeFailed,
    is_reference,
    load_module,
    load_reference,
    load_samples,
)

SOURCE = """
import torch
from torch import nn

READY = nn.Linear(2, 2)
NUMBER = 3
SAMPLE = {"input": torch.ones(1, 2)}

class Holder:
    built = staticmethod(lambda: nn.Linear(4, 4))

def build():
    return nn.Linear(2, 3)

def build_wrong():
    return {"not": "a module"}

def build_failing():
    return nn.Linear(2, READY.no_such_thing)

def leaves():
    raise SystemExit(3)

def samples():
    return [torch.ones(1, 2), torch.ones(2, 2)]

def none():
    return []

def chatty():
    print("hello from the factory")
    return nn.Linear(2, 2)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"users_{tmp_path.name.replace('-', '_')}"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text(SOURCE)
    (package / "broken.py").write_text("import torch\nimport no_such_package_anywhere\n")
    (package / "syntax.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    for module in [path for path in sys.modules if path.startswith(name)]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("attribute", "shape"),
    [("build", (3, 2)), ("READY", (2, 2)), ("Holder.built", (4, 4))],
    ids=str,
)
def test_a_module_is_the_result_of_a_factory_or_the_object_itself(
    project: str, attribute: str, shape: object
) -> None:
    module = load_module(f"{project}.net:{attribute}")
    assert isinstance(module, nn.Linear)
    assert tuple(module.weight.shape) == shape
    assert module.training, "load_module never calls eval()"


def test_samples_are_one_or_several(project: str) -> None:
    assert [tuple(sample.shape) for sample in load_samples(f"{project}.net:samples")] == [
        (1, 2),
        (2, 2),
    ]
    (sample,) = load_samples(f"{project}.net:SAMPLE")
    assert torch.equal(sample["input"], torch.ones(1, 2))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("net", r"'.*\.net' must have the form package.module:attribute"),
        ("net:", "must have the form package.module:attribute"),
        ("net:absent", "net:absent cannot be imported: AttributeError: .*'absent'"),
        (
            "absent:build",
            r"absent:build cannot be imported: ModuleNotFoundError: No module named '.*absent'",
        ),
        (
            "broken:build",
            r"ModuleNotFoundError: No module named 'no_such_package_anywhere' \(at broken.py:2\)",
        ),
        ("syntax:build", "SyntaxError"),
        ("net:NUMBER", "must be a function that returns an nn.Module, got builtins.int"),
        ("net:build_wrong", r"build_wrong\(\) must return an nn.Module, it returned builtins.dict"),
        ("net:build_failing", r"build_failing\(\) failed: AttributeError: .* \(at net.py:19\)"),
        ("net:leaves", r"leaves\(\) failed: SystemExit: 3 \(at net.py:22\)"),
    ],
)
def test_an_error_is_one_sentence_with_the_line_of_the_user(
    project: str, reference: str, message: str
) -> None:
    with pytest.raises(UserCodeFailed, match=message) as caught:
        load_module(f"{project}.{reference}")
    assert "\n" not in str(caught.value)


def test_an_empty_list_of_samples_is_refused_in_one_sentence(project: str) -> None:
    with pytest.raises(UserCodeFailed, match="must hold at least one sample"):
        load_samples(f"{project}.net:none")


def test_a_path_is_no_reference(tmp_path: Path) -> None:
    odd = tmp_path / "runs:1"
    odd.mkdir()
    assert not is_reference(str(odd))
    assert not is_reference("runs/languages")
    assert is_reference("package.module:factory")


def test_the_folder_of_the_user_is_first_on_the_path(project: str) -> None:
    load_reference(f"{project}.net:build")
    assert sys.path[0] == str(Path.cwd())


def test_a_factory_prints_to_stderr(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_module(f"{project}.net:chatty")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "hello from the factory\n")
