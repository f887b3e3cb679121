"""The loss on vocabulary shards, on two processes, against the whole vocabulary in one."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
from dense_loss import dense_loss, make_rows
from loss_checks import FORMS, assert_elementwise

from fusechat.errors import ConfigError
from fusechat.loss import sparse_soft_ce, tensor_parallel
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import check_rows
from fusechat.loss.tensor_parallel import shard_loss, sharded_sparse_soft_ce

N, V, K = 12, 61, 9
FIRST = (0, 23)  # shards of different width


def common(form: dict) -> dict:
    return {"hard_weight": 0.4, "partition": torch.arange(N) % 5 == 0, **form}


def worker(rank: int, port: int, results) -> None:
    """Compute every form on this rank's columns."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    logits, labels, ids, logprobs = make_rows(1, N, V, K)
    shard = logits[:, FIRST[rank] : (*FIRST, V)[rank + 1]]
    out = []
    for form in FORMS:
        leaf = shard.clone().requires_grad_(True)
        loss = sharded_sparse_soft_ce(leaf * 1, labels, ids, logprobs, first=FIRST[rank], vocabulary=V, **common(form))
        (gradient,) = torch.autograd.grad(loss.loss * 2.0, leaf)
        out.append([tensor.detach().numpy() for tensor in (*loss, gradient)])
    results.put((rank, out))
    torch.distributed.destroy_process_group()


def test_two_shards_equal_the_whole_element_by_element():
    """Catches a tail summed on one rank only, an id looked up on the wrong rank, a label counted twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    rows = make_rows(1, N, V, K)
    for i, form in enumerate(FORMS):
        loss, gradient, size, hard, soft = dense_loss(*rows, **common(form))
        shards = [[torch.from_numpy(value) for value in found[rank][i]] for rank in range(2)]
        for shard in shards:
            torch.testing.assert_close(shard[0].double(), loss, rtol=3e-6, atol=3e-6)
            torch.testing.assert_close(shard[1].double(), hard, rtol=3e-6, atol=3e-6)
            torch.testing.assert_close(shard[2].double(), soft, rtol=2e-5, atol=5e-6)
            assert torch.equal(shard[4], (rows[0].argmax(1) == rows[1]) & (rows[1] != -100))
        assert_elementwise(torch.cat([shard[5] for shard in shards], 1), 2 * gradient, 2 * size)


def test_columns_outside_the_vocabulary_are_refused():
    """Catches a shard placed beyond the end."""
    logits, labels, ids, logprobs = make_rows(2, 3, 10, 2)
    for first in (-1, 5):
        with pytest.raises(ConfigError, match="not within the vocabulary of 14"):
            sharded_sparse_soft_ce(logits, labels, ids, logprobs, first=first, vocabulary=14, hard_weight=0.5)


@pytest.fixture
def alone(monkeypatch):
    """Let this process be the only rank, which holds every column."""
    monkeypatch.setattr(tensor_parallel, "_reduce", lambda values, *_: values)


@pytest.mark.parametrize(
    "form", [{"missing": "tail", "label_smoothing": 0.1}, {"missing": "uniform"}, {"softcap": 5.0}], ids=str
)
def test_a_token_that_is_impossible_leaves_numbers(alone, form):
    """Catches 0 · −∞: a model that masks tokens gives their logits as −∞."""
    logits, labels, ids, logprobs = make_rows(3, N, V, K)
    logits[:, 5] = -float("inf")
    labels[labels == 5], ids[ids == 5] = 6, 6
    whole, shard = (logits.clone().requires_grad_(True) for _ in range(2))
    expected = sparse_soft_ce(whole * 1, labels, ids, logprobs, hard_weight=0.4, **form)
    found = sharded_sparse_soft_ce(shard * 1, labels, ids, logprobs, first=0, vocabulary=V, hard_weight=0.4, **form)
    for out in (expected, found):
        out.loss.backward()
    assert found.loss.isfinite()
    for ours, exact in zip((*found, shard.grad), (*expected, whole.grad)):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_logits_beyond_the_cap_keep_their_gradient(alone):
    """Catches 1 − tanh² for the slope of a softcap, of which nothing is left where tanh rounds to one."""
    rows = make_rows(5, N, V, K, scale=12.0)
    form = {"hard_weight": 0.4, "missing": "tail", "softcap": 2.0}
    _, gradient, size, _, _ = dense_loss(*rows, **form)
    leaf = rows[0].clone().requires_grad_(True)
    sharded_sparse_soft_ce(leaf * 1, *rows[1:], first=0, vocabulary=V, **form).loss.backward()
    assert_elementwise(leaf.grad, gradient, size)


def test_an_index_no_rank_owns_does_not_pass_for_absent(alone):
    """Catches a row that is computed without its label or without an entry of its teacher."""
    logits, labels, ids, logprobs = make_rows(4, N, V, K)
    labels[:4] = torch.tensor([V, 3, -1, 3])
    ids[1, 0] = V
    with pytest.raises(ConfigError, match=f"label {V} of row 0 lies outside the vocabulary of {V}"):
        sharded_sparse_soft_ce(logits, labels, ids, logprobs, first=0, vocabulary=V, hard_weight=0.4)
    rows = check_rows(labels, ids, logprobs, 0.4, None, None, None, shape=(N, V))
    loss = shard_loss(logits, rows, LossOptions(), 0, V, None, None)[0]  # as on a GPU, where asking would wait
    assert loss.isnan().tolist() == [True, True, True] + [False] * (N - 3)
