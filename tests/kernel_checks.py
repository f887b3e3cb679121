"""The Triton kernels against their definitions, run by test_kernels.py: under the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from dense_loss import dense_loss, make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE, run_there, there
from loss_checks import (
    FORMS,
    RULED_OUT_FORMS,
    assert_elementwise,
    assert_like_a_smaller_vocabulary,
    make_cells,
    rising_rows,
)

from fusechat import kernels
from fusechat.errors import ConfigError
from fusechat.kernels import reference, sce
from fusechat.kernels.scale import BLOCK, scale_rows_
from fusechat.kernels.sparse_soft_ce import sparse_soft_ce_rows
from fusechat.kernels.topk_logprob import topk_logprob_rows
from fusechat.loss import Cells, linear_sparse_soft_ce, sparse_soft_ce
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import check_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Vocabularies of real models, one of a size that no vector divides: too much for the interpreter.
LARGE = [(128_256, 10), (151_665, 10), (262_144, 64)] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FUSECHAT_LOSS", "triton")


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("vocabulary", "n_entries"), [(2, 1), (257, 33)])
def test_every_form_matches_its_definition_element_by_element(options, vocabulary, n_entries):
    """Catches a formula that differs from reference.py's, and a cell whose −∞ reaches the result."""
    rows = make_rows(1, 10, vocabulary, n_entries)
    common = {"hard_weight": torch.linspace(0, 1, 10), "partition": torch.arange(10) % 5 == 0, **options}
    loss, gradient, size, hard, soft = dense_loss(*rows, **common)
    out, ours = run_there(*rows, **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.hard.double(), hard, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(out.soft.double(), soft, rtol=2e-5, atol=5e-6)
    assert_elementwise(ours, gradient, 2 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "n_entries"), [(777, 0), (8191, 10), (8193, 10), (20001, 128), *LARGE])
def test_rows_of_several_blocks(vocabulary, n_entries, dtype):
    """Catches the unmasked main loop reading past the row, and a remainder left out of either pass."""
    logits, labels, ids, logprobs = make_rows(2, 3, vocabulary, n_entries)
    logits = (logits + torch.linspace(-9, 9, vocabulary)).to(dtype)
    rows = check_rows(labels, ids, logprobs, 0.4, torch.ones(3), None, None, shape=(3, vocabulary))
    options = LossOptions(missing="tail").scalars()
    exact = torch.full_like(logits, float("nan"))
    expected = reference.sparse_soft_ce_chunk(logits, *rows, **options, grad=exact)
    # Columns behind the row are another's, and results start as NaN.
    memory = torch.full((3, vocabulary + 24), 7.0, dtype=dtype, device=DEVICE)
    logits, exact, *rows = there(logits, exact, *rows)
    for inplace in (True, False):
        memory[:, :vocabulary] = logits
        ours = memory[:, :vocabulary] if inplace else torch.full_like(logits, float("nan"))
        values = sparse_soft_ce_rows(memory[:, :vocabulary], *rows, **options, grad=ours)
        for value, reference_value in zip(values, expected):
            torch.testing.assert_close(value.cpu(), reference_value, rtol=1e-5, atol=1e-5)
        rtol, atol = {torch.float32: (1e-5, 1e-9), torch.bfloat16: (8e-3, 1e-9), torch.float16: (1e-3, 1e-7)}[dtype]
        torch.testing.assert_close(ours, exact, rtol=rtol, atol=atol)
        assert (memory[:, vocabulary:] == 7).all()
        assert inplace or torch.equal(memory[:, :vocabulary], logits)


def test_without_a_gradient_the_logits_come_back():
    """Catches the −∞ of the cells left in the caller's logits."""
    logits, labels, ids, logprobs = make_rows(3, 6, 100, 7)
    logits, *rows = there(logits, *check_rows(labels, ids, logprobs, 0.4, None, None, None, shape=(6, 100)))
    before = logits.clone()
    sparse_soft_ce_rows(logits, *rows, **LossOptions(missing="tail").scalars(), grad=None)
    assert torch.equal(logits, before)


def test_an_index_outside_the_vocabulary_makes_the_loss_nan():
    """Catches a wrong id that passes for an absent one: nothing on a GPU can raise without a wait."""
    logits, labels, ids, logprobs = make_rows(4, 4, 50, 3)
    labels[:] = torch.tensor([3, 50, -7, 4])
    ids[0, 1] = 50
    logits, *rows = there(logits, *check_rows(labels, ids, logprobs, 0.4, None, None, None, shape=(4, 50)))
    loss = sparse_soft_ce_rows(logits, *rows, **LossOptions().scalars(), grad=None)[0]
    assert loss.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("form", RULED_OUT_FORMS, ids=str)
