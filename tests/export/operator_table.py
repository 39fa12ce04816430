"""The table of operators that `bundle/operators.py` reads, from onnx's schemas and from what the
rules know of ONNX Runtime's own operators.

`python -m tests.export.operator_table > bundle/operator_table.py` writes it anew.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from evalmode.export.rules.opaque_op import newest_opsets, quiet_operators
from evalmode.export.rules.stochastic_op import drawing_operators
from evalmode.export.rules.training_mode import TRAINS

_HEAD = '''"""The operators that are known: which of them are quiet, which draw and which train.

Written by `python -m tests.export.operator_table` from onnx's schemas; a test compares
them. The names are listed by their domain; ONNX's own is the empty string. Operators that have a
training mode are in none of the tables: `operators.py` judges each node of these.
"""

from __future__ import annotations

'''


def table() -> str:
    """The text of `bundle/operator_table.py`."""
    newest = "".join(
        f"    {_quoted(domain)}: {opset},\n" for domain, opset in sorted(newest_opsets().items())
    )
    return (
        f"{_HEAD}# The newest opset of each domain in which the operators are known.\n"
        f"NEWEST_OPSETS = {{\n{newest}}}\n\n"
        f"# What neither draws nor trains.\n{_set('QUIET', quiet_operators())}\n"
        f"# What draws random numbers.\n{_set('DRAWS', drawing_operators())}\n"
        f"# What only a training graph is made of.\n{_set('TRAINS', TRAINS)}"
    )


def _set(name: str, operators: Iterable[tuple[str, str]]) -> str:
    by_domain: dict[str, list[str]] = {}
    for domain, operator in sorted(operators):
        by_domain.setdefault(domain, []).append(operator)
    entries = ""
    for domain, names in by_domain.items():
        lines = textwrap.indent(textwrap.fill(" ".join(names), width=92), " " * 8)
        entries += f'    {_quoted(domain)}: """\n{lines}\n    """,\n'
    return f"{name} = {{\n{entries}}}\n"


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    print(table(), end="")
