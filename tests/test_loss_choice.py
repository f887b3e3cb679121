"""Choosing and mixing candidate distributions."""

from __future__ import annotations

import pytest
import torch
from dense_loss import make_rows

from fusechat.errors import ConfigError
from fusechat.loss import candidate_weights, mix_candidates, sparse_soft_ce


def test_min_ce_takes_the_best_candidate_of_each_unit():
    """Catches a decision per row where one per sequence was asked for, and per-token means where bytes count."""
    gold = torch.tensor([[-1.0, -3.0], [-5.0, -1.0], [-1.0, -2.0], [-2.0, -2.0]])
    unit = torch.tensor([0, 0, 1, 2])
    whole = candidate_weights(gold, unit, choice="min_ce", n_units=3)
    assert whole.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]  # the tie goes to the first
    alone = candidate_weights(gold, torch.arange(4), choice="min_ce", n_units=4)
    assert alone.tolist() == [[1, 0], [0, 1], [1, 0], [1, 0]]


def test_a_units_cross_entropy_is_per_size():
    """Catches sums where means were meant: avg_ce of long units would become min_ce."""
    gold = torch.tensor([[-4.0, -2.0], [-4.0, -2.0]])
    weights = candidate_weights(gold, torch.tensor([0, 0]), choice="avg_ce", n_units=1, size=torch.tensor([4.0, 4.0]))
    exact = torch.softmax(torch.tensor([-1.0, -0.5]), 0)
    torch.testing.assert_close(weights, exact.expand(2, 2))


def loss_of(row, ids, logprobs, missing):
    return sparse_soft_ce(row[0], row[1], ids, logprobs, hard_weight=0.3, missing=missing, row_weight=torch.ones(6))


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_the_loss_of_a_mixture_is_the_mixture_of_losses(missing):
    """Catches entries of one candidate counted in another's mass: cross-entropy is linear in the target."""
    rows = [make_rows(seed, 6, 40, 5) for seed in (1, 2, 3)]
    rows = [(rows[0][0], rows[0][1], ids.clamp(min=0), logprobs.clamp(min=-9)) for _, _, ids, logprobs in rows]
    weights = torch.softmax(torch.randn(6, 3), 1)
    ids, logprobs = torch.stack([r[2] for r in rows], 1), torch.stack([r[3] for r in rows], 1) - 0.2
    mixed = loss_of(rows[0], *mix_candidates(ids, logprobs, weights, renormalise=missing == "renormalise"), missing)
    singles = torch.stack([loss_of(rows[0], ids[:, c], logprobs[:, c], missing).soft for c in range(3)], 1)
    torch.testing.assert_close(mixed.soft, (weights * singles).sum(1), rtol=1e-5, atol=1e-5)


def test_a_chosen_candidate_gives_its_own_loss():
    """Catches a weight of zero that still leaves its entries as cells, which a tail would feel."""
    first, second = make_rows(4, 6, 40, 5), make_rows(5, 6, 40, 5)
    ids, logprobs = torch.stack([first[2], second[2]], 1), torch.stack([first[3], second[3]], 1)
    weights = torch.tensor([[0.0, 1.0]]).expand(6, 2)
    mixed = loss_of(first, *mix_candidates(ids, logprobs, weights, renormalise=False), "tail")
    alone = loss_of(first, second[2], second[3], "tail")
    torch.testing.assert_close(mixed.soft, alone.soft)


def test_wrong_shapes_and_choices_are_refused():
    """Catches broadcasting of another batch's cross-entropies."""
    gold, unit = torch.zeros(4, 2), torch.zeros(4).long()
    for change in ({"choice": "max_ce"}, {"choice": "min_ce", "size": torch.ones(3)}):
        with pytest.raises(ConfigError):
            candidate_weights(gold, unit, n_units=1, **change)
    with pytest.raises(ConfigError):
        candidate_weights(gold, unit[:3], choice="min_ce", n_units=1)
    with pytest.raises(ConfigError):
        mix_candidates(torch.zeros(4, 2, 3).long(), torch.zeros(4, 2, 3), torch.zeros(4, 3), renormalise=True)
