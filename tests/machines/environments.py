"""The environments that `make machines` makes, each for one kind of machine.

An environment is a folder in build/machines. It has another ONNX Runtime than the environment of
the suite, or one for another processor.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINES = ROOT / "build" / "machines"

# SwiftShader, a Vulkan driver that computes on the CPU; it comes with Debian's Chromium.
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")


@dataclass(frozen=True, kw_only=True)
class ProviderEnvironment:
    """An environment with an execution provider of its own.

    `requirements` are files outside the environment, each with the command that installs it.
    """

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    requirements: dict[Path, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return MACHINES / self.name / "bin" / "python"

    def require(self) -> None:
        """Skip the test if anything is missing here."""
        for file, command in self.requirements.items():
            if not file.is_file():
                pytest.skip(f"{file} is missing: `{command}` installs it")
        if not self.python.is_file():
            pytest.skip(f"{self.python.parents[1]} is missing: `make machines` makes it")


PROVIDERS = (
    ProviderEnvironment(name="openvino"),
    ProviderEnvironment(
        name="webgpu",
        variables={
            # The Vulkan loader reads the second name before its version 1.3.207.
            "VK_DRIVER_FILES": str(SWIFTSHADER),
            "VK_ICD_FILENAMES": str(SWIFTSHADER),
            # Without it the plugin offers devices of real GPUs only.
            "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
        },
        requirements={SWIFTSHADER: "apt-get install chromium libvulkan1"},
    ),
)


def x86_command(processor: str, python: str) -> list[str]:
    """How this machine's Python runs on another x86 processor, by QEMU's name of it."""
    if platform.machine() != "x86_64":
        pytest.skip("only an x86-64 machine has a Python for x86-64 processors")
    return [_emulator("qemu-x86_64-static"), "-cpu", processor, python]


def aarch64_command() -> list[str]:
    """How the Python of the aarch64 environment runs."""
    emulator = _emulator("qemu-aarch64-static")
    folder = MACHINES / "aarch64"
    pythons = [*(folder / "system" / "usr" / "bin").glob("python3.[0-9]*")]
    # Without the stamp the folder is not complete. Without Debian's apt-get it has no Python.
    if not pythons or not (folder / "ready").is_file():
        pytest.skip(f"{folder} is missing: `make machines` makes it on Debian")
    # Files that the system folder has are read from there in place of this machine's.
    command = [emulator, "-L", str(folder / "system"), "-E", f"PYTHONHOME={folder}/system/usr"]
    return [*command, "-E", f"PYTHONPATH={ROOT}:{folder}/packages", str(pythons[0])]


def _emulator(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: `apt-get install qemu-user-static` installs it")
    return path
