import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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


def sequence_logp(model, history, sequence, allowed=None) -> float:
    """Log-probability of a sequence after a history, by one forward; over `allowed(prefix)` tokens when given."""
    with torch.no_grad():
        logits = model(torch.tensor([history + sequence])).logits[0].double()
    total = 0.0
    for place, token in enumerate(sequence):
        scores = logits[len(history) + place - 1]
        chosen = scores if allowed is None else scores[allowed(sequence[:place])]
        total += float(scores[token] - torch.logsumexp(chosen, dim=0))
    return total


def slow_beam_search(model, history, sequences, num_beams) -> list[list[int]]:
    """Beam search in plain Python: the best distinct sequences, best first."""
    beams = [(0.0, [], True)]  # log-probability, prefix, whether it continues
    while any(is_open for _, _, is_open in beams):
        grown = [beam for beam in beams if not beam[2]]
        for prefix in (prefix for _, prefix, is_open in beams if is_open):
            below = [s for s in sequences if len(s) > len(prefix) and s[: len(prefix)] == prefix]
            for new in ([*prefix, token] for token in sorted({s[len(prefix)] for s in below})):
                logp = sequence_logp(model, history, new)
                grown += [(logp, new, False)] if new in below else []
                grown += [(logp, new, True)] if any(s != new and s[: len(new)] == new for s in below) else []
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return [prefix for _, prefix, _ in beams]


def exhaustive(model, history, sequences, **kwargs) -> list[tuple[float, int]]:
    scored = [(sequence_logp(model, history, s, **kwargs), item) for item, s in enumerate(sequences)]
    return sorted(scored, key=lambda pair: (-round(pair[0], 4), pair[1]))


def assert_equals_exhaustive(result, row, expected):
    assert result.items[row] == [item for _, item in expected]
    np.testing.assert_allclose(result.logps[row], [logp for logp, _ in expected], atol=1e-4)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("num_items", [None, 2])
def test_nothing_that_the_beams_lost_is_more_probable_than_the_best_that_they_dropped(model, constrained, num_items):
    sequences, options = catalogue(), {"excluded": [[3, 4], [], range(10), [7]], "constrained": constrained}
    index = PrefixIndex.build(sequences)
    everything = beam_search(model, HISTORIES, index, num_beams=len(sequences), **options)
    assert everything.best_dropped == [-np.inf] * len(HISTORIES)
    lost = []
    for num_beams in (1, 2, 5, 10):
        found = beam_search(model, HISTORIES, index, num_beams=num_beams, num_items=num_items, **options)
        for row in range(len(HISTORIES)):
            pairs = zip(everything.items[row], everything.logps[row], strict=True)
            left, last = max(logp for item, logp in pairs if item not in found.items[row]), found.logps[row][-1]
            assert left <= max(found.best_dropped[row], last) + 1e-4
            lost.append(left > last + 1e-4)
    assert any(lost) and not all(lost)  # some lists are not the most probable


def test_the_best_that_was_dropped_by_hand():
    """Two levels of two tokens, all equally probable: with one beam, half of each level is dropped."""
    uniform = make_model("qwen3")
    torch.nn.init.zeros_(uniform.lm_head.weight)
    index = PrefixIndex.build([[10, 14], [10, 15], [11, 14], [11, 15]])
    for num_beams, logp in ((1, -np.log(2)), (2, -2 * np.log(2)), (3, -2 * np.log(2)), (4, -np.inf)):
        found = beam_search(uniform, [[1, 2]], index, num_beams=num_beams, constrained=True)
        assert found.best_dropped == pytest.approx([logp])
    # two beams hold both first tokens; the first of them ends an item and leads to another, which is one too many
    index = PrefixIndex.build([[10], [10, 14], [11]])
    for num_beams, logp in ((1, -np.log(2)), (2, -np.log(2)), (3, -np.inf)):
        found = beam_search(uniform, [[1, 2]], index, num_beams=num_beams, constrained=True)
        assert found.best_dropped == pytest.approx([logp])


