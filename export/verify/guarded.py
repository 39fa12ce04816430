"""Run files and bundles in a child process. A file that aborts, hangs or takes all memory costs
only its own verdict.

One child runs all files of a command, and is replaced when it ends. It loads the user's samples and
module itself, and sends records back.

The record of a rule that runs a file:

1. The child opens the file, makes a subject with inputs, and checks the rule.
2. If the file, or the user's module, does not accept the inputs, the rule is unproven.
3. If the child ends or meets a limit before the rule has a record, the rule is unproven, with the
   reason. If an earlier file had run in this child, a fresh child tries once more. A file that took
   too long is not tried again.
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


@dataclass(frozen=True, kw_only=True)
class _Load:
    """A request to the child: load the samples and the module for the files that follow."""

    samples: Sequence[Mapping[str, Any]] | str | None
    module: str | None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A request to the child: check the file, or the bundle, at `path` by these rules."""

    path: Path
    is_bundle: bool
    rules: tuple[str, ...]


class _Reply(Frozen):
    """A message from the child: the record of one rule, or the reason why there is none."""

    record: Record | None = None
    refusal: str = ""  # a sentence for the user; no record follows
    missing: str = ""  # the name of a package that is not installed; no record follows


def load(options: Options) -> None:
    """Have the child load the samples and the module. Raises EvalmodeError if that fails."""
    with _lock:
        _runner.load(options)


def run_file(subject: Subject, rules: Sequence[Rule], options: Options) -> dict[str, Record]:
    """The records of the rules that run the subject's file, by the name of the rule.

    If the child ends early, the records of the other rules say how it ended, and what the graph
    alone shows. Raises ModelUnreadable if weights cannot be read.
    """
    assert subject.file is not None, "only a file is run here"
    run = _Run(path=subject.file, is_bundle=False, rules=tuple(rule.name for rule in rules))
    with _lock:
        replies, loss = _runner.run(run, options)
    for reply in replies:
        if reply.refusal:
            raise ModelUnreadable(reply.refusal)
    return _records(subject, rules, replies, loss)


def run_bundle(subject: Subject, rules: Sequence[Rule], options: Options) -> dict[str, Record]:
    """The records of the rules that replay the subject's bundle, by the name of the rule.

    Raises BundleError for a bundle that cannot run on its own known answers.
    """
    run = _Run(path=subject.bundle.path, is_bundle=True, rules=tuple(rule.name for rule in rules))
    with _lock:
        replies, loss = _runner.run(run, options)
    for reply in replies:
        if reply.refusal:
            raise BundleError(reply.refusal)
    return _records(subject, rules, replies, loss)


def _records(
    subject: Subject, rules: Sequence[Rule], replies: Sequence[_Reply], loss: ChildLost | None
) -> dict[str, Record]:
    """The records in the replies; where the child was lost, also those of the other rules."""
    records = {reply.record.rule: reply.record for reply in replies if reply.record is not None}
    if loss is None:
        return records
    fix = _FIX_CRASH
    if isinstance(loss, OutOfTime):
        fix = _FIX_TIME
    elif isinstance(loss, OutOfMemory):
        fix = _FIX_MEMORY
    error = EvalmodeError(f"the process that runs the file {loss}")
    for rule in rules:
        if rule.name not in records:
            records[rule.name] = rule.could_not_run(error, fix=fix, subject=subject)
    return records


class _Runner:
    """The child, and what it has loaded. Only one thread may use it at a time."""

    def __init__(self) -> None:
        self.child = Child(f"{__name__}:main")
        self._loaded: Options | None = None
        self._has_run = False  # whether this child has run a file

    def load(self, options: Options) -> None:
        """Load the samples and the module, unless the child has them. Raises EvalmodeError."""
        if self.child.is_running and (self._loaded is options or options.samples is None):
            return
        if not self.child.is_running:
            self._has_run = False
        request = _Load(samples=options.samples, module=options.module)
        try:
            messages = list(self.child.ask(pickle.dumps(request)))
        except ChildLost as error:
            references = [
                text for text in (options.samples, options.module) if isinstance(text, str)
            ]
            subject = " and ".join(references) or "the samples"
            raise EvalmodeError(f"the process that loads {subject} {error}") from error
        sys.stderr.write(self.child.read_stderr())  # warnings and prints of the user's own code
        if messages:  # the child answers a load only if it fails
            raise EvalmodeError(_parse(messages[0]).refusal)
        self._loaded = options

    def run(self, run: _Run, options: Options) -> tuple[list[_Reply], ChildLost | None]:
        """The child's replies, and how the child ended if it did."""
        time_s = options.limits.time_s
        memory_bytes = options.limits.memory_mib << 20
        while True:
            self.load(options)
            is_first_run = not self._has_run
            self._has_run = True
            request = pickle.dumps(run)
            replies: list[_Reply] = []  # they count even if the child ends early
            try:
                for message in self.child.ask(request, time_s=time_s, memory_bytes=memory_bytes):
                    replies.append(_parse(message))  # noqa: PERF401
            except ChildLost as loss:
                self._has_run = False
                # An earlier file may have caused the end of the child: by damage, or by its memory.
                if is_first_run or isinstance(loss, OutOfTime):
                    return replies, loss
                continue
            # A child does not return its memory. It is replaced, so that the next file can use most
            # of the limit.
            if self.child.memory_bytes > memory_bytes // 2:
                self.child.close()
            return replies, None


