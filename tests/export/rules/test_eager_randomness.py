"""The rule eager-randomness: global generators, private generators, and other randomness."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.certify import certify
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import eager_randomness
from tests.export.rules.small_graphs import subject_of_module

PROBES = [{"x": np.ones((count, length), np.float32)} for length in (1, 5) for count in (1, 2, 64)]
PRIVATE = np.random.default_rng(0)


class Calls(nn.Module):
    """A module with these attributes, whose forward is `answer(module, x)`."""

    def __init__(self, answer: Callable[[Calls, Tensor], object], **attributes: object) -> None:
        super().__init__()
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> object:
        return self.answer(self, x)


class UsesGlobalGenerator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * PRIVATE.random()


def record_of(answer: Callable[[Calls, Tensor], object], **attributes: object) -> Record:
    """The record for a module below the root; the module's path is `inner`."""
    root = nn.Module()
    root.inner = Calls(answer, **attributes)
    root.forward = lambda x: root.inner(x)
    return eager_randomness.check(subject_of_module(root.eval(), PROBES))


def changing_answer(calls: Iterable[object], *, at: int) -> Callable[[Calls, Tensor], Tensor]:
    """An answer that differs in one call, without the use of a generator."""
    count = iter(calls)
    return lambda module, x: x * 2 if next(count) == at else x


def messages(record: Record) -> tuple[str, ...]:
    return tuple(map(str, record.findings))


def test_a_clean_module_passes() -> None:
    record = record_of(lambda module, x: F.dropout(x, 0.5, module.training))
    assert record.verdict is Verdict.PASS
    assert record.measured == "0 places in 6 forwards, 5 repeats"
    assert messages(record) == ()


def test_a_forward_that_always_returns_nan_passes() -> None:
    assert record_of(lambda module, x: x * float("nan")).verdict is Verdict.PASS


def test_the_randomness_of_the_operating_system_is_found_by_repeats() -> None:
    record = record_of(lambda module, x: x * random.SystemRandom().random())
    assert record.verdict is Verdict.FAIL
    assert messages(record) == ("output_0 differs between forwards of one input",)


@pytest.mark.parametrize("repeat", range(2, 6))
def test_an_answer_that_differs_in_one_repeat_is_found(repeat: int) -> None:
    watched = len(PROBES)
    record = record_of(changing_answer(range(1, 99), at=watched + repeat))
    assert messages(record) == ("output_0 differs between forwards of one input",)


def test_a_zero_that_changes_its_sign_is_a_difference() -> None:
    signs = iter([1.0] * len(PROBES) + [1.0, -1.0, 1.0, 1.0, 1.0])
    assert record_of(lambda module, x: x * 0.0 * next(signs)).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    "condition", [lambda x: x.shape[0] == 64, lambda x: len(x) == 1, lambda x: x.shape[1] > 4]
)
def test_a_draw_for_the_shape_of_some_probes_only_is_named_with_its_line(
    condition: Callable[[Tensor], bool],
) -> None:
    record = record_of(lambda module, x: F.dropout(x, 0.25) if condition(x) else x)
    assert record.verdict is Verdict.FAIL
    (message,) = messages(record)
    assert message.startswith("inner (Calls, p=0.25): dropout")
    assert "at test_eager_randomness.py:" in message


@pytest.mark.parametrize(
    "generator",
    [random.Random(0), np.random.default_rng(0), np.random.RandomState(0)],
    ids=lambda generator: type(generator).__name__,
)
@pytest.mark.parametrize("path", ["", "[1]"], ids=["attribute", "list"])
def test_a_private_generator_is_named_wherever_the_module_keeps_it(
    generator: random.Random, path: str
) -> None:
    def draw_without_effect(module: Calls, x: Tensor) -> Tensor:
        source = module.generator[1] if path else module.generator
        # The draw has no effect, so no repeat differs.
        return x if source.uniform(0, 1) < 2 else -x

    record = record_of(draw_without_effect, generator=[None, generator] if path else generator)
    assert record.verdict is Verdict.FAIL
    assert len(messages(record)) == 1
    assert messages(record)[0].startswith(f"inner (Calls): the generator inner.generator{path} at ")


def test_a_generator_that_is_a_global_of_the_forward_is_named() -> None:
    record = eager_randomness.check(subject_of_module(UsesGlobalGenerator().eval(), PROBES))
    assert record.verdict is Verdict.FAIL
    assert "(root) (UsesGlobalGenerator): the generator global PRIVATE" in messages(record)[0]


def test_a_generator_that_draws_nothing_is_no_finding() -> None:
    assert record_of(lambda module, x: x, generator=random.Random(0)).verdict is Verdict.PASS


