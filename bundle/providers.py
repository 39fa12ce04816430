"""ONNX Runtime's execution providers: their names, and which of them are installed.

A provider is part of the installed ONNX Runtime, or it is a plugin. A plugin is a Python package
`onnxruntime_ep_NAME` beside ONNX Runtime, with the functions `get_library_path()` and
`get_ep_name()`. OpenVINO and WebGPU are such plugins.
"""

from __future__ import annotations

import os
import pkgutil
import threading
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from evalmode.bundle.errors import ProviderUnavailable

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# Short names. Any other provider has the name that ONNX Runtime gives it.
_NAMES = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_SHORT_NAMES = {name: short for short, name in _NAMES.items()}

# TF32 keeps 11 of the 24 bits of a float32. It is the default of CUDA's matrix products, whose
# answers then miss the tolerance of the certificate.
_OPTIONS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}}

# The builds of ONNX Runtime. Each is a distribution of the same files, and overwrites the others'.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")

_PLUGIN_PREFIX = "onnxruntime_ep_"

# A process may register the library of a plugin once.
_registered: set[str] = set()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The provider of a session.

    Attributes:
        name: ONNX Runtime's name of it.
        providers: the argument `providers` of an InferenceSession.
        plugin: the package and the version of a plugin; empty for a provider inside ONNX Runtime.
    """

    name: str
    providers: list[tuple[str, dict[str, str]]] | None
    plugin: str = ""


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime. Raises ProviderUnavailable if none or several builds of it are installed."""
    # ONNX Runtime otherwise writes a device id under the home directory.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    installed = []
    for name in _DISTRIBUTIONS:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        installed.append(name)
    if len(installed) > 1:
        raise ProviderUnavailable(
            f"{' and '.join(installed)} are both installed and overwrite one another's files:"
            f" `pip uninstall {' '.join(installed)}`, then install evalmode[cpu] or evalmode[gpu]"
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


def available_providers() -> list[str]:
    """ONNX Runtime's names of all providers that are installed and have a device here.

    Raises ProviderUnavailable if ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    names = list(ort.get_available_providers())
    for plugin in _plugins():
        name = plugin.get_ep_name()
        if name not in names and _devices(ort, plugin):
            names.append(name)
    return names


def choose_provider(options: Any, provider: str) -> Choice:
    """Let a session with these SessionOptions run on a provider.

    `provider` is a short name (cpu, cuda, tensorrt, openvino, webgpu) or ONNX Runtime's. Raises
    ProviderUnavailable, which lists the providers that are installed.
    """
    ort = import_onnxruntime()
    name = _NAMES.get(provider.lower(), provider)
    built_in: list[str] = ort.get_available_providers()
    is_plugin = False
    if name != CPU:
        # Plugins first: ONNX Runtime 1.31 lists a registered plugin among its own providers, and
        # would then ignore it.
        for plugin in _plugins():
            if plugin.get_ep_name() == name:
                is_plugin = True
                devices = _devices(ort, plugin)
                if devices:
                    options.add_provider_for_devices(devices[:1], _OPTIONS.get(name, {}))
                    # The options of the session name the provider, so its argument must not.
                    return Choice(name=name, providers=None, plugin=_description(plugin))
    if name in built_in:
        if name == CUDA and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # the CUDA and cuDNN libraries that pip installed
        return Choice(name=name, providers=[(name, _OPTIONS.get(name, {}))])

    why = "is not available here"
    if is_plugin:
        why = "is installed as a plugin and finds no device here"
    names = [_SHORT_NAMES.get(other, other) for other in available_providers()]
    raise ProviderUnavailable(
        f"provider {provider!r} {why}; this ONNX Runtime offers: {', '.join(names)}"
    )


def _plugins() -> list[ModuleType]:
    """The plugins that are installed, as modules."""
    names = [module.name for module in pkgutil.iter_modules()]
    return [import_module(name) for name in sorted(names) if name.startswith(_PLUGIN_PREFIX)]


def _description(plugin: ModuleType) -> str:
    return f"{plugin.__name__} {metadata.version(plugin.__name__)}"


def _devices(ort: ModuleType, plugin: ModuleType) -> list[Any]:
    """The devices that a plugin can use here; none if its library cannot be loaded."""
    with _lock:
        if plugin.__name__ not in _registered:
            try:
                ort.register_execution_provider_library(plugin.__name__, plugin.get_library_path())
            except Exception:  # ONNX Runtime's exceptions share no base class
                return []
            _registered.add(plugin.__name__)
    name = plugin.get_ep_name()
    return [device for device in ort.get_ep_devices() if device.ep_name == name]
