"""GR2's techniques one by one, the Sinkhorn assignment, and residual k-means."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_ids import clustered_embeddings, run_ids
from toy_run import LINE, LINE_TOKENIZER

from rerank.semantic_ids import Tokenizer, assign, load_semantic_ids
from rerank.semantic_ids.assignment import assign_codes, balance, sinkhorn
from rerank.semantic_ids.co_engagement import Partners
from rerank.semantic_ids.k_means import fit_k_means_tokenizer
from rerank.semantic_ids.rq_vae import ResidualQuantizer, contrastive_loss, diversity_loss
from rerank.semantic_ids.tokenizer import quantize, reconstruction_error

CODES = torch.tensor([[[0.0], [10.0]]])  # one level


# --- how codebooks learn


def test_codes_follow_the_average_of_their_residuals():
    quantizer = ResidualQuantizer(CODES.clone(), ema_decay=0.9)
    quantized = quantizer(torch.tensor([[1.0], [3.0]]))
    # code 0: count 0.9 * 1 + 0.1 * 2 = 1.1, sum 0.9 * 0 + 0.1 * 4 = 0.4; code 1 is unused and stays
    np.testing.assert_allclose(quantizer.codebooks.ravel(), [0.4 / 1.1, 10.0], rtol=1e-5)
    assert quantized.latents.tolist() == [[0.0], [0.0]]  # the codes before the update
    assert quantized.commitment.item() == pytest.approx((1 + 9) / 2)
    # nothing is left to the optimizer
    assert quantized.codebook.item() == 0 and not list(quantizer.parameters())


def test_gradients_pass_straight_through_to_the_encoder():
    latents = torch.tensor([[1.0], [8.0]], requires_grad=True)
    quantized = ResidualQuantizer(CODES.clone(), ema_decay=0.9)(latents)
    (quantized.latents * torch.tensor([[2.0], [5.0]])).sum().backward()
    assert latents.grad.tolist() == [[2.0], [5.0]]


def test_without_moving_averages_the_codebook_loss_pulls_codes_and_only_codes():
    quantizer = ResidualQuantizer(CODES.clone(), ema_decay=None)
    latents = torch.tensor([[1.0], [3.0]], requires_grad=True)
    found = quantizer(latents)
    assert found.codebook.item() == pytest.approx((1 + 9) / 2) == found.commitment.item()
    found.codebook.backward()
    # d/de of ((e - 1)^2 + (e - 3)^2) / 2 at e = 0: -4; the unused code gets nothing
    assert quantizer.codebooks.grad.ravel().tolist() == [-4.0, 0.0] and latents.grad is None


def test_a_code_unused_for_some_batches_moves_to_the_worst_reconstructed_latent():
    quantizer = ResidualQuantizer(torch.tensor([[[0.0], [10.0], [20.0]]]), ema_decay=None, reset_after=2)
    batch = torch.tensor([[0.0], [1.0], [4.0], [3.0]])
    quantizer(batch)
    assert quantizer.codebooks.ravel().tolist() == [0.0, 10.0, 20.0]
    quantizer(batch)  # the second batch without them: 4 is farthest from its code, 3 the next
    assert quantizer.codebooks.ravel().tolist() == [0.0, 4.0, 3.0]
    assert quantizer.idle.tolist() == [[0, 0, 0]]


def test_a_reset_code_starts_its_averages_anew():
    quantizer = ResidualQuantizer(CODES.clone(), ema_decay=0.5, reset_after=1)
    quantizer(torch.tensor([[0.0], [4.0]]))
    # code 0: count 1.5, sum 2; code 1 is reset to 4, with a count of 1 as at the start
    np.testing.assert_allclose(quantizer.codebooks.ravel(), [2 / 1.5, 4.0], rtol=1e-6)
    np.testing.assert_allclose(quantizer.counts.ravel(), [1.5, 1.0], rtol=1e-6)


def test_diversity_is_one_at_even_use_and_the_number_of_codes_at_one_code():
    codebook = torch.tensor([[0.0], [10.0]])
    assert diversity_loss(torch.tensor([[0.0], [10.0]]), codebook).item() == pytest.approx(1.0)
    assert diversity_loss(torch.tensor([[0.0], [0.0]]), codebook).item() == pytest.approx(2.0)


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_diversity_and_resets_can_be_learned_together(ema_decay):
    quantizer = ResidualQuantizer(CODES.clone(), ema_decay, reset_after=1, has_diversity=True)
    latents = torch.tensor([[1.0], [3.0]], requires_grad=True)
    quantizer(latents).diversity.backward()  # codes were overwritten after the loss was worked out
    assert latents.grad.abs().sum() > 0


def test_contrastive_loss_by_hand():
    latents = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # scaled to length one: at right angles
    partners = torch.tensor([[5.0, 0.0], [0.0, 1.0]])  # in the same direction
    # positive 1 / 0.5 = 2, the one negative 0: log(e^2 + 1) - 2
    assert contrastive_loss(latents, partners, 0.5).item() == pytest.approx(math.log(math.exp(2) + 1) - 2)


def test_partners_are_drawn_from_both_directions_of_the_pairs():
    partners = Partners.of(np.array([[0, 2], [3, 2]]), num_items=5)
    drawn = [partners.draw(np.array([0, 1, 2, 4]), np.random.default_rng(seed)) for seed in range(20)]
    assert all(has.tolist() == [True, False, True, False] for has, _ in drawn)
    assert {tuple(items) for _, items in drawn} == {(2, 0), (2, 3)}


@pytest.mark.parametrize(
    "option",
    [{"k_means_start": False}, {"ema": False}, {"diversity_weight": 1.0}, {"reset_after": 2}, {"batch_size": 16}],
    ids=str,
)
def test_each_switch_changes_the_codebooks_and_is_repeatable(option, tmp_path):
    default, first, second = (
        Tokenizer.load(run_ids(tmp_path / name, **{"epochs": 3, "batch_size": 8, **options})[0]).codebooks
        for name, options in (("default", {}), ("first", option), ("second", option))
    )
    assert np.array_equal(first, second) and not np.array_equal(first, default)


def test_training_reconstructs_better_than_where_it_started(tmp_path):
    errors = [run_ids(tmp_path / str(n), epochs=n)[1]["unexplained_variance"] for n in (1, 150)]
    assert errors[1] < 0.5 * errors[0]


def test_the_contrastive_loss_brings_co_engaged_items_together(tmp_path):
    """Items k and k + 1, of neighbouring groups, are taken together for even k."""
    distances, sequences = [], [[item, item + 1] for item in range(0, 60, 2)]
    for weight in (0.0, 5.0):
        out_dir, _ = run_ids(tmp_path / str(weight), sequences=sequences, epochs=20, contrastive_weight=weight)
        latents = Tokenizer.load(out_dir).latents(np.load(out_dir / "embeddings.npy"))
        latents /= np.linalg.norm(latents, axis=1, keepdims=True)
        distances.append(((latents[::2] - latents[1::2]) ** 2).sum(axis=1).mean())
    assert distances[1] < 0.5 * distances[0]


# --- assignment


def test_sinkhorn_finds_the_cheapest_assignment():
    from scipy.optimize import linear_sum_assignment

    for seed in range(20):
        costs = np.random.default_rng(seed).random((6, 8))
        chosen = sinkhorn(costs, room=1)
        assert len(set(chosen.tolist())) == 6
        rows, columns = linear_sum_assignment(costs)
        assert costs[rows, chosen].sum() <= 1.1 * costs[rows, columns].sum()


def test_sinkhorn_leaves_uncrowded_items_alone_and_fills_up_to_the_room():
    assert sinkhorn(np.array([[0.0, 1.0, 9.0], [5.0, 0.0, 9.0]]), room=1).tolist() == [0, 1]
    costs = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    assert sinkhorn(costs, room=2).tolist() == [1, 1, 0, 0]  # who loses least by it moves


def test_balanced_items_of_a_prefix_get_codes_of_their_own_where_nearest_codes_collide():
    # 11.0 and 11.4 are both nearest (1, 1); the second gives way to 2 (0.36 - 0.16 = 0.2 more; the first would pay 1)
    latents = np.array([[11.0], [11.4], [22.0], [22.0]], dtype=np.float32)
    codes = quantize(latents, LINE)
    assert codes.tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert balance(codes, latents, LINE, 1).tolist() == [[1, 1], [1, 2], [2, 2], [2, 2]]  # equal latents stay together


def test_balanced_ids_are_unique_at_little_cost_in_reconstruction():
    # 100 points in one square, 16 codes for the prefix and 16 below
    embeddings = np.random.default_rng(0).random((100, 2)).astype(np.float32)
    nearest = fit_k_means_tokenizer(embeddings, levels=2, num_codes=16, seed=0)
    codes = [assign_codes(replace(nearest, **options), embeddings) for options in ({}, {"balanced_levels": 1})]
    errors = [reconstruction_error(nearest, embeddings, found) for found in codes]
    assert len(np.unique(codes[0], axis=0)) < len(np.unique(codes[1], axis=0)) == 100
    randomly = assign_codes(replace(nearest, random_levels=1), embeddings)
    assert errors[0] < errors[1] < 0.2 * reconstruction_error(nearest, embeddings, randomly)
    assert np.array_equal(codes[0][:, 0], codes[1][:, 0])


def test_random_levels_are_the_last_and_follow_the_seed():
    embeddings = np.full((500, 1), 22.0)
    drawn = [
        assign_codes(replace(LINE_TOKENIZER, random_levels=1, seed=seed), embeddings, num_taken)
        for seed, num_taken in ((0, 0), (0, 0), (1, 0), (0, 9))
    ]
    assert [np.array_equal(codes, drawn[0]) for codes in drawn] == [True, True, False, False]
    assert set(drawn[0][:, 0]) == {2} and set(drawn[0][:, 1]) == {0, 1, 2, 3}


@pytest.mark.parametrize("options", [{"balanced_levels": 1}, {"random_levels": 1}, {"method": "residual_k_means"}])
def test_a_saved_tokenizer_assigns_as_the_stage_did(options, tmp_path):
    out_dir, metrics = run_ids(tmp_path / "run", **options)
    again = assign(Tokenizer.load(out_dir), clustered_embeddings())
    assert again.tolist() == load_semantic_ids(out_dir).codes.tolist()
    assert metrics["uniqueness_after"] == 1.0


def test_k_means_on_a_memory_map_gives_what_it_gives_in_memory(tmp_path):
    np.save(tmp_path / "embeddings.npy", clustered_embeddings(300))
    mapped = fit_k_means_tokenizer(np.load(tmp_path / "embeddings.npy", mmap_mode="r"), 2, 8, seed=0)
    assert np.array_equal(mapped.codebooks, fit_k_means_tokenizer(clustered_embeddings(300), 2, 8, seed=0).codebooks)
