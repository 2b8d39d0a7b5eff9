"""The trainer of the dapo stage, on completions that a script writes in place of an engine."""

import json

import numpy as np
import pytest
import requests
import torch
from datasets import Dataset
from test_dapo_groups import Encoder, rows
from tiny_model import ID_TOKENS, tiny_model, tiny_tokenizer
from transformers import ProgressCallback
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rerank import dapo, group_forward, plugins, rollout_server, rollouts
from rerank.dapo.consistency import ConsistencyCheck
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.sampler import SamplingOptions
from rerank.dapo.trainer import GAP, DapoTrainer, ShortProgress
from rerank.prompts import completion

SIZE = 4  # completions of a prompt


def num_tokens(completions, completion_ids, **columns):
    """The length of a completion: what groups of the scripts differ in."""
    return [float(len(ids)) for ids in completion_ids]


def evenness(completions, completion_ids, **columns):
    """The share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


REWARDS = {"num_tokens": num_tokens, "evenness": evenness}


def random_tokens(seed, length, eos):
    return [*np.random.default_rng(seed).integers(10, 40, length - 1).tolist(), eos]


def useful_for(row_ids):
    """A script: completions of unequal length for these rows, of equal length for others."""

    def lengths(drawn, member):
        return 3 + member if drawn.row["row_id"] in row_ids else 5

    return lengths


class Scripted(DapoTrainer):
    """Completions of scripted length, their tokens by the seeds of the requests."""

    lengths = staticmethod(lambda drawn, member: 3 + member)
    sampling_logp = None  # what the script says each token's log-probability was

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        seeds = self.sampler.request_seeds()
        lengths = [self.lengths(drawn, member) for drawn, member in self.sampler.requests]
        ids = [random_tokens(s, length, self.eos_token_ids[0]) for s, length in zip(seeds, lengths, strict=True)]
        return ids, None if self.sampling_logp is None else [[self.sampling_logp] * len(one) for one in ids]


def tokenizer():
    made = tiny_tokenizer()
    made.add_tokens(ID_TOKENS)
    made.padding_side = "left"
    return made


def config(folder, **options):
    given = {
        "disable_tqdm": True,
        "per_device_train_batch_size": 2 * SIZE,
        "max_steps": 1,
        "learning_rate": 0.1,
        **options,
    }
    return dapo.DapoConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", use_vllm=False,
        num_generations=SIZE, max_completion_length=16, gradient_checkpointing=False, lr_scheduler_type="constant",
        optim="sgd",  # linear in the gradient: noise stays noise
        save_strategy="steps" if "save_steps" in given else "no", **given,
    )  # fmt: skip


def make_trainer(
    folder,
    script=None,
    rounds=1,
    count=8,
    logp=None,
    max_logp_gap=1.0,
    rewards=None,
    kind=None,
    grouped=True,
    **options,
):
    words = tokenizer()
    model = tiny_model(words)
    model.resize_token_embeddings(len(words))
    if grouped:
        group_forward.prepare_model(model)
    torch.manual_seed(0)
    made = (kind or Scripted)(
        model, rewards or list(REWARDS.values()), config(folder, **options),
        Dataset.from_dict({"prompt": [""] * count}), processing_class=words,
        prompts=PromptStream(rows(count), Encoder(), seed=0), writer=rollouts.RolloutWriter(folder / "rollouts"),
        sampling=SamplingOptions("num_tokens", max(1, rounds), is_dynamic=rounds > 0), max_logp_gap=max_logp_gap,
        group_forward=grouped,
    )  # fmt: skip
    made.sampling_logp = logp
    if script is not None:
        made.lengths = script
    return made


def stored(folder):
    return rollouts.read_rollouts(folder / "rollouts").to_pylist(maps_as_pydicts="strict")


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, two, atol=1e-6):
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=atol), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def first_drawn(count, number):
    return [prompt.row["row_id"] for prompt in PromptStream(rows(count), Encoder(), 0).draw(number)]


def test_groups_of_one_outcome_are_exchanged_for_others(tmp_path):
    order = first_drawn(8, 8)
    trainer = make_trainer(tmp_path, useful_for(order[1:3]), rounds=3)
    trainer.train()
    rows_of = {kept: [r["row_id"] for r in stored(tmp_path) if r["kept"] == kept] for kept in (True, False)}
    assert sorted(rows_of[True]) == sorted([order[1], order[2]] * SIZE)
    assert sorted(rows_of[False]) == [order[0]] * SIZE  # the first round draws two, the second one
    assert {(r["round"], r["row_id"]) for r in stored(tmp_path)} == {(0, order[0]), (0, order[1]), (1, order[2])}
    assert {r["discard_reason"] for r in stored(tmp_path) if not r["kept"]} == {"all_equal"}
    for name, value in {"rounds": 2, "prompts": 3, "prompts_drawn": 3, "missing": 0, "discarded_all_equal": 1}.items():
        assert logged(trainer, f"groups/{name}") == [value], name
    assert logged(trainer, "groups/share_useful") == [pytest.approx(2 / 3)]
    assert len({r["group"] for r in stored(tmp_path)}) == 3  # a number for each prompt of the step
    assert logged(trainer, "rollouts/no_ranking") == [1.0]  # random tokens
    assert logged(trainer, "rollouts/reward") == [pytest.approx(np.mean([r["reward"] for r in stored(tmp_path)]))]


def test_a_short_step_trains_on_what_there_is(tmp_path, caplog):
    order = first_drawn(8, 8)
    short = make_trainer(tmp_path / "short", useful_for(order[:1]), rounds=2)
    short.train()
    assert "step 0 lacks 1 groups after 2 rounds" in caplog.text
    assert logged(short, "groups/missing") == [1]
    alone = make_trainer(tmp_path / "alone", per_device_train_batch_size=SIZE)
    alone.train()
    assert {r["row_id"] for r in stored(tmp_path / "short") if r["kept"]} == {order[0]}
    assert logged(short, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-6)
    assert logged(short, "reward") == pytest.approx(logged(alone, "reward"))
    assert_same(short, alone)


def test_a_step_without_any_useful_group_moves_nothing_and_the_third_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, useful_for([]), rounds=2, max_steps=5, weight_decay=0.0)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"in 3 steps no group differed in the outcome 'num_tokens' \(the last is 5"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_steps_without_a_useful_group_do_not_stop_a_run_that_had_one(tmp_path):
    script = useful_for(first_drawn(40, 2))
    trainer = make_trainer(tmp_path, script, count=40, max_steps=5, save_steps=1)
    trainer.train()
    assert logged(trainer, "groups/missing") == [0, 2, 2, 2, 2]
    checkpoint = str(tmp_path / "out/checkpoint-5")
    resumed = make_trainer(tmp_path, script, count=40, max_steps=8)
    resumed.go_on_from(checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 8


def test_useful_groups_beyond_the_step_are_stored_as_surplus(tmp_path):
    order = first_drawn(8, 8)
    trainer = make_trainer(tmp_path, useful_for(order[1:]), rounds=2)
    trainer.sampler._share_useful = 0.5  # so that four are drawn for two
    trainer.train()
    kept = [r["row_id"] for r in stored(tmp_path) if r["kept"]]
    assert sorted(set(kept)) == sorted(order[1:3])
    assert {r["row_id"] for r in stored(tmp_path) if r["discard_reason"] == "surplus"} == {order[3]}
    assert logged(trainer, "groups/discarded_surplus") == [1]


def test_surplus_is_used_while_the_weights_are_those_that_sampled_it(tmp_path):
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, rounds=1, **options)
    trainer.sampler._share_useful = 0.6  # four are drawn for two
    trainer.train()
    order = first_drawn(8, 8)
    first_step = [r for r in stored(tmp_path) if r["step"] == 0]
    assert {r["row_id"] for r in first_step if r["kept"]} == set(order[:4])  # one sampling for both generations
    assert {r["discard_reason"] for r in first_step} == {None}
    assert trainer.sampler.state["num_drawn"] == 8


def test_surplus_of_other_weights_is_stale(tmp_path):
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, rounds=1, count=20, **options)
    trainer.sampler._num_to_draw = lambda wanted, missing: 5
    trainer.train()
    stale = [r for r in stored(tmp_path) if r["discard_reason"] == "stale"]
    drawn = first_drawn(20, 10)
    assert {(r["step"], r["row_id"]) for r in stale} == {(0, drawn[4]), (1, drawn[9])}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_exchange_a_step_is_that_of_plain_trl(tmp_path, accumulation, grouped):
    batch = {"per_device_train_batch_size": 2 * SIZE // accumulation, "gradient_accumulation_steps": accumulation}
    ours = make_trainer(tmp_path, rounds=0, max_steps=2, grouped=grouped, **batch)

    class PlainScripted(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            texts = self.processing_class.batch_decode(prompt_ids)
            return [answers[text].pop(0) for text in texts], None

    words, prompts = tokenizer(), PromptStream(rows(8), Encoder(), 0).draw(4)
    answers = {}
    for prompt in prompts:
        text = words.decode(words(prompt.row["prompt"]).input_ids)
        seeds = [dapo.groups.request_seed(0, prompt.row["row_id"], 0, member) for member in range(SIZE)]
        answers[text] = [random_tokens(s, 3 + m, words.eos_token_id) for m, s in enumerate(seeds)]
    model = tiny_model(words)
    model.resize_token_embeddings(len(words))
    torch.manual_seed(0)
    dataset = Dataset.from_dict({"prompt": [prompt.row["prompt"] for prompt in prompts]})
    plain = PlainScripted(
        model, list(REWARDS.values()), config(tmp_path, max_steps=2, shuffle_dataset=False, **batch), dataset,
        processing_class=words,
    )  # fmt: skip
    ours.train()
    plain.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert logged(ours, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    assert_same(ours, plain, atol=1e-5)


def test_what_is_stored_is_what_was_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=100.0)
    model = tiny_model(trainer.processing_class)
    model.load_state_dict(weights(trainer), strict=False)
    trainer.train()
    found = stored(tmp_path)
    for rollout in found:
        ids = trainer.processing_class(rollout["prompt"]).input_ids
        whole = torch.tensor([ids + rollout["completion_ids"]])
        logps = model(whole).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        wanted = logps.gather(1, whole[0, len(ids) :, None])[:, 0].tolist()
        assert rollout["policy_logps"] == pytest.approx(wanted, abs=1e-4)
        assert rollout["sampling_logps"] == [-1.5] * len(rollout["completion_ids"])
        components = {"num_tokens": len(rollout["completion_ids"])}
        assert rollout["reward_components"]["num_tokens"] == components["num_tokens"]
        assert rollout["reward"] == pytest.approx(sum(rollout["reward_components"].values()), abs=1e-5)
        assert rollout["target"] == 4 * (rollout["row_id"] - 10) + 2 and not rollout["truncated"]
    for row_id in {rollout["row_id"] for rollout in found}:
        rewards = np.array([rollout["reward"] for rollout in found if rollout["row_id"] == row_id])
        advantages = [rollout["advantage"] for rollout in found if rollout["row_id"] == row_id]
        wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert advantages == pytest.approx(wanted.tolist(), abs=1e-4)
    gaps = [abs(a - b) for r in found for a, b in zip(r["policy_logps"], r["sampling_logps"], strict=True)]
    assert logged(trainer, GAP) == [pytest.approx(np.mean(gaps), abs=1e-4)]


def test_rollouts_of_other_weights_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=0.05)
    with pytest.raises(ValueError, match=r"step 0: sampling and training log-probabilities differ by \d\.\d+ a token"):
        trainer.train()
    assert len(stored(tmp_path)) == 2 * SIZE  # what was sampled is there to be looked at


def test_a_model_that_says_nan_stops_the_run_and_an_engine_that_says_nothing_does_not(tmp_path):
    silent = make_trainer(tmp_path / "silent", logp=float("nan"), max_logp_gap=0.05)
    silent.train()
    assert silent.state.global_step == 1 and not logged(silent, GAP)
    broken = make_trainer(tmp_path / "broken", logp=-1.5, max_logp_gap=100.0)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"log-probabilities differ by nan a token on average"):
        broken.train()


def test_resumed_equals_uninterrupted(tmp_path):
    script = useful_for(first_drawn(8, 8)[2:])
    whole = make_trainer(tmp_path / "whole", script, rounds=3, max_steps=4)
    whole.train()
    first = make_trainer(tmp_path / "parts", script, rounds=3, max_steps=2, save_steps=2)
    first.train()
    checkpoint = tmp_path / "parts/out/checkpoint-2"
    assert json.loads((checkpoint / "sampling.json").read_text()) == first.sampler.state
    second = make_trainer(tmp_path / "parts", script, rounds=3, max_steps=4)
    second.go_on_from(str(checkpoint))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.prompts.num_drawn == whole.prompts.num_drawn
    assert logged(second, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert_same(second, whole)
    same = ("step", "round", "group", "row_id", "completion_ids", "kept", "discard_reason")
    parts = [[{name: r[name] for name in same} for r in stored(tmp_path / name)] for name in ("whole", "parts")]
    assert sorted(parts[0], key=str) == sorted(parts[1], key=str)


def test_an_invalid_completion_earns_the_invalid_reward_alone(tmp_path):
    words = tokenizer()
    args = dapo.DapoArguments(run_dir="run", rewards=[{"name": "well_formed", "weight": 3.0}], invalid_reward=-1.0)
    functions, reward_weights = dapo.reward_functions(args, 16, words.eos_token_id)
    assert reward_weights == [3.0, 1.0]
    trainer = make_trainer(
        tmp_path, rewards=[*functions, num_tokens], reward_weights=[*reward_weights, 1.0], max_logp_gap=9.0
    )
    trainer.train()
    assert {r["reward"] for r in stored(tmp_path)} == {-1.0}  # random tokens are no ranking
    assert {tuple(r["reward_components"]) for r in stored(tmp_path)} == {("invalid",)}


def test_a_condition_that_does_not_hold_is_stored_beside_the_reward(tmp_path):
    specs = [{"name": "well_formed", "weight": 0.2, "when": "promoted_or_kept_first"}]
    gated = plugins.load_rewards(specs, dapo.REWARD_COLUMNS)
    trainer = make_trainer(tmp_path, rewards=[*gated, num_tokens])
    trainer.train()
    assert {tuple(r["reward_gates"].items()) for r in stored(tmp_path)} == {(("well_formed", False),)}


def test_a_condition_may_look_at_the_prompt(tmp_path):
    (tmp_path / "plugin.py").write_text(
        "def asks_to_rank(completions, prompts, **columns):\n    return [p.startswith('Rank') for p in prompts]\n"
    )
    specs = [{"name": "well_formed", "when": f"{tmp_path}/plugin.py:asks_to_rank"}]
    make_trainer(tmp_path, rewards=[*plugins.load_rewards(specs, dapo.REWARD_COLUMNS), num_tokens]).train()
    assert {tuple(r["reward_gates"].items()) for r in stored(tmp_path)} == {(("well_formed", True),)}


def ranked_by(key):
    """A policy: each prompt's candidates sorted by `key` of their place and item."""

    def generate(prompts):
        shown = [list(map(int, prompt.removeprefix("Rank: ").split())) for prompt in prompts]
        orders = [
            sorted(range(len(items)), key=lambda place, items=items: key(place, items[place])) for items in shown
        ]
        labels = [[f"<s_a_{item}>" for item in items] for items in shown]
        return [completion("", order, names) for order, names in zip(orders, labels, strict=True)]

    return generate


