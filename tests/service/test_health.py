"""Readiness and liveness of a process; each test sets for how long a batch is stuck."""

from __future__ import annotations

from dataclasses import dataclass, field

from evalmode.service.health import Health, Stage


@dataclass
class StuckBatch:
    stuck_s: float = 0.0
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(stuck_s=lambda: self.stuck_s, grace_s=5)


def test_a_process_that_starts_is_live_and_not_ready():
    health = StuckBatch().health
    assert health.stage is Stage.STARTING
    assert health.ready() == "the server is starting"
    assert health.live() is None


def test_a_process_that_serves_is_ready_and_live():
    health = StuckBatch().health
    health.serve()
    assert (health.ready(), health.live()) == (None, None)


def test_a_process_that_drains_is_live_and_never_ready():
    health = StuckBatch().health
    health.serve()
    health.drain()
    health.serve()
    assert health.ready() == "the server is stopping"
    assert health.live() is None


def test_a_stuck_batch_ends_readiness_at_once_and_liveness_only_after_the_grace():
    batch = StuckBatch()
    batch.health.serve()
    batch.stuck_s = 0.01
    assert batch.health.ready() == "a batch exceeds its time limit by 0.0 s"
    assert batch.health.live() is None
    batch.stuck_s = 5.0
    assert batch.health.live() is None
    batch.stuck_s = 5.1
    assert (
        batch.health.live()
        == "a batch exceeds its time limit by 5.1 s: this process needs a restart"
    )


def test_a_process_is_ready_and_live_when_its_stuck_batch_has_ended():
    batch = StuckBatch(stuck_s=9.0)
    batch.health.serve()
    assert batch.health.live()
    batch.stuck_s = 0.0
    assert (batch.health.ready(), batch.health.live()) == (None, None)


def test_without_a_grace_a_stuck_batch_ends_readiness_and_liveness_at_once():
    health = Health(stuck_s=lambda: 0.01, grace_s=0)
    health.serve()
    assert health.ready()
    assert health.live()