def test_a_branch_that_may_not_be_taken_is_unproven_in_one_sentence_that_names_it() -> None:
    record = record_of(
        lambda module, x: torch.cond(
            x.sum() > 1e9, lambda x: F.dropout(x, 0.25), lambda x: x.clone(), (x,)
        )
    )
    assert record.verdict is Verdict.UNPROVEN
    (message,) = messages(record)
    assert message.startswith("a forward cannot be watched: inner (Calls): cond")
    assert "object at 0x" not in message
    assert "\n" not in message


def test_a_forward_that_raises_not_implemented_fails() -> None:
    def unfinished(module: Calls, x: Tensor) -> Tensor:
        raise NotImplementedError("later")

    assert record_of(unfinished).verdict is Verdict.FAIL


def test_a_forward_that_fails_on_a_probe_is_a_finding_in_words() -> None:
    def one_row_alone(module: Calls, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise RuntimeError("one row at a time, please")
        return x

    record = record_of(one_row_alone)
    assert record.verdict is Verdict.FAIL
    assert messages(record) == (
        "the forward fails on x [64, 1]: RuntimeError: one row at a time, please",
        "the forward fails on x [64, 5]: RuntimeError: one row at a time, please",
    )


def test_an_answer_without_a_tensor_fails() -> None:
    record = record_of(lambda module, x: float(x.sum()))
    assert messages(record) == ("the forward returns no tensor that could be compared",)


@pytest.mark.parametrize(
    "counts", [range(1, 99), range(99, 1, -1)], ids=["more each time", "fewer each time"]
)
def test_a_number_of_answers_that_changes_fails(counts: Iterable[int]) -> None:
    count = iter(counts)
    record = record_of(lambda module, x: (x,) * next(count))
    assert messages(record) == ("forwards of one input return different numbers of tensors",)


def test_an_answer_whose_shape_changes_fails_though_its_bits_are_the_same() -> None:
    columns = iter([1, 5] * 99)
    assert (
        record_of(
            lambda module, x: x.reshape(-1, next(columns)) if x.numel() % 5 == 0 else x
        ).verdict
        is Verdict.FAIL
    )


@torch.library.custom_op("evalmode_tests::quiet_noise", mutates_args=())
def quiet_noise(x: Tensor) -> Tensor:
    """An operator that draws, without the tag that says so."""
    return x + torch.rand_like(x)


def test_a_draw_inside_an_operator_that_is_not_marked_is_seen_from_torchs_generator() -> None:
    record = record_of(lambda module, x: quiet_noise(x))
    assert record.verdict is Verdict.FAIL
    assert "inner (Calls): " in messages(record)[0]


def test_a_forward_that_cannot_be_watched_does_not_break_the_compiler_for_the_next() -> None:
    def branches(module: Calls, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 1e9, lambda x: F.dropout(x, 0.25), lambda x: x.clone(), (x,))

    for _ in range(2):
        (message,) = messages(record_of(branches))
        assert message.startswith("a forward cannot be watched: inner (Calls): cond")


MASKS: dict[object, Tensor] = {}


def random_mask() -> Tensor:
    return (torch.rand(4) > 0.3).float() / 0.7


@functools.lru_cache
def cached_mask(_key: int) -> Tensor:
    return torch.from_numpy((np.random.rand(4) > 0.3).astype(np.float32))


class MaskInADictionary(nn.Module):
    """The first forward draws a mask and keeps it in a global dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        return x * MASKS.setdefault(self.key(x), random_mask())

    def key(self, x: Tensor) -> object:
        return type(self)


class MaskPerRowCount(MaskInADictionary):
    """The same with one mask for each row count."""

    def key(self, x: Tensor) -> object:
        return type(self), x.shape[0]


class MaskInACache(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * cached_mask(4)


class MaskOnTheClass(nn.Module):
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if MaskOnTheClass.mask is None:
            MaskOnTheClass.mask = random_mask()
        return x * MaskOnTheClass.mask


class MaskBesideALock(nn.Module):
    """A module that cannot be copied, so the original runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.mask = threading.Lock(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = random_mask()
        return x * self.mask


@pytest.mark.parametrize(
    "kind", [MaskInADictionary, MaskPerRowCount, MaskInACache, MaskOnTheClass, MaskBesideALock]
)
def test_a_mask_that_the_first_forward_draws_and_keeps_is_found(kind: type[nn.Module]) -> None:
    module = kind().eval()
    candidate = candidate_of(module, [torch.randn(3, 4), torch.randn(5, 4)])
    record = certify(candidate, progress=lambda rule: None).records[-1]
    assert record.rule == "eager-randomness"
    assert record.verdict is Verdict.FAIL
    assert "draws in eval mode" in record.findings[0].why
