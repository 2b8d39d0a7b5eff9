import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rerank.next_item.beam_decoder import BeamDecoder, shared_cache_obstacle
from rerank.next_item.beam_search import beam_search
from rerank.next_item.prefix_index import PrefixIndex

VOCABULARY = 40
HISTORIES = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [1, 1]]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,  # peaked: beams differ from an exhaustive search
}

# Qwen3 and GPT-2 with SDPA and Llama with eager attention share a history; the others get copies of it.
MODELS = {
    "qwen3": {"head_dim": 8},
    "llama": {"attn_implementation": "eager"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # absolute positions
    "mistral": {"sliding_window": 4},
    "bloom": {"n_layer": 2, "n_head": 4, "attn_implementation": "eager"},  # positions as a bias of its own
}
COPIED = {"mistral": "the model keeps DynamicSlidingWindowLayer", "bloom": "attention in a way of its own"}


def make_model(name: str, **changes):
    settings = {**SIZES, "bos_token_id": 0, "eos_token_id": 0, **MODELS[name], **changes}
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


def catalogue(num_items: int = 30) -> list[list[int]]:
    codes = np.random.default_rng(1).integers(0, 4, (num_items, 3))
    return (codes + [10, 14, 18]).tolist()  # some of the 64 ids are shared by two items


def sequence_logp(model, history, sequence, sequences=None) -> float:
    """Log-probability of a sequence after a history, by one forward; over tokens that continue to one, when given."""
    with torch.no_grad():
        logits = model(torch.tensor([history + sequence])).logits[0].double()
    total = 0.0
    for place, token in enumerate(sequence):
        scores = logits[len(history) + place - 1]
        before = [s for s in sequences or () if len(s) > place and s[:place] == sequence[:place]]
        valid = sorted({s[place] for s in before}) if sequences else slice(None)
        total += float(scores[token] - torch.logsumexp(scores[valid], dim=0))
    return total


def slow_beam_search(model, history, sequences, num_beams, excluded=(), constrained=False):
    """Beam search in plain Python: items, best first, their log-probabilities, and the best that was dropped."""
    wanted = [s for item, s in enumerate(sequences) if item not in excluded]
    beams, dropped = [(0.0, [], True)], -np.inf  # log-probability, prefix, whether it continues
    while any(is_open for _, _, is_open in beams):
        grown = [beam for beam in beams if not beam[2]]
        for prefix in (prefix for _, prefix, is_open in beams if is_open):
            below = [s for s in wanted if len(s) > len(prefix) and s[: len(prefix)] == prefix]
            for new in ([*prefix, token] for token in sorted({s[len(prefix)] for s in below})):
                logp = sequence_logp(model, history, new, sequences if constrained else None)
                grown += [(logp, new, False)] if new in below else []
                grown += [(logp, new, True)] if any(s != new and s[: len(new)] == new for s in below) else []
        grown.sort(key=lambda beam: (-round(beam[0], 4), len(beam[1]), beam))  # ties in the order of the index
        beams, dropped = grown[:num_beams], max([dropped, *(logp for logp, _, _ in grown[num_beams:])])
    found = [(item, logp) for logp, sequence, _ in beams for item, s in enumerate(sequences)
             if s == sequence and item not in excluded]  # fmt: skip
    return [item for item, _ in found], [logp for _, logp in found], dropped


def assert_equals_slow_search(result, model, sequences, num_beams, excluded=((),) * 4, constrained=False):
    for row, history in enumerate(HISTORIES):
        items, logps, dropped = slow_beam_search(model, history, sequences, num_beams, excluded[row], constrained)
        assert result.items[row] == items
        assert [*result.logps[row], result.best_dropped[row]] == pytest.approx([*logps, dropped], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_any_architecture_equals_a_slow_loop(name, caplog):
    model, sequences = make_model(name), catalogue()
    for num_beams in (1, 3, len(sequences)):
        with caplog.at_level(logging.INFO):
            result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=num_beams, batch_size=3)
        assert_equals_slow_search(result, model, sequences, num_beams)
    copied = [record.message for record in caplog.records if "gets a copy of its history" in record.message]
    assert [COPIED[name] in message for message in copied] == ([True] * 3 if name in COPIED else [])


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("num_beams", [1, 2, 4, 40])
def test_any_sequences_are_found_as_by_a_slow_loop(model, num_beams, constrained):
    rng = np.random.default_rng(3)
    unequal = [rng.integers(10, 14, length).tolist() for length in rng.integers(1, 5, 40)]  # some begin others
    excluded = [range(0, 40, 2), [], range(40), rng.permutation(40)[:30].tolist()]  # of ids of one length
    for sequences, left_out in ((unequal, [[]] * 4), (catalogue(40), excluded)):
        index = PrefixIndex.build(sequences)
        result = beam_search(model, HISTORIES, index, num_beams, excluded=left_out, constrained=constrained)
        assert_equals_slow_search(result, model, sequences, num_beams, left_out, constrained)


def test_a_model_in_bfloat16_scores_every_item_as_one_forward_does():
    model = make_model("qwen3", initializer_range=0.1).to(torch.bfloat16)
    sequences = catalogue()
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=len(sequences))
    for history, items, logps in zip(HISTORIES, result.items, result.logps, strict=True):
        assert sorted(items) == list(range(len(sequences))) and logps == sorted(logps, reverse=True)
        # three logits, each with 8 significant bits and below 4 in size: off by at most 4/256 / 2, twice
        expected = [sequence_logp(model, history, sequences[item]) for item in items]
        assert logps == pytest.approx(expected, abs=3 * 2 * 4 / 256 / 2)


