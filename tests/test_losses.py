"""Token losses by hand, against slow versions and against the papers' formulas; what a recipe may name."""

import dataclasses
import math
import re
import sys
import textwrap

import pytest
import torch

from rerank import cli, losses
from rerank.losses import AuxiliaryLoss, Head, LossInputs, load_losses
from rerank.losses import _inputs as loss_inputs
from rerank.losses import bear as bear_file
from rerank.losses.bear import bear
from rerank.losses.lml import lml
from rerank.losses.msl import msl
from rerank.losses.nll import nll
from rerank.next_item.prefix_index import PrefixIndex

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


def valid_tokens(index, node):
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
    # at the root 0, 1, 2 are valid: .25 / (.5 + .25 + .125); below 0 it is 3, 4, 5: .0625 / (.125 + .0625 + .0625)
    assert values.tolist() == pytest.approx([-math.log(2 / 7), -math.log(1 / 4)])


def test_msl_at_a_position_with_one_valid_token_is_zero_and_so_is_its_gradient():
    inputs = inputs_of([SECOND], [3], [[1]])
    value = msl(inputs)
    value.sum().backward()
    assert value.item() == 0 and inputs.hidden.grad.abs().max() == 0


def test_nll_of_next_items_is_lml():
    inputs = losses.example_inputs("next_item")
    assert torch.equal(nll(inputs), lml(inputs))


def test_msl_equals_lml_where_every_token_is_valid():
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


@pytest.fixture
def xi(monkeypatch):
    """Sets the temperature of BEAR's sigmoid, for arithmetic by hand."""
    return lambda value: monkeypatch.setattr(bear_file, "XI", value)


def test_msl_and_bear_equal_a_slow_loop(xi):
    inputs = random_inputs()
    xi(0.8)
    masked, weighted = msl(inputs, temperature=1.5).tolist(), bear(inputs, 2, lambda_c=0.6).tolist()
    logits = inputs.hidden @ inputs.head.weight.T
    for position in range(len(inputs.labels)):
        valid = valid_tokens(inputs.index, int(inputs.nodes[position]))
        place = valid.index(int(inputs.labels[position]))
        assert masked[position] == pytest.approx(
            -torch.log_softmax(logits[position, valid] / 1.5, 0)[place].item(), abs=1e-12
        )
        logps = torch.log_softmax(logits[position, valid], 0)
        beta = sorted(logps.tolist(), reverse=True)[1] if len(valid) > 1 else logps.min().item()
        weight = 1 + 0.6 / (1 + math.exp(-(logps[place].item() - beta) / 0.8))
        assert weighted[position] == pytest.approx(-weight * logps[place].item(), abs=1e-12)


def test_bear_by_hand(xi):
    xi(2.0)
    values = bear(inputs_of([FIRST, SECOND], [1, 3], [[], [0]]), num_beams=1, lambda_c=0.5)
    # root: P = 4/7, 2/7, 1/7 and beta = 4/7; label 1: sigmoid(log(1/2) / 2) = 1 / (1 + sqrt 2)
    first = (1 + 0.5 / (1 + math.sqrt(2))) * math.log(7 / 2)
    # below 0: P = 1/2, 1/4, 1/4 and beta = 1/2, the label itself: sigmoid(0) = 1/2
    second = (1 + 0.5 * 0.5) * math.log(2)
    assert values.tolist() == pytest.approx([first, second])


def test_bear_with_fewer_valid_tokens_than_beams_takes_the_smallest(xi):
    xi(1.0)
    values = bear(inputs_of([SECOND, SECOND], [3, 4], [[0], [0]]), num_beams=10, lambda_c=0.5)
    # P = 1/2, 1/4, 1/4, beta = 1/4: sigmoid(log 2) = 2/3 for label 3, sigmoid(0) = 1/2 for label 4
    assert values.tolist() == pytest.approx([(1 + 0.5 * 2 / 3) * math.log(2), 1.25 * math.log(4)])


def test_bear_with_one_valid_token_costs_nothing():
    assert bear(inputs_of([SECOND], [3], [[1]]), lambda_c=3.0).tolist() == [0.0]


def test_bear_without_weight_is_msl():
    inputs = random_inputs()
    assert torch.allclose(bear(inputs, lambda_c=0.0), msl(inputs))
    assert not torch.allclose(bear(inputs, lambda_c=1.0), msl(inputs))


