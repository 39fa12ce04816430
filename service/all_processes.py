"""What the processes of one server do together: load and unload models, and add up figures.

Each process offers its functions by name. A call of one reaches every process, whichever of them
got the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

# Changes of the models that are open. They take turns.
Change: TypeAlias = Literal["load", "unload"]
# What every process counts, and what is added up.
FigureKind: TypeAlias = Literal["statistics", "metrics"]
Functions: TypeAlias = Mapping[str, Callable[..., Any]]


class AllProcesses(Protocol):
    """All processes of a server, as one of them sees them."""

    @property
    def unloaded(self) -> frozenset[str]:
        """The models that were unloaded by request before this process started."""

    @property
    def shared_folder(self) -> Path | None:
        """A private folder of these processes; None if there is only one, or none can be made."""

    def offer(self, functions: Functions) -> None:
        """Let every process call these functions of this one: load, unload, statistics and metrics.

        Their arguments and results are plain JSON values. They may be called from any thread.
        """

    async def change(self, change: Change, model: str) -> None:
        """Load or unload a model in every process.

        Returns when all have done it. Raises the error of the first process that could not, and
        NotReady if the server ends meanwhile.
        """

    async def figures(self, kind: FigureKind) -> list[dict[str, Any]]:
        """The records of `Statistics.records` or the families of `Metrics.families`, added up over
        all processes, ended ones too.
        """


class OneProcess:
    """The only process of a server."""

    unloaded: frozenset[str] = frozenset()
    shared_folder: Path | None = None

    def __init__(self) -> None:
        self._functions: Functions = {}
        self._changing = asyncio.Lock()

    def offer(self, functions: Functions) -> None:
        """See `AllProcesses`."""
        self._functions = functions

    async def change(self, change: Change, model: str) -> None:
        """See `AllProcesses`."""
        # One at a time: others would wait in threads, and the threads of the pool are needed to
        # read requests.
        async with self._changing:
            await asyncio.to_thread(self._functions[change], model)

    async def figures(self, kind: FigureKind) -> list[dict[str, Any]]:
        """See `AllProcesses`."""
        # In a thread, because collecting a thousand series takes milliseconds.
        return await asyncio.to_thread(self._functions[kind])
