"""Token losses by hand, against slow versions and against the papers' formulas; what a recipe may name."""

import dataclasses
import math
import textwrap

import pytest
import torch

from rerank import cli, loss_inputs, losses
from rerank.losses import Extra, Head, LossInputs, load_losses
from rerank.losses.bear import bear
from rerank.losses.lml import lml
from rerank.losses.msl import msl
from rerank.losses.nll import nll
from rerank.prefix_index import PrefixIndex

# Five items over tokens a = 0 .. 5: first tokens 0 (three items), 1 and 2; below 0 come 3, 4, 5.
ITEMS = [[0, 3], [0, 4], [0, 5], [1, 3], [2, 4]]
INDEX = PrefixIndex.build(ITEMS)
FIRST = {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.0625, 4: 0.03125, 5: 0.03125}  # over the whole vocabulary
SECOND = {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.125, 4: 0.0625, 5: 0.0625}


def inputs_of(distributions, labels, prefixes, index=INDEX):
    """Positions whose model probabilities are given: the head is the identity and states are log-probabilities."""
    states = torch.tensor([[math.log(p[token]) for token in range(6)] for p in distributions], dtype=torch.float64)
    nodes = [-1 if prefix is None else index.find(prefix) for prefix in prefixes]
    return LossInputs(
        hidden=states.requires_grad_(),
        labels=torch.tensor(labels),
        head=Head(torch.eye(6, dtype=torch.float64)),
        is_ranking=torch.ones(len(labels), dtype=torch.bool),
        nodes=torch.tensor(nodes),
        items=torch.full((len(labels),), -1),
        tasks=torch.zeros(len(labels), dtype=torch.long),
        index=index,
    )


