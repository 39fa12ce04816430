"""Watch a forward and report every place that draws a random number, with its rate.

torch marks operators that may draw (`nondeterministic_seeded`). Whether one did is seen from the
state of its generator before and after. The generators of Python and NumPy, the global ones and
those that the module holds, are compared whenever a module is entered or left.

Not seen: the operating system's randomness, a clock, a counter. The rule eager-randomness finds
those by repeating the forward.
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
from evalmode.export.module.network import Network

# torch's generators are compared under this name, like those of Python and NumPy. An operator of
# another library may lack the tag that says that it draws. Only this comparison shows its draws.
_UNMARKED = "torch's generator, by an operator that does not say that it draws"


class Unwatched(Exception):  # noqa: N818 - read as a sentence: "raise Unwatched"
    """A forward runs code that cannot be watched; the message names the line.

    For example, only one branch of a `torch.cond` runs.
    """


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One site in a forward that drew random numbers.

    path        of the innermost module that was running ("" is the root)
    kind        that module's class
    operator    the function and the operator, or the generator, that drew
    p           the rate: an argument of the call, else the rate that the module declares, else None
    line        the innermost line of the model's code, as `net.py:12`
    """

    path: str
    kind: str
    operator: str
    p: float | None
    line: str

    @property
    def by_host(self) -> bool:
        """Whether a generator of Python or NumPy drew, or an operator that is not marked."""
        return "generator" in self.operator

    def __str__(self) -> str:
        rate = "" if self.p is None else f", p={self.p:g}"
        return f"{self.path or '(root)'} ({self.kind}{rate}): {self.operator} at {self.line}"


def watch(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[object, tuple[Draw, ...]]:
    """Run one forward. Returns the answer and every site that drew, in order, each once.

    Raises Unwatched, and the errors of the forward.
    """
    # The network is walked for each forward, because a forward may make parts.
    watcher = _Watcher(Network.of(module))
    try:
        with plain_forward(), watcher.watching():
            answer = module(**copies_of(inputs))
    except Unwatched:
        # The exception interrupted the compiler, and without a reset every later forward would
        # fail.
        torch._dynamo.reset()
        raise
    return answer, tuple(dict.fromkeys(watcher.draws))


def draws(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Draw, ...]:
    """Every site that draws in one forward, in order, each once. Raises the errors of `watch`.

    >>> layer = nn.Dropout(0.5)
    >>> [draw.p for draw in draws(layer, {"input": torch.ones(2)})]
    [0.5]
    >>> draws(layer.eval(), {"input": torch.ones(2)})
    ()
    """
    return watch(module, inputs)[1]


class _Watcher:
    """The state of one watched forward.

    `call` is the Python function of torch that runs now, and its rate. `_running` are the modules
    whose forwards run now, the innermost last. `_states` are the generators' states as last seen.
    """

    def __init__(self, network: Network) -> None:
        self.draws: list[Draw] = []
        self.call: tuple[str, float | None] | None = None
        self._paths = {id(part): path for path, part in network.parts.items()}
        self._running: list[nn.Module] = [network.module]
        self._generators = network.generators
        self._states = self._current_states()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch everything that runs inside of the block."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_FunctionMode(self))
            stack.enter_context(_OperatorMode(self))
            yield
            self._compare_states()

    def add(self, operator: str) -> None:
        """Record that `operator` drew, at the line that is running now."""
        self.draws.append(self.draw_by(operator))
        # The change of torch's generators is explained: no unmarked operator made it.
        self._states[_UNMARKED] = _torch_states()

    def draw_by(self, operator: str) -> Draw:
        """A draw by `operator`, at the line that is running now."""
        function, rate = self.call or ("", None)
        module = self._running[-1]
        if rate is None:
            rate = declared_rate(module)
        path = self._paths.get(id(module))
        if path is None:
            # No attribute leads to the module: it is named by the module that called it.
            caller = next(part for part in reversed(self._running) if id(part) in self._paths)
            path = f"{self._paths[id(caller)] or '(root)'} > unregistered"
        label = f"{function} ({operator})" if function else operator

        frame = sys._getframe()
        while frame.f_back and not is_models(frame.f_code.co_filename):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return Draw(path=path, kind=type(module).__name__, operator=label, p=rate, line=line)

    # The generators are compared before the stack of modules changes: a draw until then belongs to
    # the module that was running.

    def _enter(self, module: nn.Module, _inputs: object) -> None:
        self._compare_states()
        self._running.append(module)

    def _leave(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._compare_states()
        self._running.pop()

    def _compare_states(self) -> None:
        """Record a draw for each generator whose state changed since the last comparison."""
        states = self._current_states()
        for name, state in states.items():
            if self._states[name] != state:
                self.add(name)
        self._states = states

    def _current_states(self) -> dict[str, object]:
        states: dict[str, object] = {
            _UNMARKED: _torch_states(),
            "random's global generator": random.getstate(),
            "numpy.random's global generator": _comparable(np.random.get_state(legacy=False)),
        }
        for path, generator in self._generators.items():
            # In a form that == compares.
            state: object
            if isinstance(generator, random.SystemRandom):
                state = None  # it has none
            elif isinstance(generator, random.Random):
                state = generator.getstate()
            elif isinstance(generator, np.random.RandomState):
                state = _comparable(generator.get_state(legacy=False))
            else:
                state = _comparable(generator.bit_generator.state)
            states[f"the generator {path}"] = state
        return states


class _FunctionMode(TorchFunctionMode):
    """Stores in the watcher which Python function of torch runs, and with which rate.

    An operator that the function dispatches does not show that name, and not always the rate.
    """

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outer = self._watcher.call
        name = getattr(func, "__name__", str(func))
        self._watcher.call = name, _rate_argument(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._watcher.call = outer


# torch does not annotate the base class.
class _OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compares the state of torch's generators around every operator that may draw."""

    # Otherwise torch refuses a higher-order operator before this mode can name the line.
    supports_higher_order_operators = True

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watcher = watcher

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise Unwatched(str(self._watcher.draw_by(str(func))))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        generators = [value for value in arguments if isinstance(value, torch.Generator)]

        def states() -> list[Tensor]:
            return [generators[0].get_state()] if generators else _device_states()

        before = states()
        result = func(*args, **kwargs)
        pairs = zip(before, states(), strict=True)
        if not all(torch.equal(state, new_state) for state, new_state in pairs):
            self._watcher.add(str(func))
        return result


def _torch_states() -> list[bytes]:
    return [state.numpy(force=True).tobytes() for state in _device_states()]


def _device_states() -> list[Tensor]:
    """The states of torch's global generators, of the CPU and of each GPU in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def _comparable(state: object) -> object:
    """NumPy's state with its arrays as bytes, because == of arrays is an array."""
    if isinstance(state, Mapping):
        return {key: _comparable(value) for key, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _rate_argument(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float | None:
    """The drop probability among a call's arguments, or None."""
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
    except (ValueError, TypeError):
        # Built-in functions have no signature, so only keywords have names.
        arguments = kwargs
    rate = arguments.get("p", arguments.get("dropout_p"))
    return float(rate) if isinstance(rate, int | float) else None
