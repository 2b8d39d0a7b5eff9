"""Token losses by hand, against slow versions and against the papers' formulas; what a recipe may name."""

import dataclasses
import math
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from rerank import cli, losses
from rerank.losses import Head, LossInputs, load_losses
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


def positions(hidden, labels, head, nodes, index):
    """Positions of one task after the trace, none of which has an item."""
    labels = torch.tensor(labels)
    columns = {"is_ranking": torch.ones_like(labels, dtype=torch.bool), "nodes": torch.tensor(nodes)}
    columns |= {"items": torch.full_like(labels, -1), "tasks": torch.zeros_like(labels)}
    return LossInputs(hidden=hidden.requires_grad_(), labels=labels, head=head, index=index, **columns)


def inputs_of(distributions, labels, prefixes):
    """Positions whose model probabilities are given: the head is the identity and states are log-probabilities."""
    states = torch.tensor([[math.log(p[token]) for token in range(6)] for p in distributions], dtype=torch.float64)
    nodes = [-1 if prefix is None else INDEX.find(prefix) for prefix in prefixes]
    return positions(states, labels, Head(torch.eye(6, dtype=torch.float64)), nodes, INDEX)


def random_inputs(softcap=None):
    """Random states of 40 positions and labels along the paths of a random catalogue of two tokens an item."""
    rng = np.random.default_rng(0)
    index = PrefixIndex.build([[pair // 6, 6 + pair % 6] for pair in rng.permutation(36)[:30].tolist()])
    inner = [node for node in range(index.num_nodes) if valid_tokens(index, node)]
    nodes = rng.choice(inner, 40).tolist()
    labels = [int(rng.choice(valid_tokens(index, node))) for node in nodes]
    hidden, weight = (torch.from_numpy(rng.standard_normal((size, 5))) for size in (40, 12))
    return positions(hidden, labels, Head(weight, softcap=softcap), nodes, index)


def valid_tokens(index, node):
    return index.children(np.array([node]))[1].tolist()


def test_nll_weighs_what_comes_before_the_end_of_the_trace():
    inputs = dataclasses.replace(
        inputs_of([FIRST, SECOND], [1, 4], [None, None]), is_ranking=torch.tensor([False, True]), index=None
    )
    values = nll(inputs, reasoning_weight=0.5, ranking_weight=2.0)
    assert values.tolist() == pytest.approx([-0.5 * math.log(0.25), -2 * math.log(0.0625)])
    logged = {name: [float(part) for part in pair] for name, pair in inputs.logged.items()}
    assert logged["reasoning_nll"] == pytest.approx([-math.log(0.25), 1])
    assert logged["ranking_nll"] == pytest.approx([-math.log(0.0625), 1])


def test_nll_of_next_items_is_lml():
    inputs = losses.example_inputs("next_item")
    assert torch.equal(nll(inputs), lml(inputs))


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


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("num_beams", [2, 10])  # 10 are more than there are valid tokens
def test_token_losses_equal_a_slow_loop_and_bear_has_the_papers_gradient(num_beams, softcap, monkeypatch):
    xi, lambda_c = 0.8, 0.6
    monkeypatch.setattr(bear_file, "XI", xi)
    inputs = random_inputs(softcap)
    plain, masked = lml(inputs, temperature=1.5), msl(inputs, temperature=1.5)
    weighted, paper = bear(inputs, num_beams, lambda_c), 0.0
    logits = inputs.hidden @ inputs.head.weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    for position, label in enumerate(inputs.labels.tolist()):
        valid = valid_tokens(inputs.index, int(inputs.nodes[position]))
        place, of_valid = valid.index(label), logits[position, valid]
        logps = of_valid.log_softmax(0)
        log_beta = logps.detach().sort(descending=True).values[min(num_beams, len(valid)) - 1]
        found = torch.stack([plain[position], masked[position], weighted[position]]).tolist()
        assert found == pytest.approx([
            -(logits[position] / 1.5).log_softmax(0)[label].item(),
            -(of_valid / 1.5).log_softmax(0)[place].item(),
            -logps[place].item() * (1 + lambda_c / (1 + math.exp((log_beta - logps[place]).item() / xi))),
        ], abs=1e-12)  # fmt: skip
        # L_SFT + lambda L_reg, L_reg = log sigmoid_xi(Delta), Delta = log beta - log P; lambda = xi lambda_c
        paper = paper - logps[place] + xi * lambda_c * nn.functional.logsigmoid((log_beta - logps[place]) / xi)
    gradients = [torch.autograd.grad(total, inputs.hidden)[0] for total in (weighted.sum(), paper)]
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("loss", [msl, bear])
def test_a_position_with_one_valid_token_has_no_loss_and_no_gradient(loss):
    inputs = inputs_of([SECOND], [3], [[1]])
    value = loss(inputs)
    value.sum().backward()
    assert value.item() == 0 and inputs.hidden.grad.abs().max() == 0


def test_where_a_label_is_no_token_of_an_item_the_loss_is_plain():
    inputs = inputs_of([FIRST, SECOND, FIRST], [1, 5, 1], [[], None, None])
    for loss in (msl, bear):
        values = loss(inputs)
        assert values[1:].tolist() == pytest.approx([-math.log(0.0625), -math.log(0.25)])
        assert values[0].item() == pytest.approx(loss(inputs_of([FIRST], [1], [[]])).item())


BAD = [
    ("losses has no token loss; give exactly one of bear, lml, msl, nll, soft_targets", [{"name": "iirg"}]),
    ("bear and msl are token losses; give exactly one", [{"name": "bear"}, {"name": "msl"}]),
    (
        r"has no 'beer' \(did you mean bear\?\); it has bear, cllm4rec, iirg, lml, msl, nll, ranknet, ",
        [{"name": "beer"}],
    ),
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
    first = [{"name": "nll"}] if name in ("iirg", "cllm4rec") else []
    with pytest.raises(ValueError, match=message):
        load_losses([*first, {"name": name, "kwargs": kwargs}], "next_item")


@pytest.mark.parametrize(("message", "specs"), BAD)
def test_bad_losses_are_refused_in_one_line(message, specs):
    with pytest.raises(ValueError, match=message):
        load_losses(specs, "next_item")


@pytest.mark.parametrize("name", ["lml", "msl", "bear", "iirg", "cllm4rec"])
def test_a_loss_for_the_other_task_is_refused(name):
    with pytest.raises(ValueError, match=f"loss {name} is for the task next_item, not for rerank; take it out"):
        load_losses([{"name": name}], "rerank")


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
    path = write(tmp_path, path.read_text().replace("INFO = LossInfo", "INFO = dict"), "other.py")
    with pytest.raises(ValueError, match=r"INFO of loss mine is {.*}; write it as LossInfo\(tasks="):
        load_losses([{"name": f"{path}:mine"}], "next_item")
    path = write(tmp_path, "REACHES = 'legal'\ndef mine(inputs):\n    return -inputs.label_logps()\n", "old.py")
    with pytest.raises(ValueError, match="the file of loss mine says REACHES, which is gone; write INFO = LossInfo"):
        load_losses([{"name": f"{path}:mine"}], "next_item")


def test_the_command_lists_every_loss_of_the_folder(capsys):
    assert cli.main(["losses"]) == 0
    printed = capsys.readouterr().out
    heads = [line for line in printed.splitlines() if not line.startswith(" ")]
    lines = {name: "token loss, for next_item" for name in ("bear", "lml", "msl")}
    lines |= {name: "beside a token loss, for next_item" for name in ("cllm4rec", "iirg")}
    lines |= {"nll": "token loss, for next_item and rerank", "soft_targets": "token loss, for rerank"}
    lines["ranknet"] = "beside a token loss, for rerank"
    assert heads == [f"{name}: {line}" for name, line in sorted(lines.items())]
    assert printed.count("    needs ") == printed.count("    costs ") == 8 and "does not say" not in printed


def test_only_losses_over_valid_tokens_are_constrained():
    tasks = {name: "rerank" if name == "soft_targets" else "next_item" for name in losses.token_losses()}
    found = [name for name, task in tasks.items() if load_losses([{"name": name}], task).constrained]
    assert found == ["bear", "msl"] and list(tasks) == ["bear", "lml", "msl", "nll", "soft_targets"]


def write(folder, text, name="mine.py"):
    path = folder / name
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


@pytest.mark.parametrize(("text", "message"), [
    ("class own:\n    pass\n", "loss own is a class but no subclass of rerank.losses.AuxiliaryLoss"),
    ("class own(AuxiliaryLoss):\n    def rows(self, encoder):\n        return {}\n",
     "loss own brings rows, which the task rerank takes none of; say INFO = Los"),
])  # fmt: skip
def test_a_class_that_is_no_auxiliary_loss_of_the_task_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_losses([{"name": "nll"}, {"name": f"{write(tmp_path, text)}:own"}], "rerank")
