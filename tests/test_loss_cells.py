"""Cells that are ranges of the byte-sorted vocabulary, against a dense partition in fp64."""

from __future__ import annotations

import pytest
import torch
from dense_loss import dense_loss, make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_checks import FORMS, assert_elementwise, make_cells, run_ours

from fusechat.errors import ConfigError
from fusechat.loss import Cells, linear_sparse_soft_ce, sparse_soft_ce

pytestmark = pytest.mark.usefixtures("loss_backend")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("vocabulary", "n_entries"), [(9, 4), (300, 12)])
def test_ranges_match_the_dense_partition_element_by_element(form, vocabulary, n_entries):
    """Catches a token counted in two cells, a gradient not spread as the student's distribution inside its cell."""
    check_ranges(vocabulary, n_entries, form)


@pytest.mark.parametrize("n_entries", [7, 8, 15, 16, 24, 31, 40])
def test_tables_of_any_number_of_cells(n_entries):
    """Catches cells beyond those that the engine's loop over the row looks up at once."""
    check_ranges(2000, n_entries, {"missing": "tail"})


def check_ranges(vocabulary, n_entries, form):
    rows = make_rows(1, 10, vocabulary, n_entries)
    partition = torch.arange(10) % 3 == 0
    common = {"hard_weight": 0.4, "partition": partition, "cells": make_cells(1, 10, vocabulary, n_entries), **form}
    loss, gradient, size, _, soft = dense_loss(*rows, **common)
    out, ours = run_ours(*rows, **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=3e-6, atol=2e-6)
    torch.testing.assert_close(out.soft.double(), soft, rtol=2e-5, atol=5e-6)
    assert_elementwise(ours, gradient, size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 80),
    n_entries=st.integers(1, 12),
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([0.1, 3.0, 12.0]),
)
def test_any_ranges(seed, vocabulary, n_entries, form, scale):
    """Catches ranges of one token, empty ones, and ranges whose every token lies in smaller cells."""
    rows = make_rows(seed, 2, vocabulary, n_entries, scale=scale)
    common = {"hard_weight": 0.5, "cells": make_cells(seed, 2, vocabulary, n_entries), **form}
    loss, gradient, size, _, _ = dense_loss(*rows, **common)
    out, ours = run_ours(*rows, **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert_elementwise(ours, gradient, size)


def test_ranges_of_one_token_equal_single_ids():
    """Catches ranks taken for ids."""
    logits, labels, ids, logprobs = make_rows(3, 6, 40, 5)
    order = torch.randperm(40).int()
    rank = torch.empty_like(order)
    rank[order.long()] = torch.arange(40, dtype=torch.int32)
    low = torch.where(ids >= 0, rank[ids.clamp(min=0)], 0)
    cells = Cells(order, low, torch.where(ids >= 0, low + 1, 0).int())
    expected, gradient = run_ours(logits, labels, ids, logprobs, hard_weight=0.3, missing="tail")
    out, ours = run_ours(
        logits, labels, torch.full_like(ids, -1), logprobs, hard_weight=0.3, missing="tail", cells=cells
    )
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(ours, gradient)


def test_the_linear_form_takes_ranges_with_its_chunks():
    """Catches ranges of one chunk's rows applied to another's."""
    _, labels, ids, logprobs = make_rows(4, 9, 50, 6)
    cells = make_cells(4, 9, 50, 6)
    hidden, weight = torch.randn(9, 7), torch.randn(50, 7)
    common = {"hard_weight": 0.5, "missing": "tail", "cells": cells}
    whole = sparse_soft_ce(hidden @ weight.T, labels, ids, logprobs, **common)
    parts = linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, budget_bytes=2 * 64 * 4, **common)
    torch.testing.assert_close(parts.soft, whole.soft, rtol=1e-5, atol=1e-5)


def test_wrong_ranges_are_refused():
    """Catches ranges of another vocabulary, or of other rows."""
    logits, labels, ids, logprobs = make_rows(5, 4, 20, 3)
    good = make_cells(5, 4, 20, 3)
    for wrong, message in (
        (good._replace(order=good.order[:-1]), "cells.order is torch.int32"),
        (good._replace(low=good.low[:3]), "cells.low is torch.int32"),
        (good._replace(high=good.high.long()), "cells.high is torch.int64"),
        (good._replace(high=torch.full_like(good.high, 21)), "range end 21 of row 0"),
    ):
        with pytest.raises(ConfigError) as error:
            sparse_soft_ce(logits, labels, ids, logprobs, hard_weight=0.5, cells=wrong)
        assert message in str(error.value)
