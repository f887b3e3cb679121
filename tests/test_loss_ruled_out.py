"""Logits of −∞: tokens that a model rules out are none of the vocabulary's."""

from __future__ import annotations

import pytest
from dense_loss import make_rows
from loss_checks import RULED_OUT_FORMS, assert_like_a_smaller_vocabulary, run_ours

pytestmark = pytest.mark.usefixtures("loss_backend")


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
