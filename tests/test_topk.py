"""Top-k log-probabilities from hidden states against log_softmax over all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusechat.errors import ConfigError
from fusechat.loss.backend import backend_for, native_topk
from fusechat.topk import _largest, topk_logprob


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_rows", "vocabulary", "k"), [(0, 7, 2), (1, 5, 5), (13, 211, 10), (9, 1003, 128), (5, 1000, 3), (4, 2048, 8)]
)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
@pytest.mark.usefixtures("loss_backend")
def test_matches_the_full_softmax(dtype, n_rows, vocabulary, k, options):
    """Catches a chunk in the wrong rows, a cap left out, a softmax over the k entries only."""
    rng = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(n_rows, 24, generator=rng).to(dtype)
    weight = torch.randn(vocabulary, 24, generator=rng).to(dtype)
    bias = torch.randn(vocabulary, generator=rng).to(dtype)
    labels = torch.randint(0, vocabulary, (n_rows,), generator=rng)
    labels[::3] = -100
    ids, logprobs, lse, label_logprob = topk_logprob(
        hidden, weight, k, labels, bias=bias, budget_bytes=4 * vocabulary * 8, **options
    )
    z = torch.nn.functional.linear(hidden, weight, bias).double()
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    exact = torch.log_softmax(z, 1)
    assert (ids.dtype, logprobs.dtype, lse.dtype) == (torch.int32, torch.float32, torch.float32)
    torch.testing.assert_close(lse.double(), z.logsumexp(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logprobs.double(), exact.topk(k, 1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, ids.long()), exact.topk(k, 1).values, rtol=0, atol=1e-6)
    valid = labels >= 0
    torch.testing.assert_close(
        label_logprob[valid].double(), exact[valid].gather(1, labels[valid, None]).squeeze(1), rtol=1e-5, atol=1e-5
    )
    assert label_logprob[~valid].isnan().all()
    assert all(len(set(row)) == k for row in ids.tolist())


def test_a_forced_backend_is_used_or_refused(monkeypatch):
    """Catches a top-k by torch where the engine was asked for."""
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    monkeypatch.setenv("FUSECHAT_LOSS", "native")
    with pytest.raises(ConfigError, match=r"FUSECHAT_LOSS is native, whose top-k takes float32.*float64"):
        topk_logprob(hidden.double(), weight.double(), 3)
    ids = topk_logprob(hidden, weight, 3)[0]
    monkeypatch.setenv("FUSECHAT_LOSS", "torch")
    assert torch.equal(topk_logprob(hidden.double(), weight.double(), 3)[0], ids)


@pytest.mark.skipif(backend_for(torch.device("cpu")) != "native", reason="the compiled engine is not built")
def test_the_engine_sees_blocks_of_the_vocabulary(monkeypatch):
    """Catches logits of whole rows, candidates of one block only, and equal logits out of the order of their ids."""
    seen = []

    def watched(logits, *arguments):
        seen.append(logits.nbytes)
        return native_topk(logits, *arguments)

    monkeypatch.setattr("fusechat.topk.native_topk", watched)
    n_rows, vocabulary = 300, 30_000
    bias = torch.zeros(vocabulary)
    bias[:9000] = -torch.inf  # a whole block that nothing falls into
    bias[[9001, 17_000, 29_999]] = torch.tensor([1.0, 3.0, 2.0])
    labels = torch.tensor([29_999, 5, -100] * 100)
    hidden, weight = torch.zeros(n_rows, 4), torch.zeros(vocabulary, 4)
    ids, logprobs, lse, label_logprob = topk_logprob(hidden, weight, 5, labels, bias=bias)
    assert ids.tolist() == [[17_000, 29_999, 9001, 9000, 9002]] * n_rows
    exact = torch.log_softmax(bias.double(), 0)
    torch.testing.assert_close(logprobs[7].double(), exact[ids[7].long()], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[7].double(), bias.double().logsumexp(0), rtol=0, atol=2e-6)
    assert label_logprob[0].item() == pytest.approx(exact[29_999].item(), abs=2e-6)
    assert label_logprob[1].item() == -float("inf")
    assert label_logprob[2].isnan()
    assert max(seen) <= 8 << 20
    assert sum(seen) == 4 * n_rows * vocabulary


def test_without_labels_and_with_wrong_arguments():
    """Catches a label column of zeros that would read as certainty, and k or a budget that cannot be."""
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    assert topk_logprob(hidden, weight, 3)[3].isnan().all()
    for wrong in ({"k": 0}, {"k": 21}, {"k": 3, "budget_bytes": 8}, {"k": 3, "labels": torch.zeros(3).long()}):
        with pytest.raises(ConfigError):
            topk_logprob(hidden, weight, **wrong)
    with pytest.raises(ConfigError):
        topk_logprob(hidden, weight.bfloat16(), 3)


@given(
    n_rows=st.integers(1, 4), vocabulary=st.integers(1, 1500), k=st.integers(1, 12), few=st.booleans(),
    seed=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_the_largest_by_blocks_are_the_largest(n_rows, vocabulary, k, few, seed, data):
    """Values always; ids wherever no value occurs twice (`few` makes ties), each once; NaN where there is NaN."""
    k = min(k, vocabulary)
    rng = torch.Generator().manual_seed(seed)
    z = torch.randint(0, 4, (n_rows, vocabulary), generator=rng).float() if few else torch.randn(n_rows, vocabulary)
    z[:, data.draw(st.integers(0, vocabulary - 1))] = data.draw(st.sampled_from([9.0, -float("inf"), float("nan")]))
    values, ids = _largest(z, k)
    expected = z.topk(k)
    assert torch.equal(values.nan_to_num(77.0), expected.values.nan_to_num(77.0))
    assert torch.equal(z.gather(1, ids).nan_to_num(77.0), values.nan_to_num(77.0))
    assert all(len(set(row)) == k for row in ids.tolist())
