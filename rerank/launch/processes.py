"""The processes of a launch: a flag of any, and work in shares."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
U = TypeVar("U")


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process, so that all of them stop at the same step."""
    return any(gather_object([flag]))


def in_shares(work: Callable[[Sequence[T]], Sequence[U]], items: Sequence[T]) -> list[U]:
    """`work` of all items, in their order, an equal share by each process; a short share repeats the last item."""
    processes = PartialState()
    share = -(-len(items) // processes.num_processes)
    first = processes.process_index * share
    filled = [*items, *[items[-1]] * (share * processes.num_processes - len(items))]
    done: list[U] = gather_object(list(work(filled[first : first + share])))
    return done[: len(items)]