def _parse(message: bytes) -> _Reply:
    """The reply in a message. Raises ModuleNotFoundError if the child lacks a package."""
    reply = _Reply.model_validate_json(message)
    if reply.missing:
        raise ModuleNotFoundError(f"no module {reply.missing!r}", name=reply.missing)
    return reply


_runner = _Runner()
_lock = threading.Lock()  # bundles are verified in several threads
atexit.register(_runner.child.close)


def interrupt() -> None:
    """End the run in progress, from another thread than the one that waits for it."""
    _runner.child.kill()


def main() -> None:
    """The child's main function: load once, then check each file, with a reply for each rule."""
    samples: Sequence[Mapping[str, Any]] = ()
    module: nn.Module | None = None

    def answer(message: bytes) -> Iterator[bytes]:
        nonlocal samples, module
        request: _Load | _Run = pickle.loads(message)
        try:
            if isinstance(request, _Load):
                # Some libraries take seconds to import. They are imported now, because the time
                # limit of a file must not include it.
                with contextlib.suppress(ImportError):  # the session has a sentence for that
                    import onnxruntime  # noqa: F401
                if request.samples is None:
                    samples, module = (), None
                    return
                import evalmode.export.verify.runnable  # noqa: F401 - loads torch
                from evalmode.export.inputs.references import load_in_eval_mode, load_samples

                loaded = request.samples
                if isinstance(loaded, str):
                    loaded = load_samples(loaded)
                module = None if request.module is None else load_in_eval_mode(request.module)
                samples = loaded
                return

            if request.is_bundle:
                subject = Subject(bundle=open_bundle(request.path))
                for rule in RULES:
                    if rule.name in request.rules:
                        record = rule.check(subject)
                        yield _Reply(record=record).model_dump_json().encode()
            else:
                for record in _file_records(request, samples, module):
                    yield _Reply(record=record).model_dump_json().encode()
        except EvalmodeError as error:
            yield _Reply(refusal=str(error)).model_dump_json().encode()
        except ModuleNotFoundError as error:
            yield _Reply(missing=error.name or "").model_dump_json().encode()

    serve(answer)


def _file_records(
    run: _Run, samples: Sequence[Mapping[str, Any]], module: nn.Module | None
) -> Iterator[Record]:
    from evalmode.export.verify.runnable import subject_of_file

    graph = open_graph(run.path)
    subject = bare_subject = Subject(graph=graph, file=run.path)
    problem: EvalmodeError | None = None
    try:
        subject = subject_of_file(run.path, graph, samples, module=module)
    except ImportError:
        raise
    except Exception as error:
        problem = _as_sentence(error)

    for rule in RULES:
        if rule.name not in run.rules:
            continue
        if problem is not None:
            yield rule.could_not_run(problem, fix=_FIX_INPUTS, subject=bare_subject)
            continue
        try:
            record = rule.check(subject)
        except ImportError:
            raise
        except Exception as error:
            reason = _as_sentence(error)
            record = rule.could_not_run(reason, fix=_FIX_INPUTS, subject=bare_subject)
        yield record


def _as_sentence(error: Exception) -> EvalmodeError:
    """The error as one sentence. Files and modules may raise errors of any type."""
    if isinstance(error, EvalmodeError):
        return error
    reason = " ".join(str(error).split()) or "it gives no reason"
    return EvalmodeError(f"{type(error).__name__}: {reason}")
