"""One rule a file: its docstring states it, `RULE` names it, `check` returns the record of what it found."""
