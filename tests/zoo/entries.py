"""The list of all entries, and the table of them in `docs/zoo.md`.

`python -m tests.zoo.entries` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.zoo import decoders, encoder_decoders, encoders, networks, refusals, speech, vision
from tests.zoo.entry import Entry, Sizes

_MODULES = (encoders, decoders, encoder_decoders, speech, vision, networks, refusals)
ENTRIES: list[Entry] = [
    entry for module in _MODULES for entry in vars(module).values() if isinstance(entry, Entry)
]


def table() -> Iterator[str]:
    """The lines of a Markdown table with what each entry declares."""
    yield "| entry | family | inputs | exported with | confirmed with | verdict |"
    yield "|---|---|---|---|---|---|"
    for entry in sorted(ENTRIES, key=lambda entry: (entry.family == "refused", entry.family)):
        verdict = f'refused: "{entry.refused}"' if entry.refused else "certified"
        name = f"**{entry.name}**" if entry.everyday else entry.name
        fresh = "" if entry.refused else _words(entry.fresh_sizes)
        yield (
            f"| {name} | {entry.family} | {_inputs(entry)} | {_words(entry.sizes)} | {fresh} |"
            f" {verdict} |"
        )


def _inputs(entry: Entry) -> str:
    words = []
    for name, tensor in entry.inputs()[0].items():
        words.append(f"{name} (bool)" if tensor.dtype == torch.bool else name)
    return ", ".join(words)


def _words(sizes: Sizes) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


if __name__ == "__main__":
    print("\n".join(table()))
