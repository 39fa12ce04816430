"""Factors beside a dropout: in its parent, further out, after a non-linear step, in either mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.export.audit.audit import Audit, audit
from evalmode.export.audit.site import Kind, SiteReport

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

Body = Callable[["Parent", Tensor], object]


class Parent(nn.Module):
    """A dropout between two layers, and a body that puts them together."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.before, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


class Around(nn.Module):
    """A module further out, with a factor of its own."""

    def __init__(self, inner: nn.Module, *, training: float = 1.0, evaluating: float = 1.0) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 4)
        self.factors = {True: training, False: evaluating}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) * self.factors[self.training])


def audited(module: nn.Module) -> Audit:
    torch.manual_seed(0)
    return audit(nn.Sequential(module), [{"input": X}])


def sites_with_a_gap(result: Audit) -> list[SiteReport]:
    return [site for site in result.sites if site.severity is Severity.ERROR]


def in_eval(module: nn.Module, x: Tensor, factor: float = 0.5) -> Tensor:
    return x if module.training else x * factor


def in_training(module: nn.Module, x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor if module.training else x


def from_the_child(parent: Parent, x: Tensor) -> Tensor:
    dropped = parent.drop(x)
    return parent.head(in_eval(parent.drop, dropped))


FACTORS: dict[str, Body] = {
    "in eval": lambda m, x: m.head(in_eval(m, m.drop(x))),
    "in training": lambda m, x: m.head(in_training(m, m.drop(x))),
    "before the dropout": lambda m, x: m.head(m.drop(in_training(m, x))),
    "by the flag of the dropout": from_the_child,
    "on a residual branch": lambda m, x: x + in_eval(m, m.drop(m.before(x))),
    "behind a function that is not linear": lambda m, x: m.head(in_eval(m, m.drop(x).tanh())),
    "before a function that is not linear": lambda m, x: in_eval(m, m.drop(x)).tanh(),
    "on the answer": lambda m, x: in_eval(m, m.drop(x).tanh()),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_beside_the_dropout_is_a_gap_of_its_parent(name: str) -> None:
    result = audited(Parent(FACTORS[name]))
    (site,) = sites_with_a_gap(result)
    assert (site.path, site.type, site.kind) == ("0", "Parent", Kind.WRONG_SCALE)
    assert site.gap == pytest.approx(2, rel=1e-4)
    assert "2.0 times smaller in eval than in training" in site.sentence
    assert result.record.verdict is Verdict.FAIL


def test_a_factor_of_98_percent_has_an_exact_gap() -> None:
    (site,) = sites_with_a_gap(audited(Parent(lambda m, x: m.head(in_eval(m, m.drop(x), 0.98)))))
    assert site.gap == pytest.approx(1 / 0.98, rel=1e-4)


@pytest.mark.parametrize(("training", "evaluating"), [(2.0, 1.0), (1.0, 0.5)])
def test_a_factor_two_levels_up_is_a_gap_of_the_module_that_has_it(
    training: float, evaluating: float
) -> None:
    inner = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), nn.ReLU())
    (site,) = sites_with_a_gap(audited(Around(inner, training=training, evaluating=evaluating)))
    assert (site.path, site.type) == ("0", "Around")
    assert site.gap == pytest.approx(2, rel=1e-4)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if self.training else x


def test_a_factor_in_a_module_beside_the_dropout_is_a_gap_of_that_module() -> None:
    (site,) = sites_with_a_gap(audited(nn.Sequential(nn.Dropout(0.5), Scale(), nn.Linear(8, 4))))
    assert (site.path, site.gap) == ("0.1", pytest.approx(3, rel=1e-4))


def test_a_factor_on_a_branch_with_zero_weights_is_a_gap() -> None:
    parent = Parent(lambda m, x: x + in_eval(m, m.drop(m.before(x))))
    nn.init.zeros_(parent.before.weight)
    nn.init.zeros_(parent.before.bias)
    (site,) = sites_with_a_gap(audited(parent))
    assert site.gap == pytest.approx(2, rel=1e-4)
    assert not parent.before.weight.any()


def test_two_factors_of_one_module_are_a_gap() -> None:
    def body(m: Parent, x: Tensor) -> Tensor:
        return in_eval(m, m.drop(x), 0.5) + in_eval(m, m.drop(m.before(x)), 0.25)

    (site,) = sites_with_a_gap(audited(Parent(body)))
    assert (site.path, site.kind) == ("0", Kind.WRONG_SCALE)


def test_a_factor_in_one_of_two_calls_of_a_parent_is_a_gap() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Flagged()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, right=True) + self.inner(x, right=False)

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, *, right: bool) -> Tensor:
            dropped = self.drop(x)
            return dropped if right else in_eval(self, dropped)

    (site,) = sites_with_a_gap(audited(Twice()))
    assert (site.path, site.gap) == ("0.inner", pytest.approx(2, rel=1e-4))


