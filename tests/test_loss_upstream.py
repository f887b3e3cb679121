"""Rows in the form of the research code, against its dense bfloat16 targets."""

from __future__ import annotations

import pytest
import torch

from fusechat.bench.baselines import collate_dense, dense_loss
from fusechat.loss import sparse_soft_ce, upstream_rows

B, S, V, K = 3, 7, 50, 6
HARD = 0.3


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, S, K), generator=rng)
    ids[:, ::2, 4] = ids[:, ::2, 1]
    ids[:, ::3, 5] = ids[:, ::3, 1]
    teacher = torch.randn(B, S, K, generator=rng).sort(-1, descending=True).values
    return torch.randn(B, S, V, generator=rng) * 3, torch.randint(0, V, (B, S), generator=rng), ids, teacher


def test_rows_are_those_of_the_dense_targets():
    """Catches masses that are not rounded, equal ids that add up, and a sum brought to one after the scatter."""
    _, _, ids, teacher = given()
    dense = collate_dense(ids, teacher, V).view(-1, V).float()
    rows, logprobs, mass = upstream_rows(ids.view(-1, K), teacher.view(-1, K))
    ours = torch.zeros(B * S, V + 1).scatter_(1, torch.where(rows >= 0, rows, V), logprobs.exp())[:, :V]
    torch.testing.assert_close(ours, dense, rtol=1e-6, atol=0)
    torch.testing.assert_close(mass, dense.sum(1))
    assert (mass < 0.99).any()
    assert (mass > 1).any()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_loss_is_that_of_the_dense_targets(backend, monkeypatch):
    """Catches sums above one that are scaled to one, and a tail that counts."""
    monkeypatch.setenv("FUSECHAT_LOSS", backend)
    logits, labels, ids, teacher = given()
    dense = collate_dense(ids, teacher, V)
    exact = logits.clone().requires_grad_(True)
    expected = dense_loss(exact, labels, dense, dense, torch.zeros(B, 2), HARD)
    expected.backward()
    rows, logprobs, mass = upstream_rows(ids.view(-1, K), teacher.view(-1, K))
    total = HARD + (1 - HARD) * mass
    leaf = logits.clone().requires_grad_(True)
    loss = sparse_soft_ce(
        leaf.view(-1, V), labels.flatten(), rows, logprobs,
        hard_weight=HARD / total, row_weight=total / (B * S), missing="renormalise", inplace=False,
    ).loss  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-5, atol=1e-7)


def test_absent_entries_and_rows_without_any_stay_absent():
    """Catches the NaN of a softmax over nothing, and an absent entry that overwrites a present one."""
    ids = torch.tensor([[4, -1, 4], [-1, -1, -1], [7, 7, 7]])
    logprobs = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    rows, values, mass = upstream_rows(ids, logprobs)
    assert rows.tolist() == [[4, -1, -1], [-1, -1, -1], [-1, -1, 7]]
    assert mass.tolist() == [1.0, 1.0, float(torch.softmax(logprobs[2], 0)[2].bfloat16())]
    assert values[0, 0] == 0
    assert upstream_rows(ids[:, :0], logprobs[:, :0])[2].tolist() == [1.0, 1.0, 1.0]
