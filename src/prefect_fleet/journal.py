"""Write to the server so that all of it can be put back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

T = TypeVar("T")
Undo = Callable[[], Awaitable[None]]


class PutBackError(RuntimeError):
    """Something could not be made wholly what it was; the message says what is other now."""


class Journal:
    """The writes of one deploy, each with the way back."""

    def __init__(self) -> None:
        self._undos: list[tuple[str, Undo]] = []

    async def write(self, what: str, do: Callable[[], Awaitable[T]], undo: Undo) -> T:
        """Do one write.

        Args:
            what: the thing that it changes, for people.
            do: the write.
            undo: puts the thing back as it was, whether `do` has changed it or not: a write whose
                answer is lost may have been done.
        """
        self._undos.append((what, undo))
        return await do()

    async def put_back(self) -> list[str]:
        """Undo the writes, the last one first; return what could not be put back, and why."""
        left: list[str] = []
        away: str | None = None
        while self._undos:
            what, undo = self._undos.pop()
            if away:
                left.append(f"{what}: {away}")
                continue
            try:
                await undo()
            except httpx.HTTPStatusError as error:
                left.append(f"{what}: the API answered {error.response.status_code}")
            except httpx.HTTPError as error:
                # Each further try would wait as long.
                away = f"the API does not answer ({type(error).__name__})"
                left.append(f"{what}: {away}")
            except PutBackError as error:
                left.append(f"{what}: {error}")
            except Exception as error:
                left.append(f"{what}: {type(error).__name__}: {error}")
        return left


async def finish(task: Awaitable[T]) -> T:
    """Wait for `task` to the end, however often someone asks to stop meanwhile."""
    running = asyncio.ensure_future(task)
    while True:
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if running.cancelled():
                raise
