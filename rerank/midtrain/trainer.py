"""The trainer of mid-training: TRL's, with a loss for each task, packed documents and recall on validation rows.

B rows, T tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rerank.midtrain.documents import TASKS
from rerank.models.logged_means import LoggedMeans

Row = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


Collator = Callable[[Sequence[Row]], Batch]


def collate_packed(collate: Collator, rows: Sequence[Row]) -> Batch:
    """Batches of packed rows (B, T) for attention that takes a mask: each document sees itself and nothing else.

    From position ids that begin anew, and without a padding mask, transformers makes a mask of one block a document.
    Padding is a row of documents of one token without a label.
    """
    batch = collate(rows)
    del batch["attention_mask"]
    batch["labels"][batch["position_ids"] == 0] = -100  # a first token does not follow the document before
    return batch


def collate_with_tasks(collate: Collator, flattens: bool, rows: Sequence[Row]) -> Batch:
    """Another collator's batches with the tasks: one number a row, or one a token where rows are packed."""
    tasks = [torch.tensor(row["task"]) for row in rows]
    batch = collate(rows)
    batch["task"] = torch.cat(tasks)[None] if flattens else pad_sequence(tasks, batch_first=True)
    return batch


class MidtrainTrainer(SFTTrainer):
    """TRL's SFTTrainer on documents of several tasks, prepared and packed beforehand.

    Overrides `compute_loss`, to add up each task's part of the loss that TRL computes; `log`, to report them; and
    `evaluate`, to measure `recall` in place of a loss. The loss that is trained on is TRL's own.

    Args:
        model: To train.
        args: With `packing`, the documents are packed.
        recall: From the model to metrics such as R@10, for `evaluate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        recall: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.packing and "flash" not in model.config._attn_implementation:  # which tells documents by lengths
            args.packing = False  # TRL's packing flattens a batch into one row, on which a mask is quadratic
            pad = kwargs["processing_class"].pad_token_id
            collate = DataCollatorForLanguageModeling(pad, return_position_ids=True)
            kwargs["data_collator"] = partial(collate_packed, collate)
        args.remove_unused_columns = False  # the task of a document stays
        super().__init__(model, args, **kwargs)
        self.data_collator = partial(collate_with_tasks, self.data_collator, self.padding_free)
        self.recall = recall
        self.means = LoggedMeans()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001
        tasks, kept = inputs.pop("task"), []

        def keep(**forward_inputs: Any) -> ModelOutput:
            kept.append(model(**forward_inputs))
            return kept[-1]

        loss = super().compute_loss(keep, inputs, return_outputs, num_items_in_batch)
        log_probs, mask = kept[0].log_probs.detach(), kept[0].label_mask  # (B, T-1); zero where there is no label
        tasks = tasks[:, 1:] if tasks.shape[1] > 1 else tasks
        self.means.add_tasks(TASKS, torch.where(mask.bool(), tasks, -1), -log_probs.float())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:  # every process logs
            for name, (mean, count) in self.means.take().items():
                logs |= {name: mean, name.replace("loss_", "tokens_"): int(count)}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):  # noqa: ANN001
        self.model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.recall(self.model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