@pytest.mark.parametrize("bad", [False, True])
def test_of_two_parents_that_share_a_dropout_the_finding_names_the_one_with_a_factor(
    bad: bool,
) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            drop = nn.Dropout(0.3)
            self.first, self.second = Around(drop), Around(drop, evaluating=0.5 if bad else 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    result = audited(Both())
    assert [site.path for site in sites_with_a_gap(result)] == (["0.second"] if bad else [])
    assert result.record.verdict is (Verdict.FAIL if bad else Verdict.PASS)


def equal_branches(m: Parent, x: Tensor) -> Tensor:
    dropped = m.drop(x)
    return m.head(dropped) if m.training else F.linear(dropped, m.head.weight, m.head.bias)


def taken_back(m: Parent, x: Tensor) -> Tensor:
    scaled = m.before(in_training(m, m.drop(x), 4.0))
    shift = m.before.bias
    return m.head((scaled - shift) / 4 + shift if m.training else scaled)


def with_an_auxiliary_head(m: Parent, x: Tensor) -> object:
    answer = m.head(m.drop(x))
    return (answer, m.before(x)) if m.training else answer


CLEAN: dict[str, Body] = {
    "no branch": lambda m, x: m.head(m.drop(x)),
    "a branch for eval that is equal": equal_branches,
    "a factor that is taken back": taken_back,
    "an auxiliary head in training": with_an_auxiliary_head,
    "a dropout called twice": lambda m, x: m.drop(m.head(m.drop(x))),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_parent_that_does_the_same_in_both_modes_is_clean(name: str) -> None:
    result = audited(Parent(CLEAN[name]))
    assert result.record.verdict is Verdict.PASS
    assert result.record.findings == ()


class Freezes(nn.Module):
    """A normalisation that stays in eval while training, beside a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.2)

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x))


@pytest.mark.parametrize(
    "module",
    [
        Freezes(),
        nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Dropout(0.2), nn.InstanceNorm1d(16, track_running_stats=True)),
    ],
)
def test_batch_statistics_are_no_gap_of_the_module_around_them(module: nn.Module) -> None:
    assert sites_with_a_gap(audited(module)) == []


def test_probabilities_in_eval_alone_are_a_warning_since_nothing_comes_after_them() -> None:
    def body(m: Parent, x: Tensor) -> Tensor:
        logits = m.head(m.drop(x))
        return logits if m.training else logits.softmax(-1)

    result = audited(Parent(body))
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "0")
    assert result.record.verdict is Verdict.PASS
    followed = audited(nn.Sequential(Parent(body), nn.Linear(8, 2)))
    assert followed.record.verdict is Verdict.UNPROVEN


def test_a_difference_that_no_factor_explains_is_unproven() -> None:
    result = audited(Parent(lambda m, x: m.head(m.drop(x) + (1 if m.training else 0))))
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.UNPROVEN, "0")
    assert "no factor explains" in finding.why


def test_products_that_no_factor_explains_are_unproven_in_the_answer_too() -> None:
    result = audited(Parent(lambda m, x: (in_eval(m, m.drop(x).tanh()) + 1).tanh()))
    assert result.record.verdict is Verdict.UNPROVEN


def test_without_a_dropout_the_surrounding_code_is_not_compared() -> None:
    assert audited(Scale()).record.verdict is Verdict.PASS


class OwnNorm(nn.Module):
    """A batch normalisation that does not inherit from torch's."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.drop, self.factor = nn.Dropout(0.2), factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        if self.training:
            mean = x.mean(0)
            self.mean.lerp_(mean.detach(), 0.1)
            return x - mean
        return x - self.mean


def test_batch_statistics_of_the_users_own_module_are_a_warning() -> None:
    result = audited(nn.Sequential(OwnNorm(), nn.Linear(8, 2)))
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "0.0")
    assert "keeps them in mean" in finding.why


def test_a_sample_that_fails_in_eval_is_not_compared() -> None:
    class Picky(Parent):
        def forward(self, x: Tensor) -> object:
            if not self.training and len(x) == 3:
                raise ValueError("three rows")
            return super().forward(x)

    module = nn.Sequential(Picky(FACTORS["in eval"]))
    result = audit(module, [{"input": X[:3]}, {"input": X}])
    assert [site.path for site in sites_with_a_gap(result)] == ["0"]


class Mask(nn.Module):
    """A mask alone: its caller has to scale."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) < 0.8) if self.training else x


class Masks(nn.Module):
    def __init__(self, factor: float, *, training: bool, calls: int = 1) -> None:
        super().__init__()
        self.mask, self.head = Mask(), nn.Linear(8, 8)
        self.factor, self.mode, self.calls = factor, training, calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.mask(x) * (self.factor if self.training == self.mode else 1)
        for _ in range(self.calls - 1):
            x = self.mask(x)
        return self.head(x)


@pytest.mark.parametrize(("factor", "training"), [(1.25, True), (0.8, False)])
def test_a_mask_whose_scale_is_in_its_parent_passes(factor: float, training: bool) -> None:
    result = audited(Masks(factor, training=training))
    (site,) = result.sites
    assert (site.kind, site.severity) == (Kind.MULTIPLICATIVE, None)
    assert site.sentence.startswith("0 makes up for what it leaves out")
    assert result.record.verdict is Verdict.PASS


@pytest.mark.parametrize(
    "module",
    [
        Masks(1.25, training=False),
        Masks(1.1, training=True),
        Masks(1.25, training=True, calls=2),
        Masks(1.0, training=True),
    ],
    ids=["the wrong mode", "too little", "one of two calls", "nothing"],
)
def test_a_mask_whose_scale_is_missing_or_wrong_in_its_parent_fails(module: nn.Module) -> None:
    assert audited(module).record.verdict is Verdict.FAIL