def test_tokens_that_are_ruled_out_are_none_of_the_vocabulary(form):
    """Catches a share of a smoothed label, or of the teacher's missing mass, for tokens whose logit is −∞."""
    assert_like_a_smaller_vocabulary(run_there, form)


def test_ranges_whose_tokens_are_ruled_out():
    """Catches −∞ − (−∞) in a cell that the model rules out as a whole, and a share of the smoothed label for it."""
    logits, labels, ids, logprobs = make_rows(9, 3, 90, 3)
    order, logits[:, 10:20] = torch.arange(90).int(), -float("inf")
    low, high = torch.tensor([[10, 15, 40]] * 3).int(), torch.tensor([[20, 25, 60]] * 3).int()
    logprobs[:, 0], labels[:] = -float("inf"), 30
    rows = check_rows(labels, ids, logprobs, 0.4, torch.ones(3), None, Cells(order, low, high), shape=(3, 90))
    gradient = torch.full_like(logits, float("nan"))
    scalars = LossOptions(missing="tail", label_smoothing=0.1).scalars()
    exact = reference.sparse_soft_ce_chunk(logits, *rows, **scalars, grad=gradient)
    logits, *rows = there(logits, *rows)
    ours = torch.full_like(logits, float("nan"))
    values = sparse_soft_ce_rows(logits, *rows, **scalars, grad=ours)
    torch.testing.assert_close(ours.cpu(), gradient, rtol=1e-5, atol=1e-8)
    for value, expected in zip(values, exact):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_zero_and_no_row_is_no_launch():
    """Catches a grid of zero programs, and NaN logits of padding that reach the gradient."""
    logits, labels, ids, logprobs = make_rows(5, 4, 50, 3)
    labels[:2] = -100
    logits[:2] = float("nan")
    out, gradient = run_there(logits, labels, ids, logprobs, hard_weight=0.5)
    assert out.loss.isfinite()
    assert not gradient[:2].any()
    out, gradient = run_there(logits[:0], labels[:0], ids[:0], logprobs[:0], hard_weight=0.5)
    assert out.loss == 0


def test_the_linear_form_uses_it():
    """Catches a chunk's buffer whose rows are apart."""
    _, labels, ids, logprobs = make_rows(6, 7, 60, 4)
    hidden, weight = torch.randn(7, 5), torch.randn(60, 5)
    loss, *_ = dense_loss((hidden @ weight.T).double(), labels, ids, logprobs, hard_weight=0.5)
    hidden, weight, *rows = there(hidden, weight, labels, ids, logprobs)
    out = linear_sparse_soft_ce(hidden.requires_grad_(True), weight, *rows, hard_weight=0.5, budget_bytes=3 * 64 * 4)
    torch.testing.assert_close(out.loss.double().cpu(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [FORMS[1], FORMS[3], FORMS[-4], FORMS[-1]], ids=str)
def test_ranges_match_the_dense_partition_element_by_element(form):
    """Catches a token counted in two cells, or summed with the tail, and a row without ranges taken for one with."""
    rows = make_rows(7, 6, 90, 6)
    cells = make_cells(7, 6, 90, 6)
    cells.high[1] = cells.low[1]
    common = {"hard_weight": 0.4, "partition": torch.arange(6) % 3 == 0, "cells": cells, **form}
    loss, gradient, size, _, soft = dense_loss(*rows, **common)
    out, ours = run_there(*rows, **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(out.soft.double(), soft, rtol=2e-5, atol=1e-5)
    assert_elementwise(ours, gradient, 2 * size)


def test_ranges_leave_the_logits_where_no_gradient_is_wanted():
    """Catches −∞ left in the caller's logits, and ranges longer than a gathered block."""
    logits, labels, ids, logprobs = make_rows(8, 3, 2000, 3)
    order = torch.randperm(2000).int()
    low, high = torch.tensor([[0, 100, 0]] * 3).int(), torch.tensor([[1500, 800, 0]] * 3).int()
    rows = check_rows(labels, ids, logprobs, 0.4, None, None, Cells(order, low, high), shape=(3, 2000))
    options = LossOptions(missing="tail").scalars()
    exact = reference.sparse_soft_ce_chunk(logits, *rows, **options, grad=None)
    logits, *rows = there(logits, *rows)
    before = logits.clone()
    values = sparse_soft_ce_rows(logits, *rows, **options, grad=None)
    assert torch.equal(logits, before)
    for value, expected in zip(values, exact):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)
    rows[-1][1, 0] = 2001
    assert sparse_soft_ce_rows(logits, *rows, **options, grad=None)[0].isnan().tolist() == [
        False,
        bool(labels[1] != -100),
        False,
    ]


def test_a_low_temperature_of_rows_whose_logits_rise():
    """Catches sums that keep an earlier block's maximum."""
    common = {"hard_weight": 0.4, "missing": "tail", "student_temperature": 0.1}
    loss, gradient, size, _, _ = dense_loss(*rising_rows(), **common)
    out, ours = run_there(*rising_rows(), **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=3e-6, atol=1e-6)
    assert_elementwise(ours, gradient, size / 0.1)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("vocabulary", "k"), [(5, 5), (4096 + 300, 7), *((v, 64) for v, _ in LARGE)])