@pytest.mark.parametrize(
    ("policy", "tau", "same_first", "both"),
    [
        (ranked_by(lambda place, item: item), 1.0, 1.0, 1.0),  # reads the candidates
        (ranked_by(lambda place, item: place), None, None, 1.0),  # copies the order shown
        (lambda prompts: ["junk"] * len(prompts), None, None, 0.0),
    ],
)
def test_rankings_of_the_same_rows_in_two_orders_are_compared(tmp_path, policy, tau, same_first, both):
    trainer = make_trainer(tmp_path, max_steps=3, max_logp_gap=9.0)
    trainer.consistency = ConsistencyCheck(trainer, trainer.prompts, num_rows=6, every=2)
    trainer.generate_greedily = policy
    trainer.train()
    found = {name: logged(trainer, f"rollouts/consistency/{name}") for name in ("kendall_tau", "same_first")}
    assert logged(trainer, "rollouts/consistency/both_ranked") == [both, both]  # of steps 0 and 2
    if tau is not None:
        assert found == {"kendall_tau": [tau] * 2, "same_first": [same_first] * 2}
    elif both:
        assert max(found["kendall_tau"]) < 0.7 and found["kendall_tau"][0] == found["kendall_tau"][1]  # the same rows


def test_a_step_prints_a_few_figures_and_logs_all(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(ShortProgress())
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert "'rollouts/no_ranking': '1'" in line and len(line) < 250
    assert len(trainer.state.log_history[0]) > 30


def test_the_completions_of_a_prompt_stay_in_one_micro_batch(tmp_path):
    options = {"per_device_train_batch_size": SIZE, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, **options)
    seen = []
    compute = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append({tuple(prompt) for prompt in inputs["prompt_ids"].tolist()})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert [len(prompts) for prompts in seen] == [1, 1]


class Server:
    """TRL's client of a vLLM server that is away for a number of calls."""

    def update_named_params(self, metadata, weights):
        if self.refuses_weights:
            raise requests.ConnectionError("connection refused")

    def reset_prefix_cache(self):
        pass

    def __init__(self, calls_away, eos):
        self.calls_away, self.eos, self.seeds, self.refuses_weights = calls_away, eos, [], False

    def generate(self, prompts, n, generation_kwargs, temperature, **options):
        if self.calls_away:
            self.calls_away -= 1
            raise requests.ConnectionError("connection refused")
        if temperature == 0:
            assert n == 1, "vLLM: n must be 1 when using greedy sampling"
        else:
            self.seeds.append(generation_kwargs["seed"])
        ids = [random_tokens(0, 3 + member, self.eos) for _ in prompts for member in range(n)]
        logprobs = [[[-1.0]] * len(one) for one in ids]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logprobs}