def test_on_ties_the_items_that_come_first_in_the_index_win():
    model = make_model("qwen3", tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()  # every token is as likely as any other
    sequences = [[first, second] for first in range(10, 39) for second in (39, 38, 37)]
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=4)
    # of the first tokens 10 to 13 stay, then of theirs, in token order, 10-37, 10-38, 10-39 and 11-37
    assert result.items == [[2, 1, 0, 5]] * len(HISTORIES)


def test_beams_share_one_copy_of_the_history(model):
    rng = np.random.default_rng(0)
    shared, copied = BeamDecoder(model, HISTORIES, shared=True), BeamDecoder(model, HISTORIES, shared=False)
    torch.testing.assert_close(shared.logits, copied.logits)
    for num_beams, num_before in ((3, 1), (6, 3), (2, 6)):
        step = rng.integers(0, num_before, (4, num_beams)), rng.integers(0, VOCABULARY, (4, num_beams))
        torch.testing.assert_close(shared.step(*step), copied.step(*step), atol=1e-4, rtol=1e-4)
    (keys, *_), (copied_keys, *_) = next(iter(shared.cache)), next(iter(copied.cache))
    assert (keys.shape[0], keys.shape[2]) == (4, 5 + 3 + 6 + 2)  # four rows; the longest history and a token per beam
    assert (copied_keys.shape[0], copied_keys.shape[2]) == (4 * 2, 5 + 3)  # a row per beam; three tokens each


def test_attention_that_takes_no_mask_per_beam_is_named():
    model = make_model("qwen3")
    model.config._attn_implementation = "flash_attention_2"
    assert shared_cache_obstacle(model).startswith("attention flash_attention_2 takes no mask per beam")


def test_a_model_without_keys_and_values_is_refused():
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=40, hidden_size=8, state_size=2))
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values"):
        beam_search(mamba, [[1]], PrefixIndex.build([[10]]), num_beams=1)


@pytest.mark.parametrize("constrained", [False, True])
def test_only_allowed_items_are_found_and_they_alone_take_beams(model, constrained):
    sequences = [*catalogue(), [10], [10, 14], [13, 17]]
    index = PrefixIndex.build(sequences)
    for allowed in ([3], range(0, 33, 2), list(range(32)), [1, 30, 31, 77]):
        known = [item for item in allowed if item < len(sequences)]
        only = PrefixIndex.build([sequences[item] for item in known], known)
        for num_beams in (2, 33):
            expected = beam_search(model, HISTORIES, only, num_beams, constrained=constrained)
            result = beam_search(model, HISTORIES, index, num_beams, allowed=allowed, constrained=constrained)
            assert result.items == expected.items
            np.testing.assert_allclose(np.concatenate(result.logps), np.concatenate(expected.logps), atol=1e-5)


def test_an_excluded_item_leaves_those_with_the_same_or_a_longer_sequence_and_takes_no_beam(model):
    index = PrefixIndex.build([[10], [10, 14], [11, 15], [11, 15]])
    result = beam_search(model, [[1], [1]], index, num_beams=2, excluded=[[0, 1, 2, 3], [0, 2]])
    assert [sorted(items) for items in result.items] == [[], [1, 3]]


def test_allowed_and_excluded_items_go_together(model):
    index = PrefixIndex.build(catalogue())
    result = beam_search(model, HISTORIES, index, 30, allowed=range(12), excluded=[[0, 20], [1, 2], [], range(12)])
    assert [set(items) for items in result.items] == [{*range(1, 12)}, {0, *range(3, 12)}, {*range(12)}, set()]


def test_a_beam_wider_than_the_catalogue_warns_once_and_finds_every_item(model, caplog):
    index = PrefixIndex.build(catalogue())
    wide = beam_search(model, HISTORIES, index, num_beams=31, batch_size=2)
    assert [record.message for record in caplog.records] == [
        "num_beams is 31 but the prefix index has 30 items; that many are enough"
    ]
    assert wide == beam_search(model, HISTORIES, index, num_beams=30, batch_size=2)
    assert len(caplog.records) == 1


def test_num_items_cuts_the_list_and_bounds_nothing_else(model):
    index = PrefixIndex.build(catalogue())
    full = beam_search(model, HISTORIES, index, num_beams=5)
    cut = beam_search(model, HISTORIES, index, num_beams=5, num_items=2)
    assert cut.items == [items[:2] for items in full.items]
    assert cut.logps == [logps[:2] for logps in full.logps] and cut.best_dropped == full.best_dropped


def test_a_model_in_training_with_a_sampling_config_is_searched_without_dropout_and_left_as_it_was():
    sequences, llama = catalogue(), make_model("llama", attention_dropout=0.5).train()
    llama.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    result = beam_search(llama, HISTORIES, PrefixIndex.build(sequences), num_beams=3)
    assert llama.training
    assert_equals_slow_search(result, llama.eval(), sequences, 3)


def test_no_rows_give_no_results(model):
    assert beam_search(model, [], PrefixIndex.build([[1]])).items == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0 but must be at least 1"),
        ({"num_items": 0}, "num_items is 0 but must be at least 1"),
        ({"excluded": [[1]]}, "excluded has 1 rows but input_ids 2"),
        ({"input_ids": [[1], []]}, "row 1 of input_ids is empty"),
        ({"allowed": [1, 2]}, "none of the 2 allowed items is among the 1 of the prefix index"),
        ({"index": PrefixIndex.build([[1, 40]])}, "the prefix index has token 40 but the model only 40"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    good = {"input_ids": [[1], [2]], "index": PrefixIndex.build([[1, 2]]), "num_beams": 1}
    with pytest.raises(ValueError, match=message):
        beam_search(model, **{**good, **arguments})


def test_nan_logits_are_refused():
    broken = make_model("qwen3")
    broken.lm_head.weight.data[10] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        beam_search(broken, [[1]], PrefixIndex.build([[10]]))
