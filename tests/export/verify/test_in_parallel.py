"""Many targets are examined at once, and answered in order."""

from __future__ import annotations

import threading
from pathlib import Path

from onnx import TensorProto, helper

from evalmode.bundle.certificate import Verdict
from evalmode.export.verify.in_parallel import _Budget, examine_all
from evalmode.export.verify.targets import find_targets
from evalmode.export.verify.verify import Unreadable, Verified


def model(op: str, *, nodes: int) -> bytes:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("v0", f"v{nodes}")
    ]
    chain = [helper.make_node(op, [f"v{place}"], [f"v{place + 1}"]) for place in range(nodes)]
    made = helper.make_model(helper.make_graph(chain, "g", values[:1], values[1:]))
    return bytes(made.SerializeToString())


def test_answers_come_in_the_order_of_the_targets_however_long_each_takes(tmp_path: Path) -> None:
    for place in range(60):
        kind = ("Relu", "Bernoulli")[place % 2]
        data = model(kind, nodes=2000 if place % 10 == 0 else 1) if place % 7 else b"torn"
        (tmp_path / f"{place:02}.onnx").write_bytes(data)
    targets = find_targets([tmp_path])
    one, four = (list(examine_all(targets, threads=threads)) for threads in (1, 4))
    assert [answer.path for answer in four] == [target.path for target in targets]
    assert one == four
    for place, answer in enumerate(four):
        if place % 7 == 0:
            assert isinstance(answer, Unreadable)
        else:
            assert isinstance(answer, Verified)
            assert answer.verdict is (Verdict.FAIL if place % 2 else Verdict.PASS)


def test_an_amount_waits_for_the_budget_and_one_above_it_is_granted_alone() -> None:
    budget = _Budget(10)
    entered, leave, order = threading.Event(), threading.Event(), list[str]()

    def enter(name: str, amount: int) -> None:
        with budget.reserved(amount):
            order.append(name)
            entered.set()
            assert leave.wait(10)

    first = threading.Thread(target=enter, args=("larger than the budget", 100))
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=enter, args=("small", 1))
    second.start()
    second.join(0.2)
    assert order == ["larger than the budget"]
    leave.set()
    second.join(10)
    first.join(10)
    assert order == ["larger than the budget", "small"]
