"""Top-k log-probabilities from hidden states against log_softmax over all logits."""

from __future__ import annotations

import pytest
import torch

from fusechat.errors import ConfigError
from fusechat.topk import topk_logprob


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "vocabulary", "k"), [(0, 7, 2), (1, 5, 5), (13, 211, 10), (9, 1003, 128)])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
def test_matches_the_full_softmax(dtype, n_rows, vocabulary, k, options):
    """Catches a chunk in the wrong rows, a softmax over the k entries
    only."""
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


def test_without_labels_and_with_wrong_arguments():
    """Catches a label column of zeros that would read as certainty, and k or a budget that cannot be."""
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    assert topk_logprob(hidden, weight, 3)[3].isnan().all()
    for wrong in ({"k": 0}, {"k": 21}, {"k": 3, "budget_bytes": 8}, {"k": 3, "labels": torch.zeros(3).long()}):
        with pytest.raises(ConfigError):
            topk_logprob(hidden, weight, **wrong)
    with pytest.raises(ConfigError):
        topk_logprob(hidden, weight.bfloat16(), 3)
