"""The one way to open ONNX Runtime: provider, threads, determinism. Export certifies under it,
service serves under it.

Knows neither texts nor HTTP.
"""

from __future__ import annotations

import os
import platform as machine
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Platform
from evalmode.bundle.datatypes import ELEMENT_TYPES
from evalmode.bundle.errors import BundleCorrupt, InputsRefused, ModelRunFailed, ProviderUnavailable
from evalmode.bundle.manifest import MODEL_FILE, TensorSpec

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")

# The CPU features by which ONNX Runtime's kernel library chooses its code, and with it the order of
# additions.
# fmt: off
_KERNEL_FEATURES = frozenset({
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq",
    "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd",
    "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
})
# fmt: on

_DATATYPES = {element.onnx: element.datatype for element in ELEMENT_TYPES}

_NO_FAULT_OF_INPUTS = (
    "memory",
    "bad_alloc",
    "cuda",
    "cudnn",
    "cublas",
    "tensorrt",
    "rocm",
    "not implemented",
)


class Session:
    """An open model. `run` takes and returns tensors by name and may be called from several threads
    at once.
    """

    def __init__(self, model: bytes | Path, *, provider: str, threads: int, optimise: bool) -> None:
        ort = _runtime()
        self.provider = _resolve(provider, ort)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        # Errors reach us as exceptions; the runtime's own lines on stderr help nobody.
        options.log_severity_level = 4
        # Spinning threads burn a container's CPU quota while nothing is asked.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = ort.InferenceSession(source, options, providers=[self.provider])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleCorrupt(
                f"{MODEL_FILE} cannot be opened by ONNX Runtime: {error}"
            ) from error
        # Where a provider fails to start, ONNX Runtime prints a line and runs on the CPU instead.
        active = self._session.get_providers()[0]
        if active != self.provider:
            raise ProviderUnavailable(
                f"{self.provider} was asked for and did not start; ONNX Runtime offers {active}"
            )
        self.inputs = tuple(_tensor(found) for found in self._session.get_inputs())
        self.outputs = tuple(_tensor(found) for found in self._session.get_outputs())
        self._answers = [output.name for output in self.outputs]
        self.platform = Platform(
            runtime=f"onnxruntime {ort.__version__}",
            provider=self.provider,
            threads=threads,
            architecture=machine.machine(),
            cpu_features=_cpu_features(),
        )

    def run(
        self, inputs: Mapping[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Every output by name, for inputs by name.

        Raises ModelRunFailed with the runtime's reason, and InputsRefused where the inputs are to
        blame.
        """
        try:
            return dict(
                zip(self._answers, self._session.run(self._answers, dict(inputs)), strict=True)
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            kind = InputsRefused if _blames_inputs(error) else ModelRunFailed
            raise kind(f"ONNX Runtime cannot run the model on these inputs: {error}") from error


def open_session(
    model: bytes | Path, *, provider: str = "cpu", threads: int = 1, optimise: bool = True
) -> Session:
    """Open a model, given as bytes or as a path, on one execution provider and never on another.

    `provider` is a short name (cpu, cuda, tensorrt) or ONNX Runtime's own. Raises
    ProviderUnavailable, saying which there are, and BundleCorrupt when the model cannot be opened.
    """
    return Session(model, provider=provider, threads=threads, optimise=optimise)


def _runtime() -> ModuleType:
    """The onnxruntime module; its CPU and GPU builds are two distributions of the same files."""
    # it otherwise writes a device id under the home directory
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise ProviderUnavailable(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite one another's files:"
            " `pip uninstall onnxruntime onnxruntime-gpu`, then install evalmode[cpu] or"
            " evalmode[gpu]"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderUnavailable(
            "ONNX Runtime is not installed: `pip install 'evalmode[cpu]'`, or 'evalmode[gpu]' on a"
            " machine with a GPU"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _resolve(provider: str, ort: ModuleType) -> str:
    name = _PROVIDERS.get(provider.lower(), provider)
    available: list[str] = ort.get_available_providers()
    if name not in available:
        short = {full: key for key, full in _PROVIDERS.items()}
        offered = ", ".join(short.get(found, found) for found in available)
        raise ProviderUnavailable(
            f"provider {provider!r} is not available here; this ONNX Runtime offers: {offered}"
        )
    if name == _PROVIDERS["cuda"] and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA and cuDNN libraries that pip installed beside it
    return name


def _blames_inputs(error: Exception) -> bool:
    """Whether a run failed because of what it was given.

    An index out of range is an InvalidArgument, but shapes that do not go together are a mere Fail
    of the node that meets them, like the memory or the device that gives out there; only the words
    tell these apart.
    """
    if type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError):
        return True
    said = str(error)
    return "while running" in said and not any(word in said.lower() for word in _NO_FAULT_OF_INPUTS)


def _tensor(found: object) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in found.shape)  # type: ignore[attr-defined]
    kind = found.type  # type: ignore[attr-defined]
    return TensorSpec(name=found.name, datatype=_DATATYPES.get(kind, kind), shape=shape)  # type: ignore[attr-defined]


def _cpu_features() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return (machine.processor() or "unknown",)
    words = {
        word
        for line in text.splitlines()
        if line.lower().startswith(("flags", "features"))
        for word in line.split()
    }
    return tuple(sorted(words & _KERNEL_FEATURES))