def random_inputs(num=40, num_items=30, vocabulary=12, seed=0):
    """Random states and labels along the paths of a random catalogue of two tokens an item."""
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(36, generator=rng)[:num_items]
    index = PrefixIndex.build([[int(p) // 6, 6 + int(p) % 6] for p in pairs])
    offsets, tokens, _ = index.children(torch.arange(index.num_nodes).numpy())
    inner = [node for node in range(index.num_nodes) if offsets[node + 1] > offsets[node]]
    nodes = torch.tensor([inner[int(torch.randint(len(inner), (), generator=rng))] for _ in range(num)])
    labels = [
        int(tokens[offsets[n] + int(torch.randint(int(offsets[n + 1] - offsets[n]), (), generator=rng))])
        for n in nodes
    ]
    return LossInputs(
        hidden=torch.randn(num, 5, generator=rng, dtype=torch.float64).requires_grad_(),
        labels=torch.tensor(labels),
        head=Head(torch.randn(vocabulary, 5, generator=rng, dtype=torch.float64)),
        is_ranking=torch.ones(num, dtype=torch.bool),
        nodes=nodes,
        items=torch.full((num,), -1),
        tasks=torch.zeros(num, dtype=torch.long),
        index=index,
    )


def legal_tokens(index, node):
    return index.children(torch.tensor([node]).numpy())[1].tolist()


def test_lml_is_the_negative_log_probability_over_the_whole_vocabulary():
    values = lml(inputs_of([FIRST, SECOND], [1, 4], [[], [0]]))
    assert values.tolist() == pytest.approx([-math.log(0.25), -math.log(0.0625)])
    # at temperature 2 probabilities go with their square roots
    roots = sum(math.sqrt(p) for p in FIRST.values())
    assert lml(inputs_of([FIRST], [1], [[]]), temperature=2.0).tolist() == pytest.approx([-math.log(0.5 / roots)])


def test_nll_weighs_what_comes_before_the_end_of_the_trace():
    inputs = dataclasses.replace(
        inputs_of([FIRST, SECOND], [1, 4], [None, None]), is_ranking=torch.tensor([False, True]), index=None
    )
    values = nll(inputs, reasoning_weight=0.5, ranking_weight=2.0)
    assert values.tolist() == pytest.approx([-0.5 * math.log(0.25), -2 * math.log(0.0625)])
    logged = {name: [float(part) for part in pair] for name, pair in inputs.logged.items()}
    assert logged["reasoning_nll"] == pytest.approx([-math.log(0.25), 1])
    assert logged["ranking_nll"] == pytest.approx([-math.log(0.0625), 1])


def test_msl_is_over_the_tokens_that_continue_to_an_item():
    values = msl(inputs_of([FIRST, SECOND], [1, 4], [[], [0]]))
    # at the root 0, 1, 2 are legal: .25 / (.5 + .25 + .125); below 0 it is 3, 4, 5: .0625 / (.125 + .0625 + .0625)
    assert values.tolist() == pytest.approx([-math.log(2 / 7), -math.log(1 / 4)])


def test_msl_at_a_position_with_one_legal_token_is_zero_and_so_is_its_gradient():
    inputs = inputs_of([SECOND], [3], [[1]])
    value = msl(inputs)
    value.sum().backward()
    assert value.item() == 0 and inputs.hidden.grad.abs().max() == 0


def test_nll_of_next_items_is_lml():
    inputs = losses.example_inputs("next_item")
    assert torch.equal(nll(inputs), lml(inputs))


def test_msl_equals_lml_where_every_token_is_legal():
    inputs = random_inputs()
    every = PrefixIndex.build([[token] for token in range(12)])
    inputs = dataclasses.replace(inputs, index=every, nodes=torch.zeros_like(inputs.nodes))
    for temperature in (1.0, 0.7):
        assert torch.allclose(msl(inputs, temperature), lml(inputs, temperature), atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_that_are_kept_give_what_trls_kernel_gives(softcap, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    inputs = dataclasses.replace(
        random_inputs(), hidden=hidden, head=Head(weight, bias, softcap), labels=torch.tensor([3, 0, 11, 7, 3])
    )
    chosen, found = torch.tensor([True, False, True, True, False]), []
    for most in ((5 + 4) * 12, (5 + 4) * 12 - 1):  # five positions are kept; one number too many
        monkeypatch.setattr(loss_inputs, "MOST_KEPT", most)
        values = inputs.label_logps(temperature=0.7)
        found.append([values, *torch.autograd.grad(values @ torch.arange(1.0, 6), (hidden, weight, bias))])
        assert torch.allclose(inputs.label_logps(0.7, chosen), values[chosen])
    assert type(found[1][0].grad_fn).__name__ != type(found[0][0].grad_fn).__name__
    for kept, made_again in zip(*found, strict=True):
        assert torch.allclose(kept, made_again, atol=1e-5)


def test_msl_and_bear_equal_a_slow_loop():
    inputs = random_inputs()
    masked, weighted = msl(inputs, temperature=1.5).tolist(), bear(inputs, 2, xi=0.8, lambda_c=0.6).tolist()
    logits = inputs.hidden @ inputs.head.weight.T
    for position in range(len(inputs.labels)):
        legal = legal_tokens(inputs.index, int(inputs.nodes[position]))
        place = legal.index(int(inputs.labels[position]))
        assert masked[position] == pytest.approx(
            -torch.log_softmax(logits[position, legal] / 1.5, 0)[place].item(), abs=1e-12
        )
        logps = torch.log_softmax(logits[position, legal], 0)
        beta = sorted(logps.tolist(), reverse=True)[1] if len(legal) > 1 else logps.min().item()
        weight = 1 + 0.6 / (1 + math.exp(-(logps[place].item() - beta) / 0.8))
        assert weighted[position] == pytest.approx(-weight * logps[place].item(), abs=1e-12)


def test_bear_by_hand():
    values = bear(inputs_of([FIRST, SECOND], [1, 3], [[], [0]]), num_beams=1, xi=2.0, lambda_c=0.5)
    # root: P = 4/7, 2/7, 1/7 and beta = 4/7; label 1: sigmoid(log(1/2) / 2) = 1 / (1 + sqrt 2)
    first = (1 + 0.5 / (1 + math.sqrt(2))) * math.log(7 / 2)
    # below 0: P = 1/2, 1/4, 1/4 and beta = 1/2, the label itself: sigmoid(0) = 1/2
    second = (1 + 0.5 * 0.5) * math.log(2)
    assert values.tolist() == pytest.approx([first, second])


def test_bear_with_fewer_legal_tokens_than_beams_takes_the_smallest():
    values = bear(inputs_of([SECOND, SECOND], [3, 4], [[0], [0]]), num_beams=10, xi=1.0, lambda_c=0.5)
    # P = 1/2, 1/4, 1/4, beta = 1/4: sigmoid(log 2) = 2/3 for label 3, sigmoid(0) = 1/2 for label 4
    assert values.tolist() == pytest.approx([(1 + 0.5 * 2 / 3) * math.log(2), 1.25 * math.log(4)])


def test_bear_with_one_legal_token_costs_nothing():
    assert bear(inputs_of([SECOND], [3], [[1]]), lambda_c=3.0).tolist() == [0.0]


def test_bear_without_weight_is_msl():
    inputs = random_inputs()
    assert torch.allclose(bear(inputs, lambda_c=0.0), msl(inputs))
    assert not torch.allclose(bear(inputs, lambda_c=1.0), msl(inputs))


def test_bear_has_the_gradient_of_the_papers_formula():
    num_beams, xi, weight = 3, 0.7, 0.9  # lambda of the paper
    ours, paper = random_inputs(), random_inputs()
    bear(ours, num_beams, xi=xi, lambda_paper=weight).sum().backward()
    logits, total = paper.hidden @ paper.head.weight.T, 0.0
    for position in range(len(paper.labels)):
        legal = legal_tokens(paper.index, int(paper.nodes[position]))
        logps = torch.log_softmax(logits[position, legal], 0)
        logp = logps[legal.index(int(paper.labels[position]))]
        log_beta = logps.detach().sort(descending=True).values[min(num_beams, len(legal)) - 1]
        # L_SFT + lambda L_reg, L_reg = log sigmoid_xi(Delta), Delta = log beta - log P
        total = total - logp + weight * torch.nn.functional.logsigmoid((log_beta - logp) / xi)
    total.backward()
    assert torch.allclose(ours.hidden.grad, paper.hidden.grad, atol=1e-12)


def test_bears_two_weights_differ_by_xi():
    inputs = random_inputs()
    assert torch.equal(bear(inputs, xi=2.0, lambda_paper=0.5), bear(inputs, xi=2.0, lambda_c=0.25))
    assert torch.equal(bear(inputs), bear(inputs, lambda_c=0.25))


def test_bears_released_normaliser_is_the_weighted_mean_of_the_micro_batch():
    inputs = random_inputs()
    plain, released = bear(inputs, lambda_c=2.0), bear(inputs, lambda_c=2.0, normalise="weights")
    weights = (plain / msl(inputs)).nan_to_num(1 + 2 * 0.5)  # one legal token: no loss, and beta is the label's own
    assert released.mean().item() == pytest.approx((plain.sum() / weights.sum()).item())


def test_where_a_label_is_no_token_of_an_item_the_loss_is_plain():
    inputs = inputs_of([FIRST, SECOND, FIRST], [1, 5, 1], [[], None, None])
    for loss in (msl, bear):
        values = loss(inputs)
        assert values[1:].tolist() == pytest.approx([-math.log(0.0625), -math.log(0.25)])
        assert values[0].item() == pytest.approx(loss(inputs_of([FIRST], [1], [[]])).item())


def test_a_models_cap_on_logits_is_applied():
    inputs = random_inputs()
    capped = dataclasses.replace(inputs, head=dataclasses.replace(inputs.head, softcap=1.0))
    bounded = 1.0 * torch.tanh(inputs.hidden @ inputs.head.weight.T)
    rows = torch.arange(len(inputs.labels))
    assert torch.allclose(lml(capped).double(), -bounded.log_softmax(1)[rows, inputs.labels], atol=1e-5)
    legal = legal_tokens(inputs.index, int(inputs.nodes[0]))
    place = legal.index(int(inputs.labels[0]))
    assert msl(capped)[0].item() == pytest.approx(-bounded[0, legal].log_softmax(0)[place].item())


BAD = [
    ("losses has no token loss; give exactly one of bear, lml, msl, nll", [{"name": "iirg"}]),
    ("bear and msl are token losses; give exactly one", [{"name": "bear"}, {"name": "msl"}]),
    (r"has no 'beer' \(did you mean bear\?\); it has bear, cllm4rec, iirg, lml, msl, nll", [{"name": "beer"}]),
    ("two losses are called bear; keep one", [{"name": "bear"}, {"name": "bear"}]),
    (r"loss bear has an unknown key 'weight'; known: name, kwargs", [{"name": "bear", "weight": 2}]),
    ("loss {'kwargs': {}} has no name", [{"kwargs": {}}]),
    ("kwargs of loss bear is 3 but must be a mapping", [{"name": "bear", "kwargs": 3}]),
    ("losses is 'bear' but must be a list such as", "bear"),
    (r"losses is \[\] but must be a list", []),
]
BAD_KWARGS = [
    ("bear", {"num_beams": 0}, "loss bear: num_beams is 0 but must be a whole number of at least 1"),
    ("bear", {"lambda_c": -0.5}, "loss bear: lambda_c is -0.5 but must not be negative"),
    ("bear", {"lambda_paper": -1}, "loss bear: lambda_paper is -1 but must not be negative"),
    ("bear", {"lambda_c": 0.1, "lambda_paper": 0.2}, "lambda_c is 0.1 and lambda_paper 0.2; give one"),
    ("bear", {"xi": 0}, "loss bear: xi is 0 but must be above 0"),
    ("bear", {"temperature": 0}, "loss bear: temperature is 0 but must be above 0"),
    ("bear", {"normalise": "rows"}, "loss bear: normalise is 'rows'; use one of positions, weights"),
    ("bear", {"num_beam": 3}, r"bear has no parameter 'num_beam' \(did you mean num_beams\?\)"),
    ("msl", {"temperature": -1}, "loss msl: temperature is -1 but must be above 0"),
    ("lml", {"temperature": 0}, "loss lml: temperature is 0 but must be above 0"),
    ("iirg", {"collaborative_weight": -1}, "loss iirg: collaborative_weight is -1 but must not be negative"),
    ("iirg", {"collaborative_weight": 0, "semantic_weight": 0}, "loss iirg: both weights are 0"),
    ("iirg", {"window": 0}, "loss iirg: window is 0 but must be a whole number of at least 1"),
    ("iirg", {"divide_by": "rows"}, "loss iirg: divide_by is 'rows'; use one of task, tokens"),
    ("iirg", {"neighbours": "near"}, "loss iirg: neighbours is 'near'; use one of mined, random, next_item"),
    ("cllm4rec", {"head_weight": -1}, "loss cllm4rec: head_weight is -1 but must not be negative"),
    ("cllm4rec", {"regularisation": -1}, "loss cllm4rec: regularisation is -1 but must not be negative"),
    ("cllm4rec", {"content_weight": -1}, "loss cllm4rec: content_weight is -1 but must not be negative"),
    ("cllm4rec", {"content_weight": 0.1, "regularisation": 0}, "content_weight is 0.1, but regularisation is 0"),
    ("cllm4rec", {"head_weight": 0, "regularisation": 0}, "head_weight and regularisation are 0"),
    ("cllm4rec", {"mask_share": 1}, "loss cllm4rec: mask_share is 1 but must be at least 0 and below 1"),
    ("cllm4rec", {"mask_share": 0.2, "head_weight": 0}, "mask_share is for the head, whose head_weight is 0"),
    ("cllm4rec", {"target": "some"}, "loss cllm4rec: target is 'some'; use one of held_out, all"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD_KWARGS)
def test_bad_values_of_a_loss_are_refused_in_one_line(name, kwargs, message):
    specs = [{"name": name, "kwargs": kwargs}]
    with pytest.raises(ValueError, match=message):
        load_losses(specs if name in losses.token_losses() else [{"name": "nll"}, *specs], "next_item")


@pytest.mark.parametrize(("message", "specs"), BAD)
def test_bad_losses_are_refused_in_one_line(message, specs):
    with pytest.raises(ValueError, match=message):
        load_losses(specs, "next_item")


@pytest.mark.parametrize("name", ["lml", "msl", "bear"])
def test_a_loss_for_the_other_task_is_refused(name):
    with pytest.raises(ValueError, match=f"loss {name} is for the task next_item, not for rerank; take it out"):
        load_losses([{"name": name}], "rerank")


def test_losses_that_weigh_their_tasks_differently_are_refused():
    by_tokens = {"name": "iirg", "kwargs": {"divide_by": "tokens"}}
    message = "loss iirg weighs tokens, but cllm4rec the means of tasks; set divide_by to task"
    with pytest.raises(ValueError, match=message):
        losses.load_losses([{"name": "nll"}, by_tokens, {"name": "cllm4rec"}], "next_item")
    head = {"name": "cllm4rec", "kwargs": {"regularisation": 0}}  # has no task of its own
    assert not any(extra.divides_by_task for extra in
                   losses.load_losses([{"name": "nll"}, by_tokens, head], "next_item").extras.values())  # fmt: skip


def test_a_loss_that_brings_rows_is_refused_for_the_task_that_takes_none(tmp_path):
    text = "from rerank.losses import Extra\n\nclass more(Extra):\n    def rows(self, maker):\n        return {}\n"
    (tmp_path / "more.py").write_text(text)
    with pytest.raises(ValueError, match="loss more brings rows, which the task rerank takes none of"):
        losses.load_losses([{"name": "nll"}, {"name": f"{tmp_path}/more.py:more"}], "rerank")


@pytest.mark.parametrize("name", ["iirg", "cllm4rec"])
def test_an_extra_for_the_other_task_is_refused(name):
    with pytest.raises(ValueError, match=f"loss {name} is for the task next_item, not for rerank; take it out"):
        load_losses([{"name": "nll"}, {"name": name}], "rerank")


def test_the_command_lists_every_loss_of_the_folder(capsys):
    assert cli.main(["losses"]) == 0
    printed = capsys.readouterr().out
    assert [entry.name for entry in losses.list_losses()] == ["bear", "cllm4rec", "iirg", "lml", "msl", "nll"]
    assert all(
        name in printed
        for name in ("bear", "cllm4rec", "iirg", "lml", "msl", "nll: token loss, for next_item and rerank")
    )


def test_only_losses_over_legal_tokens_mask_first():
    found = {name: load_losses([{"name": name}], "next_item").masks_first for name in losses.token_losses()}
    assert found == {"bear": True, "lml": False, "msl": True, "nll": False}


def write(folder, text):
    path = folder / "mine.py"
    path.write_text("import torch\nfrom rerank.losses import Extra\n" + textwrap.dedent(text))
    return path


def test_a_users_own_loss_is_one_short_function(tmp_path):
    path = write(tmp_path, """
        def focal(inputs, gamma=2.0):
            logps = inputs.label_logps()
            return -((1 - logps.detach().exp()) ** gamma) * logps
    """)  # fmt: skip
    found = load_losses([{"name": f"{path}:focal", "kwargs": {"gamma": 1.0}}], "rerank")
    value = found.token(inputs_of([FIRST], [1], [None]))
    assert value.tolist() == pytest.approx([-0.75 * math.log(0.25)])


@pytest.mark.parametrize(("body", "message"), [
    ("return inputs.label_logps().sum()", r"loss own returned \(\) for 4 positions; return a tensor of one value"),
    ("return 1.0", "loss own returned float for 4 positions"),
    ("return inputs.label_logps().detach()", "its values must be finite and have a gradient"),
    ("return inputs.label_logps() / 0", "its values must be finite and have a gradient"),
    ("raise ValueError('no luck')", "loss own: no luck"),
])  # fmt: skip
def test_a_users_broken_loss_is_refused_before_a_model_is_loaded(tmp_path, body, message):
    path = write(tmp_path, f"def own(inputs):\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        load_losses([{"name": f"{path}:own"}], "next_item")


def test_a_class_that_is_no_extra_is_refused(tmp_path):
    path = write(tmp_path, "class Other:\n    tasks = ('next_item',)\n")
    with pytest.raises(ValueError, match="loss Other is a class but no subclass of rerank.losses.Extra"):
        load_losses([{"name": "nll"}, {"name": f"{path}:Other"}], "next_item")
    assert issubclass(load_losses([{"name": "nll"}, {"name": "iirg"}], "next_item").extras["iirg"].__class__, Extra)
