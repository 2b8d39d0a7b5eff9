"""Stop a training cleanly, on a signal or after some minutes, and find the checkpoint from which it resumes."""

import json
import logging
import signal
import time
from pathlib import Path
from types import FrameType

from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from rerank.models.engine import score_labelled_tokens_only

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint on SIGINT or SIGTERM, or without one after `max_minutes`.

    `signalled` says afterwards whether a signal ended the training early.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signalled, self.end = False, None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Catch the signals."""
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:  # a second signal does not wait
            raise KeyboardInterrupt
        self.signalled = True
        logger.warning("stopping after this step, with a checkpoint")

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stop where a process was signalled or time is up."""
        self.signalled = any_process(self.signalled)
        if self.signalled:
            control.should_save = control.should_training_stop = True
        elif self.end is not None and any_process(time.monotonic() > self.end):
            logger.info("max_minutes reached at step %d", state.global_step)
            control.should_training_stop = True

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Put the signals' handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process, so that all of them stop at the same step."""
    return any(gather_object([flag]))


def train(trainer: Trainer, max_minutes: float | None = None) -> None:
    """Train from the last complete checkpoint in the trainer's output folder, or from the start.

    Raises:
        KeyboardInterrupt: When a signal ended the training early; its checkpoint is written.
    """
    score_labelled_tokens_only()
    stop = StopOnSignal(max_minutes)
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=last_checkpoint(str(trainer.args.output_dir)))
    trainer.accelerator.wait_for_everyone()  # a process that ends has the launcher stop those that still write
    if stop.signalled:
        raise KeyboardInterrupt


def release(trainer: Trainer) -> None:
    """Free the memory of a finished training, so that another one can follow in the same process."""
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()  # else the next trainer is refused under DeepSpeed


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a trainer's output folder, or None.

    A checkpoint whose writing was killed has no readable `trainer_state.json`, which transformers writes last; it is
    skipped.
    """
    steps = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            steps.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError, KeyError):
            logger.warning("%s is incomplete and is skipped", path)
    return max(steps)[1] if steps else None
