"""Open a model in ONNX Runtime, with a provider, a number of threads, and deterministic kernels.

The export certifies in such a session and the service answers in one, so both compute the same
bits.
"""

from __future__ import annotations

import platform as machine
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Platform
from evalmode.bundle.datatypes import ELEMENT_TYPES
from evalmode.bundle.errors import BundleCorrupt, InputsRefused, ModelRunFailed, ProviderUnavailable
from evalmode.bundle.manifest import MODEL_FILE, TensorSpec
from evalmode.bundle.providers import choose_provider, import_onnxruntime

# ONNX Runtime's levels of graph optimisation.
Optimisation: TypeAlias = Literal["off", "basic", "extended", "all"]

# The CPU features by which ONNX Runtime's kernels (MLAS) choose their code, and so the order of
# additions. The names are those of /proc/cpuinfo.
# fmt: off
_KERNEL_FEATURES = frozenset({
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq",
    "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd",
    "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
})
# fmt: on

_DATATYPES = {element.onnx: element.datatype for element in ELEMENT_TYPES}

# Words in the message of a node that fails for a reason other than its inputs.
_OTHER_CAUSES = (
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
    """An open model. Several threads may call `run` at once.

    Attributes:
        inputs: the tensors that the model takes.
        outputs: the tensors that it returns.
        provider: ONNX Runtime's name of the execution provider.
        platform: what the bits of its outputs depend on.
    """

    def __init__(
        self, model: bytes | Path, *, provider: str, threads: int, optimisation: Optimisation
    ) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        # Level 4 is fatal errors only: the others arrive as exceptions, and would be printed twice.
        options.log_severity_level = 4
        # Waiting threads would otherwise spin, and use up a container's CPU quota.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = {
            "off": levels.ORT_DISABLE_ALL,
            "basic": levels.ORT_ENABLE_BASIC,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "all": levels.ORT_ENABLE_ALL,
        }[optimisation]
        choice = choose_provider(options, provider)
        self.provider = choice.name
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = ort.InferenceSession(source, options, providers=choice.providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleCorrupt(
                f"{MODEL_FILE} cannot be opened by ONNX Runtime: {error}"
            ) from error
        # ONNX Runtime's Python class would keep the file in memory beside the session (1.31).
        self._session._model_bytes = None
        # Where a provider fails to start, ONNX Runtime prints a line and uses the CPU instead.
        active = self._session.get_providers()[0]
        if active != self.provider:
            raise ProviderUnavailable(
                f"the provider {self.provider} did not start, and ONNX Runtime would use {active}"
            )

        self.inputs = tuple(_spec_of(tensor) for tensor in self._session.get_inputs())
        self.outputs = tuple(_spec_of(tensor) for tensor in self._session.get_outputs())
        self._output_names = [output.name for output in self.outputs]
        self.platform = Platform(
            runtime=f"onnxruntime {ort.__version__} {choice.plugin}".rstrip(),
            provider=self.provider,
            threads=threads,
            architecture=machine.machine(),
            cpu_features=_cpu_features(),
        )

    def run(
        self, inputs: Mapping[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Every output by name, for inputs by name.

        Raises InputsRefused where the inputs cause the failure, and ModelRunFailed for any other.
        """
        try:
            outputs = self._session.run(self._output_names, dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            # An index out of range is an InvalidArgument. Shapes that do not fit together are a
            # plain Fail of a node, and so is a failure of the device or a lack of memory. Only the
            # words of the message differ (ONNX Runtime 1.31).
            is_invalid = type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError)
            failed_in_node = "while running" in str(error)
            has_another_cause = any(word in str(error).lower() for word in _OTHER_CAUSES)
            error_type = ModelRunFailed
            if is_invalid or (failed_in_node and not has_another_cause):
                error_type = InputsRefused
            raise error_type(
                f"ONNX Runtime cannot run the model on these inputs: {error}"
            ) from error
        return dict(zip(self._output_names, outputs, strict=True))


def open_session(
    model: bytes | Path,
    *,
    provider: str = "cpu",
    threads: int = 1,
    optimisation: Optimisation = "all",
) -> Session:
    """Open a model, as bytes or by its path, on one execution provider and never on another.

    `provider` is a short name (cpu, cuda, tensorrt, openvino, webgpu) or ONNX Runtime's.
    `optimisation` is how far ONNX Runtime may rewrite the graph.

    Raises ProviderUnavailable, which lists the providers that are installed, and BundleCorrupt for
    a model that cannot be opened.
    """
    return Session(model, provider=provider, threads=threads, optimisation=optimisation)


def _spec_of(tensor: Any) -> TensorSpec:
    """The spec of one of ONNX Runtime's tensors, whose varying axes are names or None."""
    shape = tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
    datatype = _DATATYPES.get(tensor.type, tensor.type)
    return TensorSpec(name=tensor.name, datatype=datatype, shape=shape)


def _cpu_features() -> tuple[str, ...]:
    """The features of this CPU by which kernels are chosen; the CPU's name on other systems than
    Linux.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return (machine.processor() or "unknown",)
    features: set[str] = set()
    for line in text.splitlines():
        if line.lower().startswith(("flags", "features")):  # x86 and Arm
            features.update(line.split())
    return tuple(sorted(features & _KERNEL_FEATURES))