def serve(trainer, server):
    """Let a trainer's own code ask this server; weights are not sent."""
    trainer.use_vllm, trainer.args.vllm_mode, trainer.args.vllm_server_timeout = True, "server", 0.2
    generation = object.__new__(VLLMGeneration)
    generation.accelerator, generation.mode, generation.vllm_client = trainer.accelerator, "server", server
    generation.temperature, generation.top_p, generation.top_k, generation.min_p = 1.0, 1.0, 0, None
    generation.repetition_penalty, generation.max_completion_length, generation.logprobs = 1.0, 16, 0
    generation.enable_sleep_mode, generation.structured_outputs_regex, generation.generation_kwargs = False, None, {}
    generation._weight_metadata, generation._iter_named_params = [], lambda: iter([])
    trainer.vllm_generation, trainer._last_loaded_step = generation, -1
    rollout_server.make_patient(server, 0.2)
    return trainer


def test_a_server_that_is_away_for_a_while_is_asked_again_with_the_same_seed(tmp_path):
    steady, away = Server(0, 1), Server(2, 1)
    for name, server in (("steady", steady), ("away", away)):
        trainer = make_trainer(tmp_path / name, kind=DapoTrainer, max_steps=2, max_logp_gap=100.0)
        serve(trainer, server).train()
        assert trainer.state.global_step == 2
    assert steady.seeds == away.seeds and len(set(steady.seeds)) == 2


