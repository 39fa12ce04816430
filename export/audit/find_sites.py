"""Finding the possible sites, and capturing the calls that reach them.

A possible site is a module that draws in training, that draws in eval, or that is a dropout by
name. The search has three steps:

1. one forward per sample in eval mode, and one in training mode, to see which modules draw;
2. more training forwards, while layers that are skipped at random hide a module;
3. training forwards that capture the calls of every possible site, at most `MOST_CALLS` each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from evalmode.export.audit.call import Call, CallSignature, read_state
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.module.dropouts import declared_rate, should_drop
from evalmode.export.module.forward import plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.randomness import Draw, Unwatched, draws

Sample = Mapping[str, Tensor]

# The calls of one site that are captured to be judged. Each costs hundreds of forwards of the site.
MOST_CALLS = 8

# The most extra forwards to reach a layer that is skipped at random. At LayerDrop's usual rates
# (0.05 to 0.5) a layer is skipped 17 times in a row less than once in 10^5.
_MORE_FORWARDS = 16
# Between the seeds of these forwards, so that they are not the seeds of further samples: a prime.
_SEED_STEP = 7919


@dataclass(frozen=True)
class CapturedCall:
    """A call of a site: its arguments, with the numbers that the site held just before it.

    `number` counts all calls of the site, from 1.
    """

    arguments: Call
    signature: CallSignature
    number: int


@dataclass(frozen=True, kw_only=True)
class PossibleSite:
    """A module that may be a site, its draws in both modes, and the calls to judge.

    `type` is the module's class and `p` its drop rate. `calls` is empty where no sample reaches the
    module. `call_count` counts its calls in all samples' forwards.

    `uncaptured_new_arguments` counts calls that were not captured although their arguments were
    new: unlike those of all `calls`. `uncaptured_new_state` counts calls that were not captured
    although the module's state was new: it held other numbers. `trains` is the module's training
    flag after the root's `train()`, which a module may refuse.
    """

    path: str
    type: str
    p: float | None
    training_draws: tuple[Draw, ...]
    eval_draws: tuple[Draw, ...]
    calls: tuple[CapturedCall, ...]
    call_count: int
    uncaptured_new_arguments: int
    uncaptured_new_state: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """The possible sites in the order of the modules, and the samples that failed.

    `network` is a copy in eval mode to judge the sites in. `training_flags` are the flags of its
    parts after the root's `train()`, by path. `samples_in_training` and `samples_in_eval` are the
    indices of the samples that ran; the first is empty where no sample ran in eval.
    """

    network: Network
    training_flags: Mapping[str, bool]
    sites: tuple[PossibleSite, ...]
    failures: tuple[str, ...]
    samples_in_training: tuple[int, ...]
    samples_in_eval: tuple[int, ...]


def find_sites(network: Network, samples: Sequence[Sample], *, seed: int) -> Search:
    """Every possible site of a network. The caller restores the network: see `untouched`.

    Raises UnusableInputs where no sample runs in either mode.
    """
    # 1. The modules that draw. Each mode gets a fresh copy: a forward may exchange its module's
    # parts or use up an iterator, and the next step would see another network.
    working_copy = network.copy(parameters=True)
    working_copy.module.eval()
    in_eval = _Forwards()
    in_eval.run_each(working_copy, samples, seed=seed)

    working_copy = network.copy(parameters=True)
    working_copy.module.train()
    training_flags = {path: part.training for path, part in working_copy.parts.items()}
    in_training = _Forwards()
    in_training.run_each(working_copy, samples, seed=seed)

    # 2. The modules inside skipped layers.
    in_training.run_until_reached(working_copy, samples, in_eval.reached, seed=seed)

    ran_nowhere = not in_training.completed and not in_eval.completed
    # A forward that cannot be watched may run all the same: the samples are not to blame.
    watchable = not any(isinstance(error, Unwatched) for error in in_eval.errors)
    if ran_nowhere and watchable:
        reason = _describe(in_eval.errors[0]).strip().partition("\n")[0]
        type_name = type(network.module).__name__
        raise UnusableInputs(f"{type_name} fails on every sample, in eval mode too: {reason}")
    samples_in_training = in_training.completed if in_eval.completed else []

    # A network that cannot be copied ran itself, and may have created or exchanged parts.
    network = Network.of(network.module)
    paths = []
    for path, part in network.parts.items():
        draws_random = path in in_training.draws or path in in_eval.draws
        if draws_random or (should_drop(part) and declared_rate(part) is not None):
            paths.append(path)

    # 3. The calls of the possible sites.
    working_copy = network.copy(parameters=True)
    working_copy.module.train()
    captures = _capture_calls(
        working_copy,
        [samples[index] for index in samples_in_training],
        paths,
        in_training.reached,
        seed=seed,
    )

    network_to_judge = Network.of(network.module).copy(parameters=True)
    network_to_judge.module.eval()
    sites = []
    for path in paths:
        part, capture = network.parts[path], captures[path]
        training_draws = tuple(in_training.draws.get(path, ()))
        eval_draws = tuple(in_eval.draws.get(path, ()))
        # The one rate that the random calls were made with, else the one that the module holds.
        rates = {draw.p for draw in (*training_draws, *eval_draws) if draw.p is not None}
        site = PossibleSite(
            path=path,
            type=type(part).__name__,
            p=rates.pop() if len(rates) == 1 else declared_rate(part),
            training_draws=training_draws,
            eval_draws=eval_draws,
            calls=tuple(capture.calls),
            call_count=capture.call_count,
            uncaptured_new_arguments=capture.uncaptured_new_arguments,
            uncaptured_new_state=capture.uncaptured_new_state,
            trains=training_flags.get(path, True),
        )
        sites.append(site)

    failures = [f"in training mode on a sample: {_describe(e)}" for e in in_training.errors]
    failures += [f"in eval mode on a sample: {_describe(e)}" for e in in_eval.errors]
    return Search(
        network=network_to_judge,
        training_flags=training_flags,
        sites=tuple(sites),
        failures=tuple(failures),
        samples_in_training=tuple(samples_in_training),
        samples_in_eval=tuple(in_eval.completed),
    )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass
class _Forwards:
    """What the forwards in one mode showed.

    `draws` holds the draws by the path of the innermost module that made them; the dictionary keeps
    each draw once, in order. `reached` are the paths of the modules that were called, and
    `completed` the indices of the samples that ran to the end. `errors` are those of the others.
    """

    draws: dict[str, dict[Draw, None]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    completed: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def run_each(self, network: Network, samples: Sequence[Sample], *, seed: int) -> None:
        """Run one forward per sample."""
        for index, sample in enumerate(samples):
            try:
                self._run(network, sample, seed + index)
            # The user's code may raise anything in a mode that is new to it; or Unwatched.
            except Exception as error:
                self.errors.append(error)
            else:
                self.completed.append(index)

    def run_until_reached(
        self, network: Network, samples: Sequence[Sample], paths: set[str], *, seed: int
    ) -> None:
        """Run more forwards until every path inside a random module was reached.

        At most `_MORE_FORWARDS`; `paths` are those to reach. LayerDrop skips layers, and a site
        inside a skipped layer would never be seen.
        """
        if not self.completed:
            return
        for repeat in range(_MORE_FORWARDS):
            # The root, whose prefix is empty, contains all.
            prefixes = tuple(f"{path}." if path else "" for path in self.draws)
            if not any(path.startswith(prefixes) for path in paths - self.reached):
                return
            index = self.completed[repeat % len(self.completed)]
            try:
                self._run(network, samples[index], seed + _SEED_STEP * (repeat + 1))
            except Exception:  # a forward that fails only sometimes
                return

    def _run(self, network: Network, sample: Sample, seed: int) -> None:
        """Run one forward, and record the modules that it calls and those that draw."""
        names = {id(part): path for path, part in network.parts.items()}

        def hook(module: nn.Module, _inputs: object) -> None:
            self.reached.add(names.get(id(module), ""))

        seed_everything(seed)
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(hook).remove)
            random_draws = draws(network.module, Call.of((), sample).kwargs)
        for draw in random_draws:
            # "blocks.0 > unregistered": a module that a forward creates belongs to its creator.
            path = draw.path.partition(" > ")[0]
            if path == "(root)":
                path = ""
            self.draws.setdefault(path, {})[draw] = None


@dataclass
class _Capture:
    """The captured calls of one path: at most MOST_CALLS, of as many
    signatures as there are.
    """

    calls: list[CapturedCall] = field(default_factory=list)
    call_count: int = 0
    uncaptured_new_arguments: int = 0
    uncaptured_new_state: int = 0

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Mapping[Any, Any]) -> None:
        """Capture a call where it shows more than those captured before."""
        self.call_count += 1
        signature = CallSignature.of(args, kwargs, state)

        # A call that carries values replaces one of its signature that does not.
        for index, captured in enumerate(self.calls):
            if captured.signature == signature and captured.arguments.why_unmeasurable():
                call = Call.of(args, kwargs, state)
                if not call.why_unmeasurable():
                    self.calls[index] = CapturedCall(call, signature, captured.number)
                return

        if len(self.calls) < MOST_CALLS:
            self.calls.append(
                CapturedCall(Call.of(args, kwargs, state), signature, self.call_count)
            )
            return

        signatures = [captured.signature for captured in self.calls]
        if signature in signatures:
            return

        # A call of a new signature replaces the last one that repeats a signature.
        for index in reversed(range(len(signatures))):
            if signatures[index] in signatures[:index]:
                call = Call.of(args, kwargs, state)
                self.calls[index] = CapturedCall(call, signature, self.call_count)
                return
        if any(signature.arguments == other.arguments for other in signatures):
            self.uncaptured_new_state += 1
        else:
            self.uncaptured_new_arguments += 1


def _capture_calls(
    network: Network,
    samples: Sequence[Sample],
    paths: Sequence[str],
    reached: set[str],
    *,
    seed: int,
) -> dict[str, _Capture]:
    """The calls of each path in training forwards.

    One forward per sample, and more while a path in `reached` was not called: LayerDrop may skip
    it this time.
    """
    captures = {path: _Capture() for path in paths}

    def capture(stack: ExitStack, path: str) -> None:
        inside = Network.of(network.parts[path]).parts

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captures[path].add(args, kwargs, read_state(inside))

        stack.callback(network.parts[path].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def run(sample: Sample, seed: int) -> None:
        seed_everything(seed)
        network.module(**Call.of((), sample).kwargs)

    with ExitStack() as stack, plain_forward(), torch.no_grad():
        for path in paths:
            capture(stack, path)
        for index, sample in enumerate(samples):
            run(sample, seed + index)
        for repeat in range(_MORE_FORWARDS):
            if not samples or all(captures[path].call_count for path in paths if path in reached):
                break
            try:
                run(samples[repeat % len(samples)], seed + _SEED_STEP * (repeat + 1))
            except Exception:  # a forward that fails only sometimes
                break
    return captures
