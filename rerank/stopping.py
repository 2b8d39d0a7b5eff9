"""Stop a training cleanly: on a signal, with its launcher, or after some minutes; and find where to go on."""

import ctypes
import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

from rerank import trl_cpu

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask Linux to signal this process when its parent dies, however the parent dies.

    SIGTERM, so that a training in progress still writes its checkpoint (`StopOnSignal`).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def stop_callback(max_minutes: float | None = None):  # noqa: ANN201  (transformers is imported late)
    """A trainer callback that ends training with a checkpoint on SIGINT or SIGTERM, or after `max_minutes`.

    Its `signalled` tells the stage afterwards that the training is unfinished.
    """
    from transformers import TrainerCallback

    class StopOnSignal(TrainerCallback):
        def __init__(self) -> None:
            self.signalled, self.end = False, None if max_minutes is None else time.monotonic() + 60 * max_minutes
            self.previous = {}

        def on_train_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)

        def _note(self, number, frame):  # noqa: ANN001
            if self.signalled:  # a second signal does not wait
                raise KeyboardInterrupt
            self.signalled = True
            logger.warning("stopping after this step, with a checkpoint")

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
            self.signalled = any_process(self.signalled)
            if self.signalled:
                control.should_save = control.should_training_stop = True
            elif self.end is not None and any_process(time.monotonic() > self.end):
                logger.info("max_minutes reached at step %d", state.global_step)
                control.should_training_stop = True

        def on_train_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    return StopOnSignal()


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process, so that all of them stop at the same step."""
    import torch.distributed
    from accelerate import PartialState

    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return flag
    raised = torch.tensor(float(flag), device=PartialState().device)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return bool(raised.item())


def train(trainer: Any, max_minutes: float | None = None) -> None:
    """Train from the last complete checkpoint in the trainer's output folder, or from the start.

    Raises:
        KeyboardInterrupt: When a signal ended the training early; its checkpoint is written.
    """
    trl_cpu.score_labelled_tokens_only()
    stop = stop_callback(max_minutes)
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    trainer.accelerator.wait_for_everyone()  # one that ends has the launcher stop those that still write
    if stop.signalled:
        raise KeyboardInterrupt


def release(trainer: Any) -> None:
    """Let go of a finished training, so that another one can follow in the same process."""
    from accelerate.state import AcceleratorState

    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()  # else the next trainer is refused under DeepSpeed


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a trainer's output folder, or None.

    A kill in the middle of writing leaves a checkpoint without a readable `trainer_state.json`, which transformers
    writes last; such a one is passed over.
    """
    steps = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            steps.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError, KeyError):
            logger.warning("%s is incomplete and is passed over", path)
    return max(steps)[1] if steps else None


def last_step(folder: str | Path) -> int:
    """The step from which a training in this folder goes on; 0 for a new one."""
    checkpoint = last_checkpoint(folder)
    return 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])
