"""The fusion loss as torch operators: schemas, fake kernels, autograd, torch.compile, and no hidden waits."""

from __future__ import annotations

import inspect

import pytest
import torch
from dense_loss import make_rows

from fusechat.loss import backend, linear, linear_sparse_soft_ce, logits, ops, sparse_soft_ce
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import check_rows

OPTIONS = LossOptions(missing="tail", divergence="jsd")


def test_operators_keep_torchs_rules():
    """Catches a hidden mutation, fake shapes that differ from real ones, and a wrong autograd registration."""
    z, labels, ids, logprobs = make_rows(1, 5, 23, 3)
    rows = check_rows(labels, ids, logprobs, 0.5, None, None, None, shape=(5, 23))
    scalars = OPTIONS.scalars().values()
    for want_grad in (False, True):
        arguments = (z.clone().requires_grad_(want_grad), *rows, *scalars, want_grad)
        torch.library.opcheck(ops.sparse_soft_ce_op, arguments)
    hidden, weight, bias = torch.randn(5, 4), torch.randn(23, 4), torch.randn(23)
    for wanted in ((False, False, False), (True, True, True), (True, False, False)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((hidden, weight, bias), wanted)]
        torch.library.opcheck(ops.linear_sparse_soft_ce_op, (*leaves, None, *rows, *scalars, None, *wanted))


@pytest.mark.slow
def test_compiles_as_one_graph_with_equal_results():
    """Catches a graph break, and a gradient that differs from the eager one."""
    _, labels, ids, logprobs = make_rows(2, 6, 31, 4)
    hidden, weight = torch.randn(6, 5), torch.randn(31, 5)

    def both(hidden, weight):
        by_logits = sparse_soft_ce(hidden @ weight.T, labels, ids, logprobs, hard_weight=0.3, missing="tail")
        by_hidden = linear_sparse_soft_ce(hidden * 2, weight, labels, ids, logprobs, hard_weight=0.3)
        return by_logits.loss * 3 + by_hidden.loss, by_logits.soft

    results = []
    for call in (both, torch.compile(both, fullgraph=True)):
        leaves = [t.clone().requires_grad_(True) for t in (hidden, weight)]
        loss, soft = call(*leaves)
        loss.backward()
        results.append((loss.detach(), soft, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


def test_nothing_waits_for_a_gpu():
    """Catches a read of a device value, which would stall the queue of kernels."""
    for module in (backend, linear, logits, ops):
        source = inspect.getsource(module)
        for call in (".item(", ".cpu(", "torch.equal("):
            assert call not in source, (module.__name__, call)
    # Indices are checked where reading them is free.
    assert source.count(".tolist(") == 0
    assert 'device.type == "cpu"' in inspect.getsource(ops.scale_)


def test_known_rows_save_the_search_and_change_nothing():
    """Catches `kept` taken for a mask, and rows outside it that still count."""
    _, labels, ids, logprobs = make_rows(3, 8, 31, 4)
    hidden, weight = torch.randn(8, 5, requires_grad=True), torch.randn(31, 5)
    kept = (labels != -100).nonzero().squeeze(1)
    outs = [
        linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, hard_weight=0.3, kept=rows)
        for rows in (None, kept)
    ]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert torch.equal(outs[0].soft, outs[1].soft)


def test_a_second_backward_is_refused():
    """Catches a gradient handed out twice: it lives in memory that the first backward gave away."""
    z, labels, ids, logprobs = make_rows(4, 3, 11, 2)
    out = sparse_soft_ce(z.requires_grad_(True) * 1, labels, ids, logprobs, hard_weight=0.3)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken twice"):
        out.loss.backward()
