"""Rows trained apart from their table: alone, with TRL's fused head, and sharded over two processes by FSDP2."""

import os
import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import save_file
from tiny_model import model_with_ids, tiny_model, tiny_tokenizer
from trl.trainer.utils import add_fused_lm_head

from rerank.midtrain import new_rows


def made_model(tied):
    """A model of which only new rows can be trained, with TRL's head; some text of it, (2, 12)."""
    model, _, ids = model_with_ids(tied)
    new_rows.train_only_rows(model, ids)
    add_fused_lm_head(model)
    return model, torch.arange(24).view(2, 12) + ids[-1] - 23  # its last tokens are the new ones


def gradients(model, tied):
    embedding = model.get_input_embeddings()
    return [rows.grad for rows in ([embedding.rows] if tied else [embedding.rows, embedding.head_rows])]


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_whole_table(tied):
    plain, _, ids = model_with_ids(tied)
    model, text = made_model(tied)
    trainable = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    assert trainable == [(len(ids), 32)] * (1 if tied else 2)  # nothing else is a parameter of the optimizer
    loss = model(input_ids=text, labels=text, fused_lm_head=True).loss
    wanted = plain(input_ids=text, labels=text).loss
    assert torch.allclose(loss, wanted)
    loss.backward(), wanted.backward()
    tables = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    for found, table in zip(gradients(model, tied), tables, strict=False):
        assert torch.allclose(found, table.weight.grad[ids], atol=1e-6)
        assert found.abs().sum() > 0


def shard_and_compare(rank, port, tied):
    """In one of two processes: shard as accelerate does for FSDP2, and compare with the unsharded gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    whole, text = made_model(tied)
    whole(input_ids=text, labels=text, fused_lm_head=True).loss.backward()
    model, _ = made_model(tied)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model.get_input_embeddings()):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard([model.model.norm, model.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    own = text[rank : rank + 1]
    model(input_ids=own, labels=own, fused_lm_head=True).loss.backward()
    for found, wanted in zip(gradients(model, tied), gradients(whole, tied), strict=True):
        assert torch.allclose(found.full_tensor(), wanted, atol=1e-6)
    torch.distributed.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # at once: the threads of gloo abort now and then when a process ends by and by


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_over_two_processes_the_gradients_are_the_same(tied):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(shard_and_compare, (port, tied), nprocs=2)


def test_rows_are_loaded_where_they_belong(tmp_path):
    rows = {"rows": torch.ones(2, 32), "head_rows": torch.full((2, 32), 2.0)}
    save_file(rows, tmp_path / "rows.safetensors")
    model = tiny_model(tiny_tokenizer(), tied=False)
    before = model.lm_head.weight.detach().clone()
    new_rows.load_rows(model, [7, 3], tmp_path / "rows.safetensors")
    assert torch.equal(model.get_input_embeddings().weight[[7, 3]], rows["rows"])
    assert torch.equal(model.lm_head.weight[[7, 3]], rows["head_rows"])
    assert torch.equal(model.lm_head.weight[:3], before[:3])
