"""Logits of −∞: tokens that a model rules out are none of the vocabulary's."""

from __future__ import annotations

import pytest
import torch
from dense_loss import make_rows
from loss_checks import run_ours

pytestmark = pytest.mark.usefixtures("loss_backend")

RULED_OUT_FORMS = [
    {"missing": "tail", "label_smoothing": 0.1},
    {"missing": "uniform", "student_temperature": 2.0},
    {"missing": "uniform", "label_smoothing": 0.2, "divergence": "kl", "temperature": 2.0},
]


def widened_by_ruled_out(rows):
    """Return rows [N, V] in a vocabulary of 7 tokens more, whose logits are −∞, and where the old tokens went."""
    logits, labels, ids, logprobs = rows
    n_rows, vocabulary = logits.shape
    kept = torch.randperm(vocabulary + 7, generator=torch.Generator().manual_seed(0))[:vocabulary].sort().values
    wide = torch.full((n_rows, vocabulary + 7), -float("inf"))
    wide[:, kept] = logits
    labels = torch.where(labels >= 0, kept[labels.clamp(min=0)], labels)
    return (wide, labels, torch.where(ids >= 0, kept[ids.clamp(min=0)], ids), logprobs), kept


def assert_like_a_smaller_vocabulary(run, form):
    """Compare `run` on rows with tokens of −∞ to the same rows without those tokens."""
    common = {"hard_weight": 0.4, "partition": torch.arange(8) % 4 == 0, **form}
    rows = make_rows(19, 8, 3000, 4)
    expected, small = run(*rows, **common)
    rows, kept = widened_by_ruled_out(rows)
    out, gradient = run(*rows, **common)
    for value, exact in zip(out, expected):
        torch.testing.assert_close(value, exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, kept], small, rtol=2e-5, atol=1e-8)
    assert gradient.count_nonzero() == gradient[:, kept].count_nonzero()


@pytest.mark.parametrize("form", RULED_OUT_FORMS, ids=str)
def test_tokens_that_are_ruled_out_are_none_of_the_vocabulary(form):
    """Catches a share of a smoothed label, or of the teacher's missing mass, for tokens whose logit is −∞."""
    assert_like_a_smaller_vocabulary(run_ours, form)


def test_a_label_that_is_ruled_out_is_infinitely_surprising():
    """Catches ∞ − ∞ where the label is smoothed: the loss of what the model rules out is ∞, not NaN."""
    logits, labels, ids, logprobs = make_rows(19, 3, 60, 4)
    labels[:], logits[:, 5] = 5, -float("inf")
    out, _ = run_ours(logits, labels, ids, logprobs, hard_weight=0.4, label_smoothing=0.1)
    assert (out.hard == float("inf")).all()
