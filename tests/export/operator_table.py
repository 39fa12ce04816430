"""Write the table of operators that `bundle/operators.py` reads.

The sources are the schemas of onnx and the rules' lists of ONNX Runtime's contributed operators:

    python -m tests.export.operator_table > bundle/operator_table.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from evalmode.export.rules.opaque_op import newest_opsets, quiet_operators
from evalmode.export.rules.stochastic_op import drawing_operators
from evalmode.export.rules.training_mode import TRAINS

_HEAD = '''\
"""The known operators: those that neither draw nor train, those that draw, and those that train.

`python -m tests.export.operator_table` writes this file from the schemas of onnx, and a test
compares both. The names are listed by domain, and the domain of ONNX is the empty string. Operators
with a training mode are in none of the tables: `operators.py` checks the mode of each such node.
"""

from __future__ import annotations

'''


def table() -> str:
    """The text of `bundle/operator_table.py`."""
    newest = "".join(
        f"    {_quoted(domain)}: {opset},\n" for domain, opset in sorted(newest_opsets().items())
    )
    return (
        f"{_HEAD}# The newest opset of each domain whose operators have been reviewed.\n"
        f"NEWEST_OPSETS = {{\n{newest}}}\n\n"
        f"# Operators that neither draw nor train.\n{_set('QUIET', quiet_operators())}\n"
        f"# Operators that draw random numbers.\n{_set('DRAWS', drawing_operators())}\n"
        f"# Operators that only training graphs contain.\n{_set('TRAINS', TRAINS)}"
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
