from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime.capi.onnxruntime_pybind11_state as runtime

from evalmode.bundle import operator_table, operators
from evalmode.export.rules.training_mode import JUDGED
from tests.export.operator_table import table


def names(table: dict[str, str]) -> set[tuple[str, str]]:
    return {(domain, name) for domain in table for name in table[domain].split()}


def test_the_table_of_the_bundle_agrees_with_the_schemas_of_onnx() -> None:
    text = Path(operator_table.__file__).read_text()
    assert text == table(), "`python -m tests.export.operator_table` writes it anew"


def test_every_operator_is_quiet_or_refused_or_checked_by_its_mode() -> None:
    quiet, draws = names(operator_table.QUIET), names(operator_table.DRAWS)
    trains = names(operator_table.TRAINS)
    assert not quiet & (draws | trains | operators.JUDGED)
    assert operators.JUDGED | trains == JUDGED
    onnx_operators = {
        (schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()
    }
    assert onnx_operators <= quiet | draws | trains | operators.JUDGED
    runtime_operators = {
        (schema.domain, schema.name) for schema in runtime.get_all_operator_schema()
    }
    unknown = runtime_operators - quiet - draws - trains - operators.JUDGED
    assert {name for _, name in unknown} == {
        *("EPContext", "Snpe"),  # compiled models
        *("DisentangledAttention_TRT", "EfficientNMS_TRT", "PyramidROIAlign_TRT"),
        "MultilevelCropAndResize_TRT",
    }
