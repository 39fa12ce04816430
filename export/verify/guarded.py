"""Running files and bundles in a child process, so that a file that aborts, hangs or takes memory
costs its own verdict and no other.

One child runs all files of a command, and is replaced when it ends. It loads the user's samples and
module itself; what comes back are records. Knows no rule by name.
"""

from __future__ import annotations

import atexit
import contextlib
import pickle
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.bundle.certificate import Record
from evalmode.bundle.errors import BundleError
from evalmode.bundle.manifest import Frozen
from evalmode.bundle.store import open_bundle
from evalmode.child_process import Child, ChildLost, OutOfMemory, OutOfTime, serve
from evalmode.errors import EvalmodeError
from evalmode.export.graph import ModelUnreadable, open_graph
from evalmode.export.rules.registry import RULES, Rule
from evalmode.export.rules.subject import Subject
from evalmode.export.verify.options import Options

if TYPE_CHECKING:
    from torch import nn

_FIX_INPUTS = "give inputs that the graph reads with --inputs"
_FIX_TIME = "raise --time-limit, or give smaller inputs with --inputs"
_FIX_MEMORY = "raise --memory-limit, or give smaller inputs with --inputs"
_FIX_CRASH = "do not serve the file: it would end the process that serves it"


class _Answer(Frozen):
    """A message of the child: the record of a rule, or why there is none."""

    record: Record | None = None
    refusal: str = ""
    missing: str = ""  # a package that is not installed


