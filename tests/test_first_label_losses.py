"""Losses on the first label of a ranking: by hand, against slow loops, their gradients, and what they refuse."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rerank.losses import FirstLabels, Head, LossInfo, example_first_labels, load_losses
from rerank.losses.ranknet import weighted_ranknet
from rerank.losses.soft_targets import soft_targets
from rerank.rows import RankingRow
from rerank.sft.rows import ranks_of

NAN = math.nan


def labels_of(logits, ranks, grades, scores):
    as_tensors = (torch.tensor(values, dtype=torch.float64) for values in (logits, grades, scores))
    logits, grades, scores = as_tensors
    return FirstLabels(logits.requires_grad_(), torch.tensor(ranks), grades, scores)


def inputs_of(labels):
    """Inputs whose states at the first label, by a head that is the identity, are the logits."""
    rows, size = labels.logits.shape
    plain = example_first_labels()
    states = torch.stack([labels.logits, torch.zeros_like(labels.logits)], dim=1)
    batch = {"first_label": torch.ones(rows, dtype=torch.long), "ranks": labels.ranks, "grades": labels.grades}
    batch |= {"label_tokens": torch.arange(size).expand(rows, size), "teacher_scores": labels.teacher_scores}
    return replace(plain, states=states, batch=batch, head=Head(torch.eye(size, dtype=torch.float64)))


RANDOM = labels_of(
    np.random.default_rng(0).standard_normal((3, 5)).tolist(),
    [[2, 1, 4, 3, 5], [3, 0, 1, 3, 2], [2, 1, 0, 0, 0]],  # all seen; one not seen, two behind a top 2; two candidates
    [[2, 2, 0, 1, 0], [0, NAN, 1, 0, 0], [0, 1, NAN, NAN, NAN]],
    [[0.5, 1, -1, 0, -2], [0, 9, 1, 2, 3], [1, 2, NAN, NAN, NAN]],
)


def test_ranknet_of_three_candidates_by_hand():
    labels = labels_of([[2.0, 0.0, 1.0]], [[1, 3, 2]], [[1, 0, 0]], [[NAN] * 3])
    # ranks 1 and 2: logits 2 and 1, weight 1/3; ranks 1 and 3: 2 and 0, 1/4; ranks 2 and 3: 1 and 0, 1/5
    one, two = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))
    assert weighted_ranknet(labels).item() == pytest.approx((one / 3 + two / 4 + one / 5) / 3)


def test_ranknet_equals_a_slow_loop():
    for row, value in enumerate(weighted_ranknet(RANDOM).tolist()):
        ranks, logits = RANDOM.ranks[row].tolist(), RANDOM.logits[row].tolist()
        pairs = [(i, j) for i, j in itertools.permutations(range(5), 2) if 0 < ranks[i] < ranks[j]]
        terms = [math.log1p(math.exp(logits[j] - logits[i])) / (ranks[i] + ranks[j]) for i, j in pairs]
        assert len(pairs) == (10, 5, 1)[row] and value == pytest.approx(sum(terms) / len(pairs))


def test_soft_targets_of_two_candidates_by_hand():
    labels = labels_of([[1.0, 0.0]], [[2, 1]], [[0, 1]], [[0.0, math.log(3)]])
    # relevance (0, 1), the teacher's softmax (1/4, 3/4): at weight .8 targets are (.2, .8)
    loss = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert soft_targets(inputs_of(labels)).item() == pytest.approx(0.2 * loss[0] + 0.8 * loss[1])
    # at temperature .5 scores are (0, 2 log 3), so that the softmax is (1/10, 9/10)
    assert soft_targets(inputs_of(labels), 1, 0.5).item() == pytest.approx(0.1 * loss[0] + 0.9 * loss[1])
    assert soft_targets(inputs_of(labels), 0).item() == pytest.approx(loss[1])


@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_soft_targets_equal_a_slow_loop(weight):
    for row, value in enumerate(soft_targets(inputs_of(RANDOM), weight, 2.0).tolist()):
        grades, logits = RANDOM.grades[row].tolist(), RANDOM.logits[row].tolist()
        seen = [place for place in range(5) if not math.isnan(grades[place])]
        best = [place for place in seen if grades[place] == max(grades[k] for k in seen)]
        scores = {place: math.exp(RANDOM.teacher_scores[row, place].item() / 2) for place in seen}
        total = math.log(sum(math.exp(logits[place]) for place in seen))
        loss = 0.0
        for place in seen:
            target = (1 - weight) * (place in best) / len(best) + weight * scores[place] / sum(scores.values())
            loss -= target * (logits[place] - total)
        assert value == pytest.approx(loss)


def test_both_losses_pull_the_best_up_and_the_worst_down_and_leave_what_was_not_seen():
    for values in (weighted_ranknet(RANDOM), soft_targets(inputs_of(RANDOM), 0.2)):
        (gradient,) = torch.autograd.grad(values.sum(), RANDOM.logits, retain_graph=True)
        for row, ranks in enumerate(RANDOM.ranks.tolist()):
            assert gradient[row, ranks.index(1)] < 0 < gradient[row, ranks.index(max(ranks))]
            assert all(gradient[row, place] == 0 for place in range(5) if ranks[place] == 0)


def test_logits_are_those_of_the_labels_tokens_before_the_first_label():
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 5, 3, generator=generator), torch.randn(9, 3, generator=generator)
    batch = {"first_label": torch.tensor([4, 2]), "label_tokens": torch.tensor([[8, 1, 5], [5, 7, 0]])}
    unknown = torch.zeros(2, 3)
    batch |= {"ranks": unknown, "grades": unknown, "teacher_scores": unknown}
    head = Head(weight, torch.arange(9.0), softcap=2.0)
    inputs = replace(example_first_labels(), states=states, batch=batch, head=head)
    for row, (place, tokens) in enumerate(((3, [8, 1, 5]), (1, [5, 7, 0]))):
        plain = 2 * torch.tanh((weight @ states[row, place] + torch.arange(9.0)) / 2)
        assert torch.allclose(inputs.first_labels.logits[row], plain[tokens], atol=1e-6)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"name": "soft_targets", "kwargs": {"weight": 2}}], "loss soft_targets: weight is 2 but must be at least 0"),
        ([{"name": "soft_targets", "kwargs": {"temperature": 0}}], "loss soft_targets: temperature is 0 but must be"),
        (
            [{"name": "nll"}, {"name": "ranknet", "kwargs": {"weight": 0}}],
            "loss ranknet: weight is 0 but must be above",
        ),
        ([{"name": "soft_targets"}, {"name": "nll"}], "soft_targets and nll are token losses; give exactly one"),
        ([{"name": "ranknet"}], "losses has no token loss"),
    ],
)
def test_bad_parameters_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        load_losses(losses, "rerank")


def test_a_loss_that_does_not_declare_the_first_label_cannot_read_it(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(inputs):\n    return inputs.first_labels.logits[:, 0]\n")
    with pytest.raises(ValueError, match=r"mine: first_labels is for .*LossInfo\(\('rerank',\), first_label=True"):
        load_losses([{"name": f"{tmp_path}/mine.py:mine"}], "rerank")
    with pytest.raises(ValueError, match=r"is for rankings, but tasks is \('next_item', 'rerank'\); write"):
        LossInfo(first_label=True)


def test_ranks_leave_out_what_was_not_seen_and_tie_behind_the_best_k():
    row = RankingRow(0, (), (4, 5, 6, 7), (0.0, NAN, 1.0, 0.0))
    assert ranks_of(row, [2, 1, 3, 0]) == [3, 0, 1, 2]
    assert ranks_of(row, [2, 1, 3, 0], top_k=1) == [2, 0, 1, 2]
