"""Work off the event loop: what waits is done together, by one thread."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 32  # together


class Batches(Generic[T, R]):
    """A function of a batch, called for single tasks; while it works, others gather for the next batch."""

    def __init__(self, run: Callable[[Sequence[T]], Sequence[R | Exception]], pool: Executor) -> None:
        """Nothing is started yet.

        Args:
            run: Results of tasks, or the exceptions to raise for single ones, in their order; it raises none itself.
            pool: Where it runs.
        """
        self._run, self._pool = run, pool
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, task: T) -> R:
        """The result of one task."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((task, future))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            return await future
        finally:
            del future  # which has the exception, whose traceback has this frame: a cycle would hold the whole request

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = [one for one in self._waiting[:MOST] if not one[1].done()]  # the clients of others have left
                del self._waiting[:MOST]
                results = await loop.run_in_executor(self._pool, self._run, [task for task, _ in batch])
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._worker = None
