"""Signals between a launch and its processes."""

import contextlib
import ctypes
import logging
import signal
import subprocess
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies, even by kill -9; a training then saves itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def wait(child: subprocess.Popen[bytes], name: str) -> int:
    """The exit code of a launch, 130 when it was interrupted; a first Ctrl-C stops its stage, a second kills it.

    Args:
        child: The launcher.
        name: Of the stage.
    """
    interrupted = False
    while True:
        try:
            code = child.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:
            if interrupted:
                signal_tree(child.pid, signal.SIGKILL, lambda words: True)
            else:
                logger.warning("stopping %s; once more kills it", name)
                signal_tree(child.pid, signal.SIGINT, lambda words: not is_launcher(words))
            interrupted = True


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line is that of accelerate or of torch's launcher, not of a stage."""
    return any("accelerate.commands.launch" in word or "torch.distributed" in word for word in words)


def signal_tree(pid: int, number: int, chosen: Callable[[Sequence[str]], bool]) -> None:
    """Signal `pid` and the processes below it, those whose command line is chosen."""
    import psutil

    is_gone = contextlib.suppress(psutil.NoSuchProcess)
    with is_gone:
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with is_gone:
                if chosen(process.cmdline()):
                    process.send_signal(number)
