"""The architecture, as tests: the direction of imports, names of files, what is loaded when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("bundle", "model", "export", "service")
SOURCES = sorted(
    file
    for room in (*ROOMS, "evalmode", "tests", "bench")
    for file in (ROOT / room).glob("**/*.py")
)
NOWHERE = {"utils", "util", "common", "helpers", "core", "misc"}


def loaded_after(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(found.stdout.splitlines()[-1].split())


def test_imports_go_the_way_the_contracts_say() -> None:
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_one_door(room: str) -> None:
    door = ROOT / "evalmode" / room
    assert door.is_symlink()
    assert door.resolve() == ROOT / room


def test_no_room_is_a_junk_drawer() -> None:
    assert not [file for file in SOURCES if NOWHERE & {file.stem, file.parent.name}]


def test_every_file_of_the_rooms_says_what_it_is_for() -> None:
    in_rooms = [file for file in SOURCES if file.relative_to(ROOT).parts[0] in (*ROOMS, "evalmode")]
    assert not [str(file) for file in in_rooms if not file.read_text().startswith('"""')]


def test_the_service_loads_neither_torch_nor_onnx() -> None:
    loaded = loaded_after("import evalmode.service.process.server, evalmode.service.app")
    assert not loaded & {"torch", "onnx", "lightning", "pyarrow"}


def test_the_service_loads_no_library_that_it_does_not_use() -> None:
    loaded = loaded_after("import evalmode.service.process.server, evalmode.service.app")
    assert not loaded & {"rich", "pygments", "tokenizers", "onnxruntime"}


def test_a_server_can_start_the_trial_of_a_bundle_before_its_large_libraries_are_loaded() -> None:
    loaded = loaded_after("import evalmode.service.models.trial")
    assert not loaded & {"numpy", "pydantic", "fastapi", "structlog"}
    loaded = loaded_after("import evalmode.service.process.server")
    assert not loaded & {"numpy", "fastapi", "uvicorn", "prometheus_client"}


def test_the_process_of_a_trial_loads_nothing_of_the_web() -> None:
    loaded = loaded_after("import evalmode.service.models.trial_process")
    assert not loaded & {"asyncio", "fastapi", "starlette", "uvicorn", "structlog", "tokenizers"}


def test_an_audit_loads_neither_onnx_nor_its_runtime() -> None:
    loaded = loaded_after("import evalmode.export.audit.audit, evalmode.export.inputs.samples")
    assert not loaded & {"onnx", "onnxscript", "onnxruntime"}


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after("import evalmode.cli")
    assert not loaded & {
        "torch",
        "onnx",
        "onnxruntime",
        "numpy",
        "fastapi",
        "pydantic",
        "lightning",
    }
