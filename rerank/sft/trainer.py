"""The trainer of the sft stage: TRL's, on the losses that the recipe names.

The losses are computed inside the model's own forward, where whatever shards or wraps parameters has them at hand.
Letters of shapes: B rows, T tokens, P positions under loss, H hidden size.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rerank.losses import LIST_COLUMNS, Batch, Head, Losses, LossInputs, Row
from rerank.models.logged_means import LoggedMeans
from rerank.sft.forward import add_loss_forward

if TYPE_CHECKING:
    from rerank.next_item.encoder import NextItemEncoder

logger = logging.getLogger(__name__)

COLUMNS = ("nodes", "items")  # of a row, beside input_ids and labels; -1 where there is none
PARAMETERS_FILE = "loss_parameters.pt"
PREFIX = "loss_parameters"


class RowCollator:
    """Batches of rows; losses that redraw theirs do so anew each epoch, alike for the same seed and epoch.

    Attributes:
        epoch: A number in shared memory, so that workers of a data loader see it change.
    """

    def __init__(
        self, pad_token_id: int, tasks: Sequence[str], losses: Losses, encoder: "NextItemEncoder | None", seed: int
    ) -> None:
        self.collate = DataCollatorForLanguageModeling(pad_token_id)
        self.redrawing = [loss for loss in losses.auxiliary.values() if loss.redraws]
        self.tasks, self.encoder, self.seed = tuple(tasks), encoder, seed
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def __call__(self, rows: Sequence[Row]) -> Batch:
        for loss in self.redrawing:
            rows = [row | loss.redraw(self.tasks[row["task"]], row, self._rng(row), self.encoder) for row in rows]
        batch = self.collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        for name in COLUMNS:
            columns = [torch.tensor(row.get(name) or [-1] * len(row["input_ids"])) for row in rows]
            batch[name] = pad_sequence(columns, batch_first=True, padding_value=-1)
        batch["task"] = torch.tensor([row["task"] for row in rows])
        if "first_label" in rows[0]:
            batch["first_label"] = torch.tensor([row["first_label"] for row in rows])
            for name, padding in LIST_COLUMNS.items():
                columns = [torch.tensor(row[name]) for row in rows]
                batch[name] = pad_sequence(columns, batch_first=True, padding_value=padding)
        if any(row.get("targets") for row in rows):  # items that a row's last state is to predict
            targets = [torch.tensor(row.get("targets") or [], dtype=torch.long) for row in rows]
            batch["targets"] = pad_sequence(targets, batch_first=True, padding_value=-1)
        return batch

    def _rng(self, row: Row) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self.epoch), row["number"]))


class LossTrainer(SFTTrainer):
    """TRL's SFTTrainer on named losses and rows of several tasks.

    Overrides `compute_loss`, for the losses; `get_batch_samples`, to count the divisors of an optimizer step before
    its first forward; `log`, to report each task's and each term's part; and `_save` and `_load_from_checkpoint`, for
    parameters that a loss brings along.

    Args:
        model: To train.
        args: TRL's.
        losses: By `rerank.losses.load_losses`.
        tasks: Names of the tasks; a row's `task` is a place in it.
        trace_end: Token that ends a trace; None where there is none, so that everything is ranking.
        encoder: With the task next_item.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        losses: Losses,
        tasks: Sequence[str],
        trace_end: int | None = None,
        encoder: "NextItemEncoder | None" = None,
        **kwargs: Any,
    ) -> None:
        self.losses, self.tasks, self.trace_end = losses, tuple(tasks), trace_end
        self.index = None if encoder is None else encoder.index
        add_loss_forward(model)
        args.remove_unused_columns = False
        collator = RowCollator(kwargs["processing_class"].pad_token_id, tasks, losses, encoder, args.seed)
        for loss in losses.auxiliary.values():
            loss.task_numbers = {name: number for number, name in enumerate(tasks)}
        modules = {name: loss.parameters(model, encoder) for name, loss in losses.auxiliary.items()}
        super().__init__(model, args, data_collator=collator, **kwargs)
        self.loss_parameters = nn.ModuleDict({name: module for name, module in modules.items() if module is not None})
        if self.aux_loss_enabled:
            raise ValueError("losses leave out the load balancing of experts; set router_aux_loss_coef to 0")
        if len(self.loss_parameters):
            self._attach_parameters()
        self.add_callback(TellEpoch(collator))
        self.step_counts: dict[str, float] = {}
        self.means = LoggedMeans()

    @property
    def _has_cut_parameters(self) -> bool:
        """Whether each process holds a part of the model, so that all must call it equally often."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def _checkpoints_by_reentry(self) -> bool:
        """Whether a backward pass runs a backward pass for each layer; DDP takes one of each for one forward only."""
        return self.args.gradient_checkpointing and bool(
            (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        )

    def _attach_parameters(self) -> None:
        """Make the losses' parameters part of the model that is trained, but not of what is saved of it."""
        if self._has_cut_parameters:
            names = ", ".join(self.loss_parameters)
            raise ValueError(
                f"loss {names} has parameters of its own, which FSDP and ZeRO-3 would cut; use zero2.yaml"
            )
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, BaseTunerLayer):
            raise ValueError("losses with parameters read the embedding itself; leave it out of lora_target_modules")
        if not embedding.weight.requires_grad:
            logger.warning(
                "loss %s has parameters beside the model's embedding, which is not trained, so that nothing pulls the "
                "embedding itself; add embed_tokens to lora_modules_to_save",
                ", ".join(self.loss_parameters),
            )
        self.model.add_module(PREFIX, self.loss_parameters)
        self.model._keys_to_ignore_on_save = [
            *(getattr(self.model, "_keys_to_ignore_on_save", None) or []),
            *(f"{PREFIX}.{name}" for name in self.loss_parameters.state_dict()),
        ]

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # noqa: ANN001
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [self._counts(batch) for batch in batches]
            total = torch.tensor([sum(count[name] for count in counts) for name in counts[0]], dtype=torch.float64)
            total = self.accelerator.reduce(total.to(device, torch.float32), "sum")
            self.step_counts = dict(zip(counts[0], total.tolist(), strict=True))
        return batches, num_items

    def _counts(self, batch: Batch) -> dict[str, int]:
        """Supervised positions per task, and the counts of auxiliary losses, in a micro-batch."""
        per_row = (batch["labels"][:, 1:] != -100).sum(dim=1)
        counts = {name: int(per_row[batch["task"] == number].sum()) for number, name in enumerate(self.tasks)}
        for loss in self.losses.auxiliary.values():
            counts |= loss.counts(batch)
        return counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001
        counts = self.step_counts if num_items_in_batch is not None else self._counts(inputs)
        auxiliary = self.losses.auxiliary.values()

        def embed(embedding: nn.Embedding) -> torch.Tensor | None:
            found = [made for loss in auxiliary if (made := loss.embed(embedding, inputs)) is not None]
            return found[0] if found else None

        loss = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            compute=functools.partial(self._loss, inputs, counts),
            embed=embed if self.losses.auxiliary else None,
            by_length=not (self._has_cut_parameters or self._checkpoints_by_reentry),
        )
        if num_items_in_batch is not None:  # DDP averages over processes what is divided by counts of all of them
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(
        self, batch: Batch, counts: Mapping[str, float], states: torch.Tensor, head: Head, embedding: nn.Embedding
    ) -> torch.Tensor:
        """The loss of a micro-batch, already divided by the step's counts; its parts are kept for the next log."""
        inputs = self._inputs(batch, counts, states, head)
        values = self.losses.token(inputs).float()
        # the factor of a value: its task's weight over the task's number of positions in the optimizer step
        weights = [self.losses.task_weights.get(name, 1.0) / max(counts[name], 1) for name in self.tasks]
        loss = (values * torch.tensor(weights).to(values)[inputs.tasks]).sum()
        loss = loss + 0.0 * states.sum()  # connected, without a label too
        terms: dict[str, torch.Tensor] = {}
        for auxiliary in self.losses.auxiliary.values():
            terms |= auxiliary.terms(inputs, embedding)
        for parameter in self.loss_parameters.parameters():  # DDP wants a gradient for each in each step
            loss = loss + 0.0 * parameter.float().sum()
        if self.model.training:
            self._note(inputs, values, terms)
        return sum(terms.values(), loss)

    def _note(self, inputs: LossInputs, values: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> None:
        """Keep a micro-batch's part of what is logged."""
        for name, pair in inputs.logged.items():
            self.means.add(name, *pair)
        if len(self.tasks) > 1 or self.losses.auxiliary:  # else it is the loss
            self.means.add_tasks(self.tasks, inputs.tasks, values.detach())
        share = 1 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        for name, value in terms.items():
            self.means.add(f"loss_{name}", value, share)

    def _inputs(self, batch: Batch, counts: Mapping[str, float], states: torch.Tensor, head: Head) -> LossInputs:
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        if self.trace_end is None:
            is_ranking = torch.ones_like(mask)
        else:
            seen = (labels == self.trace_end).long().cumsum(dim=1)
            is_ranking = (seen > 0) & (labels != self.trace_end)
        return LossInputs(
            hidden=states[:, :-1][mask],
            labels=labels[mask],
            head=head,
            is_ranking=is_ranking[mask],
            nodes=batch["nodes"][:, 1:][mask],
            items=batch["items"][:, 1:][mask],
            tasks=batch["task"][:, None].expand_as(mask)[mask],
            index=self.index,
            states=states,
            batch=batch,
            counts=counts,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:  # every process logs
            logs |= {name: mean for name, (mean, _) in self.means.take().items()}
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):  # noqa: ANN001
        super()._save(output_dir, state_dict)
        if len(self.loss_parameters):
            torch.save(self.loss_parameters.state_dict(), Path(output_dir or self.args.output_dir) / PARAMETERS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):  # noqa: ANN001
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_loss_parameters(resume_from_checkpoint)

    def load_loss_parameters(self, folder: str | Path) -> None:
        """Take the parameters of the losses, where they have any, from a folder that `save_model` wrote."""
        file = Path(folder) / PARAMETERS_FILE
        if len(self.loss_parameters):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; delete {folder} to continue from the one before")
            self.loss_parameters.load_state_dict(torch.load(file, weights_only=True))


class TellEpoch(TrainerCallback):
    """Tells a collator the epoch."""

    def __init__(self, collator: RowCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
        self.collator.epoch[0] = math.floor((state.epoch or 0) + 1e-6)  # resumed in its middle it is a fraction
