"""Files of sampling in a checkpoint: where the stream of prompts continues, and a generation batch still in use.

A batch of several updates is saved by each process, so that a run resumed between two of them trains on the same
completions with their advantages and old log-probabilities.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rerank.dapo.sampler import SamplerState

SAMPLING_FILE = "sampling.json"
BATCH_FILE = "batch-{process}.pt"


@dataclass(frozen=True)
class BatchInUse:
    """A generation batch on which further updates are to train.

    Attributes:
        step: Micro-batches trained on in the run so far, by which TRL finds the next one.
        inputs: The micro-batches of the batch, as TRL keeps them.
    """

    step: int
    inputs: Sequence[dict[str, torch.Tensor]]

    def save(self, checkpoint: Path, process: int) -> None:
        """Write it into a checkpoint."""
        torch.save({"step": self.step, "inputs": list(self.inputs)}, checkpoint / BATCH_FILE.format(process=process))


def save_state(checkpoint: Path, state: SamplerState) -> None:
    """Write the state of the sampler into a checkpoint."""
    (checkpoint / SAMPLING_FILE).write_text(json.dumps(asdict(state)))


def load_state(checkpoint: Path) -> SamplerState:
    """The state of the sampler in a checkpoint.

    Raises:
        FileNotFoundError: When it is no checkpoint of this stage.
    """
    path = checkpoint / SAMPLING_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no checkpoint of this stage; delete {checkpoint}")
    return SamplerState(**json.loads(path.read_text()))


def load_batch(checkpoint: Path, process: int, num_processes: int) -> BatchInUse | None:
    """This process's part of the batch that was in use at a checkpoint; None where none was.

    Raises:
        ValueError: When another number of processes shared it.
    """
    saved = list(checkpoint.glob(BATCH_FILE.format(process="*")))
    if not saved:
        return None
    if len(saved) != num_processes:
        raise ValueError(
            f"{checkpoint} was written between two updates on the rollouts of {len(saved)} processes, not of "
            f"{num_processes}; continue with {len(saved)}, or delete it"
        )
    return BatchInUse(**torch.load(checkpoint / BATCH_FILE.format(process=process), weights_only=True))
