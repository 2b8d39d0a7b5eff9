"""Seconds, peak memory and bytes on disk of a command with all processes below it."""

import contextlib
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_SECONDS, FOLDERS_EVERY = 0.2, 5  # between two looks at the memory; looks for one at the folders
LEAST_FREE = 1e9  # bytes of memory of the machine: below, the command is ended before it takes others with it
GB = 1e9


@dataclass(frozen=True)
class Watched:
    """A command that has ended.

    Attributes:
        seconds: Of the wall clock.
        cpu_seconds: Of all processors.
        peak_gb: The most resident memory of its processes together, mapped pages of files included, in 10^9 bytes.
        written_gb: That it sent to the disk.
        spilled_gb: The most that the folders held at once beyond what they hold at the end.
        failed: Why it has no result; empty where it has.
    """

    seconds: float
    cpu_seconds: float
    peak_gb: float
    written_gb: float
    spilled_gb: float
    failed: str = ""


def watch(
    words: Sequence[str], cwd: Path, env: Mapping[str, str], folders: Sequence[Path], most_seconds: float
) -> Watched:
    """Run a command to its end, or for `most_seconds`.

    Args:
        words: Of the command.
        cwd: Where it runs.
        env: Beside this process's environment.
        folders: That it may write into.
        most_seconds: After which it is killed, with `failed` set.
    """
    before, written, begun, peak, most, looks, failed = _processor(), _written(), time.monotonic(), 0, 0, 0, ""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=cwd, env={**os.environ, **env}, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                peak = max(peak, _resident(process.pid))
                if looks % FOLDERS_EVERY == 0:
                    most = max(most, sum(map(size_of, folders)))
                looks += 1
                failed = failed or _limit(time.monotonic() - begun, most_seconds)
                if failed:
                    _kill(process.pid)
                time.sleep(EVERY_SECONDS)
        finally:
            _kill(process.pid)
            process.wait()
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode and not failed:
        failed = f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}"
    spilled = max(most - sum(map(size_of, folders)), 0)
    seconds = time.monotonic() - begun, _processor() - before
    return Watched(*seconds, peak / GB, (_written() - written) / GB, spilled / GB, failed)


def _limit(seconds: float, most_seconds: float) -> str:
    if seconds > most_seconds:
        return f"ended after {seconds / 60:.0f} minutes, all that were left"
    free = psutil.virtual_memory().available
    return f"ended when the machine had {free / GB:.1f} GB of memory left" if free < LEAST_FREE else ""


def _kill(pid: int) -> None:
    """Kill a command, if it has not ended, and all processes below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _processor() -> float:
    """Seconds of the processes that this one has waited for, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _written() -> int:
    """Bytes that this process and those it has waited for, with theirs, have sent to the disk."""
    written: int = psutil.Process().io_counters().write_bytes
    return written


def _resident(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder, some of which may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    return total
