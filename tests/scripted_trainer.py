"""The trainer of the dapo stage and TRL's own on a tiny model and completions that a script writes."""

import torch
from datasets import Dataset
from scripted_dapo import ENTRIES, LIMIT, REWARDS, SIZE, random_tokens, stream, unequal
from tiny_model import ID_TOKENS, tiny_model, tiny_tokenizer
from trl import GRPOTrainer

from rerank import dapo
from rerank.dapo.groups import request_seed
from rerank.dapo.trainer import DapoTrainer
from rerank.rollouts import store


class Scripted(DapoTrainer):
    """Completions of scripted length, their tokens by the seeds of the requests."""

    lengths = staticmethod(unequal)
    sampling_logp = None  # what the script says each token's log-probability was

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        requests, eos = self.prepared.requests, self.eos_token_ids[0]
        lengths = [self.lengths(prompt, place % SIZE) for place, prompt in enumerate(requests)]
        ids = [random_tokens(seed, n, eos) for seed, n in zip(self.request_seeds(), lengths, strict=True)]
        return ids, None if self.sampling_logp is None else [[self.sampling_logp] * len(one) for one in ids]


def tokenizer():
    made = tiny_tokenizer()
    made.add_tokens(ID_TOKENS)
    made.padding_side = "left"
    return made


def config(folder, **options):
    settings = {"disable_tqdm": True, "per_device_train_batch_size": 2 * SIZE, "max_steps": 1, "learning_rate": 0.1}
    settings |= {"lr_scheduler_type": "constant", "optim": "sgd"}  # linear in the gradient: noise stays noise
    settings |= {"num_generations": SIZE, "max_completion_length": LIMIT, "use_vllm": False, "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    return dapo.DapoConfig(output_dir=str(folder / "out"), **{**settings, **options})


def make_trainer(
    folder, script=unequal, rounds=1, count=8, logp=None, max_logp_gap=1.0, kind=Scripted, grouped=True, model=None,
    peft=None, outcome="num_tokens", prompts=None, **options,
):  # fmt: skip
    words = tokenizer()
    model = model or tiny_model(words)
    torch.manual_seed(0)
    args = dapo.DapoArguments(
        run_dir="run", rewards=ENTRIES, outcome=outcome, max_sampling_rounds=max(1, rounds),
        dynamic_sampling=rounds > 0, max_logp_gap=max_logp_gap, group_forward=grouped,
    )  # fmt: skip
    prompts = prompts or stream(count, tokenizer=words)
    made = kind(args, config(folder, **options), model, prompts, folder / "rollouts", peft)
    made.sampling_logp, made.lengths = logp, script
    return made


def stored(folder):
    return store.read_rollouts(folder / "rollouts").to_pylist(maps_as_pydicts="strict")


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, two, atol=1e-6):
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=atol), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def plain_trainer(folder, model=None, peft=None, **options):
    """TRL's own trainer with the completions that `make_trainer` of eight rows trains on, in the first epoch."""
    words = tokenizer()
    prompts = [prompt.asked for prompt in stream(8, tokenizer=words).take(0, 8)]
    answers = {}
    for prompt in prompts:
        text = words.decode(words(prompt.prompt).input_ids)
        seeds = [request_seed(0, prompt.row.row_id, 0, member) for member in range(SIZE)]
        answers[text] = [random_tokens(s, 3 + m, words.eos_token_id) for m, s in enumerate(seeds)]

    class PlainScripted(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            texts = self.processing_class.batch_decode(prompt_ids)
            return [answers[text].pop(0) for text in texts], None

    torch.manual_seed(0)
    dataset = Dataset.from_dict({"prompt": [prompt.prompt for prompt in prompts]})
    settings = config(folder, shuffle_dataset=False, **options)
    kwargs = {"processing_class": words, "peft_config": peft}
    return PlainScripted(model or tiny_model(words), REWARDS, settings, dataset, **kwargs)
