"""The linear form of the fusion loss against the logits form and against memory."""

from __future__ import annotations

import pytest
import torch
from dense_loss import dense_loss, make_rows

from fusechat.errors import ConfigError
from fusechat.loss import linear_sparse_soft_ce, ops, sparse_soft_ce
from fusechat.loss.backend import forward_rows
from fusechat.loss_chunks import plan_chunk_rows, row_stride


def make_linear(seed: int, n_rows: int, vocabulary: int, width: int, n_entries: int, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    _, labels, ids, logprobs = make_rows(seed, n_rows, vocabulary, n_entries)
    hidden = torch.randn(n_rows, width, generator=rng).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=rng) * 0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=rng).to(dtype)
    return hidden, weight, bias, labels, ids, logprobs


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_match_fp64_through_the_product(chunk_rows, with_bias):
    """Catches a chunk written to another chunk's rows, and dropped rows that shift the others."""
    hidden, weight, bias, labels, ids, logprobs = make_linear(1, 11, 67, 6, 5)
    options = {"hard_weight": 0.4, "missing": "tail", "divergence": "jsd", "z_loss": 1e-3}
    leaves = [t.double().requires_grad_(True) for t in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if with_bias else 0.0)
    loss, d_logits, *_ = dense_loss(logits, labels, ids, logprobs, **options)
    logits.backward(d_logits * 3.0)
    ours = [t.clone().requires_grad_(True) for t in (hidden, weight, bias)]
    out = linear_sparse_soft_ce(
        ours[0], ours[1], labels, ids, logprobs, bias=ours[2] if with_bias else None,
        budget_bytes=chunk_rows * row_stride(67) * 4, **options,
    )  # fmt: skip
    (out.loss * 3.0).backward()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for leaf, exact in list(zip(ours, leaves))[: 3 if with_bias else 2]:
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    plain = sparse_soft_ce(hidden @ weight.T + (bias if with_bias else 0.0), labels, ids, logprobs, **options)
    for name in ("hard", "soft", "lse"):
        torch.testing.assert_close(getattr(out, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.correct, plain.correct)


def test_a_frozen_head_costs_no_weight_gradient():
    """Catches dW computed for LoRA's frozen lm_head."""
    hidden, weight, _, labels, ids, logprobs = make_linear(2, 8, 40, 6, 3)
    hidden.requires_grad_(True)
    linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, hard_weight=0.5).loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_bf16_weight_gradient_is_summed_in_fp32():
    """Catches dW rounded to bf16 after every chunk: with one row a chunk the error would grow with the
    rows."""
    hidden, weight, _, labels, ids, logprobs = make_linear(3, 256, 33, 8, 3, torch.bfloat16)
    exact = weight.double().requires_grad_(True)
    logits = (hidden @ weight.T).double()
    _, d_logits, *_ = dense_loss(logits, labels, ids, logprobs, hard_weight=0.5)
    (hidden.double() @ exact.T).backward(d_logits)
    error = {}
    for rows in (2, 256):
        leaf = weight.clone().requires_grad_(True)
        linear_sparse_soft_ce(
            hidden, leaf, labels, ids, logprobs, hard_weight=0.5, budget_bytes=rows * 48 * 2 + 33 * 8 * 4
        ).loss.backward()
        error[rows] = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error[2] < 1.5 * error[256] + 1e-3


def test_the_budget_sets_the_chunk():
    """Catches a budget that is ignored, and one too small that is silently exceeded."""

    def rows(n_rows, budget_bytes, *, weight_grad=True):
        return plan_chunk_rows(  # rows of 1,008 elements
            n_rows, 1000, 16, weight_bytes=2, weight_grad=weight_grad, logits_bytes=2, budget_bytes=budget_bytes
        )

    assert rows(49, 100_000) == 49
    assert rows(50, 100_000) == (100_000 - 64_000) // 2016
    assert rows(50, 100_000, weight_grad=False) == 49
    with pytest.raises(ConfigError, match="give at least 66016"):
        rows(51, 60_000)


def test_rows_of_a_chunk_begin_at_aligned_addresses(monkeypatch):
    """Catches a vocabulary such as 151,665 whose every other row would lose the kernel its 128-bit loads."""
    seen = []

    def spy(logits, *arguments):
        seen.append((logits.stride(0), logits.data_ptr() % 16))
        return forward_rows(logits, *arguments)

    monkeypatch.setattr(ops, "forward_rows", spy)
    hidden, weight, bias, labels, ids, logprobs = make_linear(4, 9, 41, 6, 3)
    weight.requires_grad_(True)
    out = linear_sparse_soft_ce(
        hidden, weight, labels, ids, logprobs, bias=bias, hard_weight=0.5, budget_bytes=48 * 4 * 4
    )
    out.loss.backward()
    assert seen
    assert set(seen) == {(48, 0)}
    exact = weight.detach().clone().requires_grad_(True)
    sparse_soft_ce(hidden @ exact.T + bias, labels, ids, logprobs, hard_weight=0.5).loss.backward()
    torch.testing.assert_close(weight.grad, exact.grad, rtol=1e-5, atol=1e-7)


def test_autocast_changes_no_product():
    """Catches a product that autocast makes bfloat16 beside one whose buffer it leaves in float32."""
    _, labels, ids, logprobs = make_rows(9, 6, 31, 4)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        leaves = [torch.randn(6, 5).requires_grad_(True), torch.randn(31, 5).requires_grad_(True)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = linear_sparse_soft_ce(*leaves, labels, ids, logprobs, hard_weight=0.5)
        out.loss.backward()
        found.append((out.loss, *(leaf.grad for leaf in leaves)))
    for plain, cast in zip(*found):
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_wrong_inputs_are_refused():
    """Catches a product of two dtypes and shapes that broadcast."""
    hidden, weight, bias, labels, ids, logprobs = make_linear(4, 8, 40, 6, 3)
    rows = (labels, ids, logprobs)
    for wrong in ((hidden[:, :5], weight, None), (hidden, weight.double(), None), (hidden, weight, bias[:7])):
        with pytest.raises(ConfigError):
            linear_sparse_soft_ce(wrong[0], wrong[1], *rows, bias=wrong[2], hard_weight=0.5)
