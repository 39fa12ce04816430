"""Readiness and liveness of one process, with a batch that is stuck for as long as a test sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from evalmode.service.health import Health, Stage


@dataclass
class Stuck:
    s: float = 0.0
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(stuck_s=lambda: self.s, grace_s=5)


def test_a_process_that_starts_is_live_and_not_ready():
    health = Stuck().health
    assert health.stage is Stage.STARTING
    assert health.ready() == "the server is starting"
    assert health.live() is None


def test_a_process_that_serves_is_ready_and_live():
    health = Stuck().health
    health.serve()
    assert (health.ready(), health.live()) == (None, None)


def test_a_process_that_drains_is_live_and_not_ready_for_good():
    health = Stuck().health
    health.serve()
    health.drain()
    health.serve()
    assert health.ready() == "the server is stopping"
    assert health.live() is None


def test_a_stuck_batch_takes_readiness_at_once_and_liveness_only_after_the_grace():
    stuck = Stuck()
    stuck.health.serve()
    stuck.s = 0.01
    assert stuck.health.ready() == "a batch exceeds its time limit by 0.0 s"
    assert stuck.health.live() is None
    stuck.s = 5.0
    assert stuck.health.live() is None
    stuck.s = 5.1
    assert (
        stuck.health.live()
        == "a batch exceeds its time limit by 5.1 s: this process needs a restart"
    )


def test_a_stuck_batch_that_ends_after_all_makes_the_process_ready_and_live_again():
    stuck = Stuck(s=9.0)
    stuck.health.serve()
    assert stuck.health.live()
    stuck.s = 0.0
    assert (stuck.health.ready(), stuck.health.live()) == (None, None)


def test_without_a_grace_a_stuck_batch_takes_both_at_once():
    health = Health(stuck_s=lambda: 0.01, grace_s=0)
    health.serve()
    assert health.ready()
    assert health.live()
