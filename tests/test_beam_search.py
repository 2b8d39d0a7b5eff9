import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rerank.beam_search import beam_search
from rerank.prefix_index import PrefixIndex

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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()


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
    """Beam search in plain Python, for sequences of one length: the best distinct sequences, best first."""
    beams = [[]]
    for depth in range(len(sequences[0])):
        grown = {tuple(s[: depth + 1]) for s in sequences if list(s[:depth]) in beams}
        beams = sorted(map(list, grown), key=lambda prefix: -sequence_logp(model, history, prefix))[:num_beams]
    return beams


def exhaustive(model, history, sequences, **kwargs) -> list[tuple[float, int]]:
    scored = [(sequence_logp(model, history, s, **kwargs), item) for item, s in enumerate(sequences)]
    return sorted(scored, key=lambda pair: (-round(pair[0], 4), pair[1]))


def assert_equals_exhaustive(result, row, expected):
    assert result.items[row] == [item for _, item in expected]
    np.testing.assert_allclose(result.logps[row], [logp for logp, _ in expected], atol=1e-4)


def test_with_as_many_beams_as_items_every_item_comes_in_the_order_of_its_probability(model):
    sequences = catalogue()
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=len(sequences))
    for row, history in enumerate(HISTORIES):
        assert_equals_exhaustive(result, row, exhaustive(model, history, sequences))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_few_beams_equal_a_slow_loop(model, num_beams):
    sequences = catalogue()
    result = beam_search(model, HISTORIES, PrefixIndex.build(sequences), num_beams=num_beams, batch_size=3)
    for row, history in enumerate(HISTORIES):
        best = slow_beam_search(model, history, sequences, num_beams)
        assert result.items[row] == [item for s in best for item in range(len(sequences)) if sequences[item] == s]


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


def test_mask_first_normalises_over_the_catalogues_continuations(model):
    sequences = catalogue()

    def allowed(prefix: list[int]) -> list[int]:
        return sorted({s[len(prefix)] for s in sequences if s[: len(prefix)] == prefix})

    index = PrefixIndex.build(sequences)
    result = beam_search(model, HISTORIES, index, num_beams=len(sequences), mask_first=True)
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
        ({"index": PrefixIndex.build([[1, 40]])}, "the prefix index has token 40 but the model only 40"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    good = {"input_ids": [[1], [2]], "index": PrefixIndex.build([[1, 2]])}
    with pytest.raises(ValueError, match=message):
        beam_search(model, **{**good, **arguments})


def test_nan_logits_are_refused():
    torch.manual_seed(0)
    broken = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    broken.lm_head.weight.data[10] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        beam_search(broken, [[1]], PrefixIndex.build([[10]]))
