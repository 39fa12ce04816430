"""Targets are examined in parallel, with the results in the order of the targets."""

from __future__ import annotations

import threading
from pathlib import Path

from onnx import TensorProto, helper

from evalmode.bundle.certificate import Verdict
from evalmode.export.verify.in_parallel import _Budget, examine_all
from evalmode.export.verify.targets import find_targets
from evalmode.export.verify.verify import Unreadable, Verified


def model_bytes(op: str, *, nodes: int) -> bytes:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("v0", f"v{nodes}")
    ]
    chain = [helper.make_node(op, [f"v{index}"], [f"v{index + 1}"]) for index in range(nodes)]
    model = helper.make_model(helper.make_graph(chain, "g", values[:1], values[1:]))
    return bytes(model.SerializeToString())


def test_results_come_in_the_order_of_the_targets(tmp_path: Path) -> None:
    for index in range(60):
        kind = ("Relu", "Bernoulli")[index % 2]
        data = model_bytes(kind, nodes=2000 if index % 10 == 0 else 1) if index % 7 else b"torn"
        (tmp_path / f"{index:02}.onnx").write_bytes(data)
    targets = find_targets([tmp_path])
    with_one_thread, with_four_threads = (
        list(examine_all(targets, threads=threads)) for threads in (1, 4)
    )
    assert [answer.path for answer in with_four_threads] == [target.path for target in targets]
    assert with_one_thread == with_four_threads
    for index, answer in enumerate(with_four_threads):
        if index % 7 == 0:
            assert isinstance(answer, Unreadable)
        else:
            assert isinstance(answer, Verified)
            assert answer.verdict is (Verdict.FAIL if index % 2 else Verdict.PASS)


def test_an_amount_waits_for_the_budget_and_a_larger_one_than_the_budget_is_granted_alone() -> None:
    budget = _Budget(10)
    entered, leave, order = threading.Event(), threading.Event(), list[str]()

    def enter(name: str, amount: int) -> None:
        with budget.reserved(amount):
            order.append(name)
            entered.set()
            assert leave.wait(10)

    large = threading.Thread(target=enter, args=("larger than the budget", 100))
    large.start()
    assert entered.wait(10)
    small = threading.Thread(target=enter, args=("small", 1))
    small.start()
    small.join(0.2)
    assert order == ["larger than the budget"]
    leave.set()
    small.join(10)
    large.join(10)
    assert order == ["larger than the budget", "small"]