@dataclass(frozen=True, kw_only=True)
class _Load:
    """Load what the files that follow are run on; see `Options`."""

    samples: Sequence[Mapping[str, Any]] | str | None
    module: str | None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Run the file, or the bundle, at `path` by these rules."""

    path: Path
    is_bundle: bool
    rules: tuple[str, ...]


def load(options: Options) -> None:
    """Have the child load the samples and the module. Raises EvalmodeError where that fails."""
    with _lock:
        _runner.load(options)


def run_file(subject: Subject, rules: Sequence[Rule], options: Options) -> dict[str, Record]:
    """The records of the rules that run the subject's file, by the name of the rule.

    Where the child ends, the rules that have not answered say how; what the graph alone shows of
    them is in their records all the same. Raises ModelUnreadable where weights cannot be read.
    """
    assert subject.file is not None, "only a file is run here"
    run = _Run(path=subject.file, is_bundle=False, rules=tuple(rule.name for rule in rules))
    with _lock:
        answers, lost = _runner.answers(run, options)
    for answer in answers:
        if answer.refusal:
            raise ModelUnreadable(answer.refusal)
    return _records(subject, rules, answers, lost)


def run_bundle(subject: Subject, rules: Sequence[Rule], options: Options) -> dict[str, Record]:
    """The records of the rules that replay the subject's bundle, by the name of the rule.

    Raises BundleError for a bundle that cannot be run on its own known answers.
    """
    run = _Run(path=subject.bundle.path, is_bundle=True, rules=tuple(rule.name for rule in rules))
    with _lock:
        answers, lost = _runner.answers(run, options)
    for answer in answers:
        if answer.refusal:
            raise BundleError(answer.refusal)
    return _records(subject, rules, answers, lost)


def _records(
    subject: Subject, rules: Sequence[Rule], answers: Sequence[_Answer], lost: ChildLost | None
) -> dict[str, Record]:
    records = {answer.record.rule: answer.record for answer in answers if answer.record is not None}
    if lost is None:
        return records
    fix = _FIX_CRASH
    if isinstance(lost, OutOfTime):
        fix = _FIX_TIME
    elif isinstance(lost, OutOfMemory):
        fix = _FIX_MEMORY
    why = EvalmodeError(f"the process that runs the file {lost}")
    for rule in rules:
        if rule.name not in records:
            records[rule.name] = rule.could_not_run(why, fix=fix, subject=subject)
    return records


class _Runner:
    """The child, and what it has loaded. Not for several threads at once."""

    def __init__(self) -> None:
        self.child = Child(f"{__name__}:main")
        self._loaded: Options | None = None
        self._has_run = False

    def load(self, options: Options) -> None:
        """Load what files are run on, unless the child has it. Raises EvalmodeError."""
        if self.child.is_running and (self._loaded is options or options.samples is None):
            return
        self._has_run = self._has_run and self.child.is_running
        question = _Load(samples=options.samples, module=options.module)
        try:
            messages = list(self.child.ask(pickle.dumps(question)))
        except ChildLost as error:
            names = [text for text in (options.samples, options.module) if isinstance(text, str)]
            raise EvalmodeError(
                f"the process that loads {' and '.join(names) or 'the samples'} {error}"
            ) from error
        sys.stderr.write(self.child.read_stderr())  # what the user's own code had to say
        for message in messages:
            raise EvalmodeError(_parsed(message).refusal)
        self._loaded = options

    def answers(self, run: _Run, options: Options) -> tuple[list[_Answer], ChildLost | None]:
        """What the rules answer, and how the child ended if it did."""
        time_s, memory_bytes = options.limits.time_s, options.limits.memory_mib << 20
        while True:
            self.load(options)
            was_fresh, self._has_run = not self._has_run, True
            answers = []
            try:
                for message in self.child.ask(
                    pickle.dumps(run), time_s=time_s, memory_bytes=memory_bytes
                ):
                    answers.append(_parsed(message))  # noqa: PERF401
            except ChildLost as lost:
                self._has_run = False
                # An earlier file may have left the damage or the memory of which this child ended.
                if was_fresh or isinstance(lost, OutOfTime):
                    return answers, lost
                continue
            if self.child.memory_bytes > memory_bytes // 2:  # the next file has all of the limit
                self.child.close()
            return answers, None


def _parsed(message: bytes) -> _Answer:
    """The message. Raises ModuleNotFoundError where the child lacks a package."""
    answer = _Answer.model_validate_json(message)
    if answer.missing:
        raise ModuleNotFoundError(f"no module {answer.missing!r}", name=answer.missing)
    return answer


_runner = _Runner()
_lock = threading.Lock()  # bundles are verified in several threads
atexit.register(_runner.child.close)


def interrupt() -> None:
    """End the run in progress, from another thread than the one that waits for it."""
    _runner.child.kill()


def main() -> None:
    """The child: load once, then run each file and send a message for each of its rules."""
    samples: Sequence[Mapping[str, Any]] = ()
    module: nn.Module | None = None

    def answer(message: bytes) -> Iterator[bytes]:
        nonlocal samples, module
        question: _Load | _Run = pickle.loads(message)
        try:
            if isinstance(question, _Run):
                records = _run_bundle if question.is_bundle else _run_file
                for record in records(question, samples, module):
                    yield _Answer(record=record).model_dump_json().encode()
            else:
                samples, module = _loaded(question)
        except EvalmodeError as error:
            yield _Answer(refusal=str(error)).model_dump_json().encode()
        except ModuleNotFoundError as error:
            yield _Answer(missing=error.name or "").model_dump_json().encode()

    serve(answer)


def _loaded(question: _Load) -> tuple[Sequence[Mapping[str, Any]], nn.Module | None]:
    # Libraries that take seconds are imported now: the limit of time is one of a file.
    with contextlib.suppress(ImportError):  # the session has a sentence for that
        import onnxruntime  # noqa: F401
    if question.samples is None:
        return (), None
    import evalmode.export.verify.runnable  # noqa: F401 - loads torch
    from evalmode.export.inputs.references import load_in_eval_mode, load_samples

    samples = question.samples
    if isinstance(samples, str):
        samples = load_samples(samples)
    return samples, None if question.module is None else load_in_eval_mode(question.module)


def _run_bundle(
    run: _Run, samples: Sequence[Mapping[str, Any]], module: nn.Module | None
) -> Iterator[Record]:
    subject = Subject(bundle=open_bundle(run.path))
    return (rule.check(subject) for rule in RULES if rule.name in run.rules)


def _run_file(
    run: _Run, samples: Sequence[Mapping[str, Any]], module: nn.Module | None
) -> Iterator[Record]:
    from evalmode.export.verify.runnable import subject_of_file

    rules = [rule for rule in RULES if rule.name in run.rules]
    graph = open_graph(run.path)
    subject = bare = Subject(graph=graph, file=run.path)
    problem: EvalmodeError | None = None
    try:
        subject = subject_of_file(run.path, graph, samples, module=module)
    except ImportError:
        raise
    except Exception as error:
        problem = _sentence(error)
    for rule in rules:
        if problem is not None:
            yield rule.could_not_run(problem, fix=_FIX_INPUTS, subject=bare)
            continue
        try:
            record = rule.check(subject)
        except ImportError:
            raise
        except Exception as error:
            record = rule.could_not_run(_sentence(error), fix=_FIX_INPUTS, subject=bare)
        yield record


def _sentence(error: Exception) -> EvalmodeError:
    """The error as one sentence; files, and modules, break in ways that no list has."""
    if isinstance(error, EvalmodeError):
        return error
    reason = " ".join(str(error).split()) or "it gives no reason"
    return EvalmodeError(f"{type(error).__name__}: {reason}")