@pytest.mark.parametrize("name", MODELS)
def test_any_architecture_equals_a_slow_loop(name):
    model = make_model(name)
    sequences = catalogue()
    for num_beams in (1, 3, len(sequences)):
        result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=num_beams, batch_size=3)
        for row, history in enumerate(HISTORIES):
            best = slow_beam_search(model, history, sequences, num_beams)
            assert result.items[row] == [item for s in best for item in range(len(sequences)) if sequences[item] == s]
            expected = [sequence_logp(model, history, sequences[item]) for item in result.items[row]]
            np.testing.assert_allclose(result.logps[row], expected, atol=1e-4)
            if num_beams == len(sequences):
                assert_equals_exhaustive(result, row, exhaustive(model, history, sequences))


@pytest.mark.parametrize("num_beams", [2, 4])
def test_few_beams_equal_a_slow_loop_for_sequences_of_unequal_length(model, num_beams):
    rng = np.random.default_rng(3)
    drawn = {tuple((rng.integers(10, 14, rng.integers(1, 5))).tolist()) for _ in range(40)}
    sequences = [list(s) for s in sorted(drawn)]
    assert any(b[: len(a)] == a for a in sequences for b in sequences if len(b) > len(a))
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=num_beams)
    for row, history in enumerate(HISTORIES):
        assert [sequences[i] for i in result.items[row]] == slow_beam_search(model, history, sequences, num_beams)
        lost = [sequence for item, sequence in enumerate(sequences) if item not in result.items[row]]
        assert max(sequence_logp(model, history, s) for s in lost) <= result.best_dropped[row] + 1e-4


@pytest.mark.parametrize("num_beams", [3, 8])
def test_rows_whose_beams_have_ended_do_not_disturb_longer_ones(model, num_beams):
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 7, 40)
    index = PrefixIndex.build([rng.integers(10, 14, length).tolist() for length in lengths])
    histories = rng.integers(1, 10, (60, 3)).tolist()
    together = beam_search(model, histories, index, num_beams)
    alone = [beam_search(model, [history], index, num_beams) for history in histories]
    assert together.items == [found.items[0] for found in alone]


def test_a_model_in_bfloat16_scores_every_item_as_one_forward_does():
    model = make_model("qwen3", initializer_range=0.1).to(torch.bfloat16)
    sequences = catalogue()
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=len(sequences))
    for row, history in enumerate(HISTORIES):
        assert sorted(result.items[row]) == list(range(len(sequences)))
        assert result.logps[row] == sorted(result.logps[row], reverse=True)
        expected = [sequence_logp(model, history, sequences[item]) for item in result.items[row]]
        # three logits, each with 8 significant bits and below 4 in size: off by at most 4/256 / 2, twice
        np.testing.assert_allclose(result.logps[row], expected, atol=3 * 2 * 4 / 256 / 2)


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


@pytest.mark.parametrize("name", MODELS)
def test_a_history_is_copied_only_for_models_that_cannot_share_it(name, caplog):
    model = make_model(name)
    with caplog.at_level(logging.INFO):
        beam_search(model, [[1]], PrefixIndex.build([[10], [11]]), num_beams=2)
    copied = [record.message for record in caplog.records if "gets a copy of its history" in record.message]
    assert [COPIED[name] in message for message in copied] == ([True] if name in COPIED else [])


def test_attention_that_takes_no_mask_per_beam_is_named(model):
    model = make_model("qwen3")
    model.config._attn_implementation = "flash_attention_2"
    assert shared_cache_obstacle(model).startswith("attention flash_attention_2 takes no mask per beam")


def test_a_model_without_keys_and_values_is_refused():
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=40, hidden_size=8, state_size=2))
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values"):
        beam_search(mamba, [[1]], PrefixIndex.build([[10]]), num_beams=1)