def test_a_server_ranks_each_row_of_the_consistency_check_once_without_sampling(tmp_path):
    trainer = serve(make_trainer(tmp_path, kind=DapoTrainer, max_logp_gap=100.0), Server(0, 1))
    assert len(trainer.generate_greedily(["Rank: 1 2", "Rank: 3 4", "Rank: 5 6"])) == 3
    assert trainer.vllm_generation.temperature == 1.0


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, kind=DapoTrainer, max_steps=3, max_logp_gap=100.0)
    server = Server(0, 1)
    serve(trainer, server)
    answer = server.generate
    calls = []

    def answer_twice(**options):
        calls.append(1)
        if len(calls) > 2:
            server.calls_away = 99
        return answer(**options)

    server.generate = answer_twice
    with pytest.raises(ValueError, match=r"the vLLM server at http://\S+ is gone; start it again, .* from step 2"):
        trainer.train()
    sampling = json.loads((tmp_path / "out/checkpoint-2/sampling.json").read_text())
    assert sampling["num_drawn"] == 4  # two steps of two prompts: those of the third are drawn again
    assert (tmp_path / "out/checkpoint-2/trainer_state.json").is_file()


def test_a_server_that_takes_no_weights_is_not_sampled_from(tmp_path):
    trainer = make_trainer(tmp_path, kind=DapoTrainer, max_steps=3, max_logp_gap=100.0)
    server = Server(0, 1)
    serve(trainer, server)
    send = server.update_named_params
    server.update_named_params = lambda *args: (
        setattr(server, "refuses_weights", len(server.seeds) == 1),
        send(*args),
    )
    with pytest.raises(ValueError, match=r"the vLLM server at http://\S+ is gone; start it again, .* from step 1"):
        trainer.train()
    assert len(server.seeds) == 1 and (tmp_path / "out/checkpoint-1/trainer_state.json").is_file()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sampling.json is missing: no checkpoint of this stage; delete"):
        make_trainer(tmp_path).go_on_from(str(tmp_path))


def test_an_invalid_completion_is_below_every_outcome_of_a_reward(tmp_path):
    args = dapo.DapoArguments(run_dir="run", rewards=[{"name": "well_formed"}], invalid_reward=-1.0)
    functions, reward_weights = dapo.reward_functions(args, 16, tokenizer().eos_token_id)
    trainer = make_trainer(tmp_path, rewards=[*functions, num_tokens], reward_weights=[*reward_weights, 1.0])
    (drawn,) = trainer.prompts.draw(1)
    assert trainer.sampler._outcome(drawn, None, [float("nan"), -1.0, float("nan")]) == -float("inf")
    assert trainer.sampler._outcome(drawn, [0, 1, 2, 3], [1.0, float("nan"), 4.0]) == 4.0