def test_bear_has_the_gradient_of_the_papers_formula():
    num_beams, weight = 3, 0.9  # lambda of the paper, which is xi lambda_c
    ours, paper = random_inputs(), random_inputs()
    bear(ours, num_beams, weight / bear_file.XI).sum().backward()
    logits, total = paper.hidden @ paper.head.weight.T, 0.0
    for position in range(len(paper.labels)):
        valid = valid_tokens(paper.index, int(paper.nodes[position]))
        logps = torch.log_softmax(logits[position, valid], 0)
        logp = logps[valid.index(int(paper.labels[position]))]
        log_beta = logps.detach().sort(descending=True).values[min(num_beams, len(valid)) - 1]
        # L_SFT + lambda L_reg, L_reg = log sigmoid_xi(Delta), Delta = log beta - log P
        total = total - logp + weight * torch.nn.functional.logsigmoid((log_beta - logp) / bear_file.XI)
    total.backward()
    assert torch.allclose(ours.hidden.grad, paper.hidden.grad, atol=1e-12)


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
    valid = valid_tokens(inputs.index, int(inputs.nodes[0]))
    place = valid.index(int(inputs.labels[0]))
    assert msl(capped)[0].item() == pytest.approx(-bounded[0, valid].log_softmax(0)[place].item())


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
    ("bear", {"lambda_c": -0.5}, "loss bear: lambda_c is -0.5 but must be at least 0"),
    ("bear", {"lambda_c": "much"}, "loss bear: must be real number, not str"),
    ("bear", {"temperature": 0}, "loss bear: temperature is 0 but must be above 0"),
    ("bear", {"num_beam": 3}, r"bear has no parameter 'num_beam' \(did you mean num_beams\?\)"),
    ("msl", {"temperature": -1}, "loss msl: temperature is -1 but must be above 0"),
    ("lml", {"temperature": math.nan}, "loss lml: temperature is nan but must be above 0"),
    ("iirg", {"collaborative_weight": -1}, "loss iirg: collaborative_weight is -1 but must be at least 0"),
    ("iirg", {"semantic_weight": math.inf}, "loss iirg: semantic_weight is inf but must be at least 0"),
    ("iirg", {"collaborative_weight": 0, "semantic_weight": 0}, "loss iirg: both weights are 0"),
    ("iirg", {"window": 0}, "loss iirg: window is 0 but must be a whole number of at least 1"),
    ("iirg", {"neighbours": "near"}, "loss iirg: neighbours is 'near' but must be one of mined, random, next_item"),
    ("cllm4rec", {"regularisation": -1}, "loss cllm4rec: regularisation is -1 but must be at least 0"),
    ("cllm4rec", {"content_weight": -1}, "loss cllm4rec: content_weight is -1 but must be at least 0"),
    ("cllm4rec", {"content_weight": 0.1, "regularisation": 0}, "content_weight is 0.1, but regularisation is 0"),
    ("cllm4rec", {"mask_share": 1}, "loss cllm4rec: mask_share is 1 but must be at least 0 and below 1"),
    ("nll", {"reasoning_weight": -0.5}, "reasoning_weight is -0.5 and ranking_weight 1.0; neither may be negative"),
    ("nll", {"ranking_weight": -1.0}, "loss nll: reasoning_weight is 0.5 and ranking_weight -1.0; neither may be"),
    ("nll", {"ranking_weight": 0.0}, "loss nll: reasoning_weight is 0.5 and ranking_weight 0.0; neither may be neg"),
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


@pytest.mark.parametrize("name", ["lml", "msl", "bear", "iirg", "cllm4rec"])
def test_a_loss_for_the_other_task_is_refused(name):
    with pytest.raises(ValueError, match=f"loss {name} is for the task next_item, not for rerank; take it out"):
        load_losses([{"name": name}], "rerank")


def test_a_loss_that_brings_rows_is_refused_for_the_task_that_takes_none(tmp_path):
    path = write(tmp_path, "class more(AuxiliaryLoss):\n    def rows(self, encoder):\n        return {}\n")
    with pytest.raises(ValueError, match="loss more brings rows, which the task rerank takes none of; say INFO = Los"):
        load_losses([{"name": "nll"}, {"name": f"{path}:more"}], "rerank")


def test_a_users_file_may_declare_its_losses(tmp_path):
    path = write(tmp_path, """
        from rerank.losses import LossInfo
        INFO = LossInfo(tasks=("next_item",), constrained=True)
        def mine(inputs):
            return -inputs.label_logps()
    """)  # fmt: skip
    assert load_losses([{"name": f"{path}:mine"}], "next_item").constrained
    with pytest.raises(ValueError, match="loss mine is for the task next_item, not for rerank; take it out"):
        load_losses([{"name": f"{path}:mine"}], "rerank")
    path.write_text(path.read_text().replace("INFO = LossInfo", "INFO = dict"))
    sys.modules.pop(next(name for name in sys.modules if name.endswith(re.sub(r"\W", "_", str(tmp_path / "mine")))))
    with pytest.raises(ValueError, match=r"INFO of loss mine is {.*}; write it as LossInfo\(tasks="):
        load_losses([{"name": f"{path}:mine"}], "next_item")


def test_the_command_lists_every_loss_of_the_folder(capsys):
    assert cli.main(["losses"]) == 0
    printed = capsys.readouterr().out
    assert [name for name, _, _ in losses.list_losses()] == ["bear", "cllm4rec", "iirg", "lml", "msl", "nll"]
    heads = [line for line in printed.splitlines() if not line.startswith(" ")]
    assert heads == [
        "bear: token loss, for next_item",
        "cllm4rec: beside a token loss, for next_item",
        "iirg: beside a token loss, for next_item",
        "lml: token loss, for next_item",
        "msl: token loss, for next_item",
        "nll: token loss, for next_item and rerank",
    ]
    assert printed.count("    needs ") == printed.count("    costs ") == 6 and "does not say" not in printed


def test_only_losses_over_valid_tokens_are_constrained():
    found = {name: load_losses([{"name": name}], "next_item").constrained for name in losses.token_losses()}
    assert found == {"bear": True, "lml": False, "msl": True, "nll": False}


def write(folder, text):
    path = folder / "mine.py"
    path.write_text("import torch\nfrom rerank.losses import AuxiliaryLoss\n" + textwrap.dedent(text))
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


def test_a_class_that_is_no_auxiliary_loss_is_refused(tmp_path):
    path = write(tmp_path, "class Other:\n    pass\n")
    with pytest.raises(ValueError, match="loss Other is a class but no subclass of rerank.losses.AuxiliaryLoss"):
        load_losses([{"name": "nll"}, {"name": f"{path}:Other"}], "next_item")
    assert isinstance(load_losses([{"name": "nll"}, {"name": "iirg"}], "next_item").auxiliary["iirg"], AuxiliaryLoss)