def test_few_beams_differ_from_an_exhaustive_search_somewhere(model):
    # else the two tests above would be one
    sequences = catalogue()
    greedy = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=1, num_items=1)
    best = [exhaustive(model, history, sequences)[0][1] for history in HISTORIES]
    assert [items[0] for items in greedy.items] != best


def test_sequences_of_unequal_length_are_exact_too(model):
    sequences = [[10], [10, 14, 18], [11, 15], [10, 14], [12, 15, 19, 20]]
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=len(sequences))
    for row, history in enumerate(HISTORIES):
        assert_equals_exhaustive(result, row, exhaustive(model, history, sequences))


def test_constrained_probabilities_are_over_the_catalogues_continuations(model):
    sequences = catalogue()

    def allowed(prefix: list[int]) -> list[int]:
        return sorted({s[len(prefix)] for s in sequences if s[: len(prefix)] == prefix})

    index = PrefixIndex.build(sequences)
    result = beam_search(model, HISTORIES, index, num_beams=len(sequences), constrained=True)
    for row, history in enumerate(HISTORIES):
        assert_equals_exhaustive(result, row, exhaustive(model, history, sequences, allowed=allowed))
        # the catalogue is all there is now: probabilities of distinct ids sum to one
        shared = {tuple(sequences[i]): p for i, p in zip(result.items[row], result.logps[row], strict=True)}
        assert sum(np.exp(list(shared.values()))) == pytest.approx(1, abs=1e-5)


def test_excluded_items_are_left_out_and_take_no_beam(model):
    sequences = catalogue()
    index = PrefixIndex.build(sequences)
    order = [[item for _, item in exhaustive(model, history, sequences)] for history in HISTORIES]
    excluded = [set(items[:20]) for items in order]
    result = beam_search(model, HISTORIES, index, num_beams=len(sequences), excluded=excluded)
    assert result.items == [items[20:] for items in order]
    # ten items are left: ten beams are enough to find them all, so no excluded prefix held one
    assert beam_search(model, HISTORIES, index, num_beams=10, excluded=excluded).items == result.items


def test_an_excluded_item_leaves_those_with_the_same_or_a_longer_sequence(model):
    index = PrefixIndex.build([[10], [10, 14], [11, 15], [11, 15]])
    result = beam_search(model, [[1], [1]], index, excluded=[[0, 2], [0, 1, 2, 3]])
    assert sorted(result.items[0]) == [1, 3]
    assert result.items[1] == [] and result.logps[1] == []


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


def test_batches_and_padding_do_not_matter(model):
    index = PrefixIndex.build(catalogue())
    together = beam_search(model, HISTORIES, index, num_beams=5)
    for row, history in enumerate(HISTORIES):
        alone = beam_search(model, [history], index, num_beams=5)
        assert together.items[row] == alone.items[0]
        np.testing.assert_allclose(together.logps[row], alone.logps[0], atol=1e-4)


def test_num_items_cuts_the_list_and_bounds_nothing_else(model):
    index = PrefixIndex.build(catalogue())
    full = beam_search(model, HISTORIES, index, num_beams=5)
    cut = beam_search(model, HISTORIES, index, num_beams=5, num_items=2)
    assert cut.items == [items[:2] for items in full.items]
    assert cut.logps == [logps[:2] for logps in full.logps]


def test_another_architecture_with_a_sampling_config_and_dropout_gives_the_same_beams_twice():
    torch.manual_seed(1)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    llama.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    sequences = catalogue()
    result = beam_search(llama, HISTORIES, PrefixIndex.build(sequences), num_beams=len(sequences))
    assert llama.training  # left as it was found
    llama.eval()
    for row, history in enumerate(HISTORIES):
        assert_equals_exhaustive(result, row, exhaustive(llama, history, sequences))


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
    torch.manual_seed(0)
    broken = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    broken.lm_head.weight.data[10] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        beam_search(broken, [[1]], PrefixIndex.build([[10]]))