def test_the_most_probable_tokens_come_in_order(vocabulary, k, softcap):
    """Catches a token given twice, a group whose second best is lost, and −∞ that crowds out real tokens."""
    rng = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-9, 9, (3, vocabulary), generator=rng).float()  # many ties
    logits[0] = torch.randn(vocabulary, generator=rng)
    logits[1, 2:] = -float("inf")
    labels = torch.tensor([vocabulary - 1, -100, 0])
    ids, logprobs, lse, label_logprob = (t.cpu() for t in topk_logprob_rows(*there(logits, k, labels, softcap)))
    z = softcap * torch.tanh(logits.double() / softcap) if softcap else logits.double()
    order = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids.long(), order.indices[:, :k])
    torch.testing.assert_close(lse.double(), z.logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprobs.double(), order.values[:, :k] - z.logsumexp(1, True), rtol=1e-5, atol=1e-5)
    expected = torch.stack([z[0, -1] - lse[0], torch.tensor(float("nan")), z[2, 0] - lse[2]])
    torch.testing.assert_close(label_logprob.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_in_the_same_memory_are_refused():
    """Catches programs that put −∞ in place of each other's cells."""
    logits, *rows = there(*make_rows(10, 4, 50, 3))
    with pytest.raises(ConfigError, match="rows that do not overlap"):
        sparse_soft_ce(logits[:1].expand(4, 50), *rows, hard_weight=0.5, inplace=False)


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    """Catches a start on the current device, where an address of another's means nothing."""
    entered, started = [], []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            entered.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **_: started.append(entered[-1] is arguments[0])

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for module in (kernels.sparse_soft_ce, kernels.topk_logprob, kernels.scale):
        monkeypatch.setattr(module, f"_{module.__name__.rsplit('.', 1)[1]}", Kernel())
    monkeypatch.setattr(sce, "_energies", Kernel())
    logits, labels, ids, logprobs = there(*make_rows(11, 2, 50, 3))
    rows = check_rows(labels, ids, logprobs, 0.5, None, None, None, shape=(2, 50))
    sparse_soft_ce_rows(logits, *rows, **LossOptions().scalars(), grad=None)
    topk_logprob_rows(logits, 3, labels, 0.0)
    scale_rows_(logits, torch.ones((), device=DEVICE))
    tensor = sce.Blocks(n=100, n_targets=2, fetch=lambda *_: (logits[0], logits), block_items=1024)
    sce.energies(tensor, None)
    assert started == [True] * 4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 300),
    n_entries=st.integers(0, 130),
    form=st.sampled_from(FORMS),
)
def test_any_shape(seed, vocabulary, n_entries, form):
    """Catches cells that are the whole vocabulary, and more entries than a power of two."""
    rows = make_rows(seed, 2, vocabulary, n_entries)
    loss, gradient, size, _, _ = dense_loss(*rows, hard_weight=0.5, **form)
    out, ours = run_there(*rows, hard_weight=0.5, **form)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert_elementwise(ours, gradient, 3 * size)


@pytest.mark.parametrize("factor", [1.0, 0.25, float("nan")])
@pytest.mark.parametrize("n_columns", [1, BLOCK - 1, BLOCK + 3])
def test_gradients_are_scaled_in_place(n_columns, factor):
    """Catches a remainder or a row of a program's second round left out, and columns behind the row written to."""
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.randn(9, n_columns + 5, device=DEVICE).to(dtype)
        before = memory.clone()
        scale_rows_(memory[:, :n_columns], torch.tensor(factor, device=DEVICE))
        expected = (before[:, :n_columns].float() * factor).to(dtype)
        torch.testing.assert_close(memory[:, :n_columns], expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(memory[:, n_columns:], before[:, n_columns:])
