"""A witness of randomness: runs a module and reports every place that drew a random number, and
with which rate.

Torch marks the operators that may draw (`nondeterministic_seeded`); whether one did is seen from
the generator's state before and after. NumPy's and Python's generators, the global ones and those
that hang on the module, are watched at every module's entry and exit. Nothing here sees the
operating system's randomness, a clock or a counter: repeating the forward may, which the rule
eager-randomness does.

Knows neither ONNX nor files.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from evalmode.export.module.dropouts import declared_rate
from evalmode.export.module.forward import copies_of, plain_forward
from evalmode.export.module.lines import is_models
from evalmode.export.module.network import Generator, Network

# An operator that is not marked as one that may draw (anyone can register one) is seen by this
# alone.
_TORCHS = "torch's generator, by an operator that does not say that it draws"


class Unwatched(Exception):  # noqa: N818 - read as a sentence: "raise Unwatched"
    """A forward that runs what cannot be watched (`torch.cond`: the branch not taken); the message
    names the place.
    """


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One place that drew: the innermost module's path and class, the operator, the rate if one was
    given, the line.
    """

    path: str
    kind: str
    operator: str
    p: float | None
    line: str

    @property
    def by_host(self) -> bool:
        """Whether Python's or NumPy's generator drew, or an operator that does not say so."""
        return "generator" in self.operator

    def __str__(self) -> str:
        rate = "" if self.p is None else f", p={self.p:g}"
        return f"{self.path or '(root)'} ({self.kind}{rate}): {self.operator} at {self.line}"


def watch(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[object, tuple[Draw, ...]]:
    """What one forward of `module` answers, and every place that draws a random number in it, in
    order, each once.

    Raises Unwatched, and whatever the forward raises.
    """
    witness = _Witness(Network.of(module))  # anew for each forward: one may make parts of its own
    try:
        with plain_forward(), witness.watching():
            answer = module(**copies_of(inputs))
    except Unwatched:
        # else the compiler, which was left half-way, fails for every later forward
        torch._dynamo.reset()
        raise
    return answer, tuple(dict.fromkeys(witness.seen))


def draws(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Draw, ...]:
    """Every place that draws a random number in one forward of `module`. Raises as `watch` does."""
    return watch(module, inputs)[1]


class _Witness:
    def __init__(self, network: Network) -> None:
        self.seen: list[Draw] = []
        self.call: tuple[str, float | None] | None = None
        self._paths = {id(part): path for path, part in network.parts.items()}
        self._stack: list[nn.Module] = [network.module]
        self._generators = network.generators
        self._host = self._host_states()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_Calls(self))
            stack.enter_context(_Operators(self))
            yield
            self._look_at_host()

    def saw(self, operator: str) -> None:
        """Keep where `operator`, which drew, was called; what it did to torch's generators is then
        explained.
        """
        self.seen.append(self.here(operator))
        self._host[_TORCHS] = _torchs_states()

    def here(self, operator: str) -> Draw:
        """The place that is running now."""
        name, p = self.call or ("", None)
        module = self._stack[-1]
        rate = p if p is not None else declared_rate(module)
        path = self._paths[id(module)] if id(module) in self._paths else self._unregistered()
        label = f"{name} ({operator})" if name else operator
        return Draw(path=path, kind=type(module).__name__, operator=label, p=rate, line=_line())

    def _enter(self, module: nn.Module, _inputs: object) -> None:
        self._look_at_host()
        self._stack.append(module)

    def _leave(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._look_at_host()
        self._stack.pop()

    def _unregistered(self) -> str:
        """The name of a module that no attribute leads to: below which known one it was called."""
        known = next(part for part in reversed(self._stack) if id(part) in self._paths)
        return f"{self._paths[id(known)] or '(root)'} > unregistered"

    def _look_at_host(self) -> None:
        states = self._host_states()
        for name, now in states.items():
            if self._host[name] != now:
                self.saw(name)
        self._host = states

    def _host_states(self) -> dict[str, object]:
        states: dict[str, object] = {
            _TORCHS: _torchs_states(),
            "random's global generator": random.getstate(),
            "numpy.random's global generator": _plain(np.random.get_state(legacy=False)),
        }
        return states | {
            f"the generator {path}": _state_of(found) for path, found in self._generators.items()
        }


class _Calls(TorchFunctionMode):
    """Notes the Python-level function, and the rate it was called with, around the operators that
    it dispatches.
    """

    def __init__(self, witness: _Witness) -> None:
        super().__init__()
        self._witness = witness

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        outer = self._witness.call
        self._witness.call = (
            getattr(func, "__name__", str(func)),
            _given_rate(func, args, kwargs or {}),
        )
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._witness.call = outer


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    # Without it torch refuses such an operator too, in a sentence for its own developers.
    supports_higher_order_operators = True

    def __init__(self, witness: _Witness) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._witness = witness

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise Unwatched(str(self._witness.here(str(func))))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)),
            None,
        )
        state = _device_states if generator is None else lambda: [generator.get_state()]
        before = state()
        result = func(*args, **kwargs)
        if any(not torch.equal(then, now) for then, now in zip(before, state(), strict=True)):
            self._witness.saw(str(func))
        return result


def _torchs_states() -> list[bytes]:
    return [state.numpy(force=True).tobytes() for state in _device_states()]


def _device_states() -> list[Tensor]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *on_gpu]


def _state_of(generator: Generator) -> object:
    if isinstance(generator, random.Random):
        # SystemRandom is one too, and has no state to compare.
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _plain(state: object) -> object:
    """NumPy's state as values that == compares: its arrays as bytes."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _given_rate(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float | None:
    """The drop probability among a call's arguments; None where it has none or its signature cannot
    be read.
    """
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
    except (ValueError, TypeError):
        # Built-in functions have no signature: keywords are all there is.
        given = kwargs
    rate = given.get("p", given.get("dropout_p"))
    return float(rate) if isinstance(rate, int | float) else None


def _line() -> str:
    """The innermost line of the model's own code."""
    frame = sys._getframe(1)
    while frame.f_back and not is_models(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
