"""Stop a training cleanly, on a signal or after some minutes, and find the checkpoint from which it resumes."""

import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from rerank.launch.processes import any_process
from rerank.models.engine import score_labelled_tokens_only

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback, ExportableState):
    """Ends training with a checkpoint on SIGINT or SIGTERM, or without one after `max_minutes`.

    Minutes are those of the whole training: every checkpoint holds the seconds that led to it, from which a resumed
    training counts on. `signalled` says afterwards whether a signal ended the training early.

    Args:
        max_minutes: None: any number.
        clock: Seconds from any moment.
    """

    def __init__(self, max_minutes: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.signalled, self.max_minutes, self.clock = False, max_minutes, clock
        self.seconds_before, self.begun_at = 0.0, clock()

    @property
    def seconds(self) -> float:
        """Trained so far."""
        return self.seconds_before + self.clock() - self.begun_at

    def state(self) -> dict[str, dict[str, object]]:
        """Stands in the `trainer_state.json` of every checkpoint."""
        return {"args": {"max_minutes": self.max_minutes}, "attributes": {"seconds_before": self.seconds}}

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Count on from the checkpoint, if it is one that counts, and catch the signals."""
        states = cast(dict[str, Any], state.stateful_callbacks)  # which transformers annotates otherwise
        stored = states.setdefault(type(self).__name__, self.state())
        self.seconds_before, self.begun_at = stored["attributes"]["seconds_before"], self.clock()
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
        elif self.max_minutes is not None and any_process(self.seconds > 60 * self.max_minutes):
            logger.info("max_minutes reached at step %d", state.global_step)
            control.should_training_stop = True

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Put the signals' handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def train(trainer: Trainer, max_minutes: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Train from the last complete checkpoint in the trainer's output folder, or from the start.

    Args:
        trainer: It writes checkpoints into its output folder.
        max_minutes: Ends the training after this many, those before the checkpoint included.
        clock: Seconds from any moment.

    Raises:
        KeyboardInterrupt: When a signal ended the training early; its checkpoint is written.
    """
    score_labelled_tokens_only()
    trainer.add_callback(StopOnSignal(max_minutes, clock))
    trainer.train(resume_from_checkpoint=last_checkpoint(str(trainer.args.output_dir)))
    trainer.accelerator.wait_for_everyone()  # a process that ends has the launcher stop those that still write
    if any(isinstance(one, StopOnSignal) and one.signalled for one in trainer.callback_handler.callbacks):
        raise KeyboardInterrupt  # asked of the handler, since transformers makes a restored callback anew


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
