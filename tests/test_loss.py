"""The fusion loss against its dense fp64 definitions, element by element."""

from __future__ import annotations

import pytest
import torch
from dense_loss import dense_loss, make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_checks import FORMS, assert_elementwise, rising_rows, run_ours

from fusechat.errors import ConfigError
from fusechat.loss import linear_sparse_soft_ce, sparse_soft_ce

pytestmark = pytest.mark.usefixtures("loss_backend")


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("vocabulary", "n_entries"), [(2, 1), (41, 3), (401, 10), (1271, 33)])
def test_every_form_matches_its_definition_element_by_element(options, vocabulary, n_entries):
    """Catches a wrong sign, a missing term or a wrong constant in any divergence, missing form or option."""
    rows = make_rows(1, 12, vocabulary, n_entries)
    hard_weight = torch.linspace(0, 1, 12)
    partition = torch.arange(12) % 5 == 0
    common = dict(hard_weight=hard_weight, partition=partition, **options)
    loss, gradient, size, hard, soft = dense_loss(*rows, **common)
    out, ours = run_ours(*rows, **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(out.hard.double(), hard, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.soft.double(), soft, rtol=1e-5, atol=3e-6)
    assert_elementwise(ours, gradient, size)


@pytest.mark.parametrize("n_entries", [0, 1, 2, 64, 128, 130])
def test_any_number_of_entries(n_entries):
    """Catches K = 0 (plain cross-entropy) and K above a power of two."""
    rows = make_rows(2, 7, 333, n_entries)
    loss, gradient, size, _, _ = dense_loss(*rows, hard_weight=0.4, missing="tail")
    out, ours = run_ours(*rows, hard_weight=0.4, missing="tail")
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-6, atol=1e-6)
    assert_elementwise(ours, gradient, size)


def test_no_entries_is_plain_cross_entropy():
    """Catches a λ or a normaliser that differs from the rest of the world's."""
    logits, labels, ids, logprobs = make_rows(3, 9, 101, 0)
    out, gradient = run_ours(logits, labels, ids, logprobs, hard_weight=1.0)
    z = logits.clone().requires_grad_(True)
    plain = torch.nn.functional.cross_entropy(z, labels)
    plain.backward()
    torch.testing.assert_close(out.loss, plain)
    torch.testing.assert_close(gradient, z.grad)


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_logits_far_from_zero_keep_their_precision(shift):
    """Catches exponents formed as z·log2e − lse·log2e, which lose 5e-5 at |z| = 500."""
    rows = make_rows(4, 6, 997, 10, shift=shift)
    _, gradient, size, _, _ = dense_loss(*rows, hard_weight=0.5, missing="tail")
    _, ours = run_ours(*rows, hard_weight=0.5, missing="tail")
    assert_elementwise(ours, gradient, size)


def test_a_tail_of_vanishing_mass_keeps_its_gradient():
    """Catches 1 − Σ Q_k for the tail, and p / Q_tail: with peaked logits the one is 0 and the other
    infinite."""
    logits, labels, ids, logprobs = make_rows(5, 4, 53, 3, scale=1.0)
    logits[:, 5] += 150.0
    ids[:, 0], labels[:] = 5, 5
    logprobs -= 1.0  # a tail whose own mass fp32 holds well
    _, gradient, size, _, _ = dense_loss(logits, labels, ids, logprobs, hard_weight=0.2, missing="tail")
    _, ours = run_ours(logits, labels, ids, logprobs, hard_weight=0.2, missing="tail")
    assert_elementwise(ours, gradient, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("missing", ["renormalise", "tail"])
def test_low_precision_logits_lose_only_the_rounding_of_the_result(dtype, missing):
    """Catches accumulation, or the sum of target and student, in the logits' own dtype."""
    logits, labels, ids, logprobs = make_rows(6, 8, 515, 10)
    logits = logits.to(dtype)
    weight = torch.full((8,), 1.0)
    common = {"hard_weight": 0.5, "missing": missing, "row_weight": weight}
    loss, gradient, size, _, _ = dense_loss(logits, labels, ids, logprobs, **common)
    out, ours = run_ours(logits, labels, ids, logprobs, **common)
    assert ours.dtype == dtype
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-6, atol=1e-6)
    assert_elementwise(ours, gradient, size, dtype)


def test_upstream_gradients_and_row_weights():
    """Catches a backward that ignores the incoming gradient, and a mean where a weighted sum was asked
    for."""
    rows = make_rows(7, 10, 77, 5)
    row_weight = torch.rand(10)
    _, gradient, size, _, _ = dense_loss(*rows, hard_weight=0.3, row_weight=row_weight)
    _, ours = run_ours(*rows, hard_weight=0.3, row_weight=row_weight, upstream=-2.5)
    assert_elementwise(ours, -2.5 * gradient, 2.5 * size)


def test_in_place_writes_the_logits_and_copy_leaves_them():
    """Catches a hidden second [N, V] buffer, and inplace=False that destroys its input."""
    logits, labels, ids, logprobs = make_rows(8, 5, 64, 4)
    for inplace in (True, False):
        leaf = logits.clone().requires_grad_(True)
        z = leaf * 1
        before = z.detach().clone()
        out = sparse_soft_ce(z, labels, ids, logprobs, hard_weight=0.5, inplace=inplace)
        assert torch.equal(z.detach(), before) != inplace
        out.loss.backward()
        assert torch.isfinite(leaf.grad).all()
    # Without need of a gradient the logits must stay.
    sparse_soft_ce(logits, labels, ids, logprobs, hard_weight=0.5)
    assert torch.equal(logits, before)


def test_rows_that_are_ignored_get_zero_even_when_their_logits_are_not_numbers():
    """Catches 0 · NaN in the gradient of padding."""
    logits, labels, ids, logprobs = make_rows(9, 6, 31, 3)
    labels[2:4] = -100
    logits[2:4] = float("nan")
    out, gradient = run_ours(logits, labels, ids, logprobs, hard_weight=0.5, missing="tail")
    assert torch.isfinite(out.loss)
    assert not gradient[2:4].any()
    assert torch.isfinite(gradient).all()
    assert not out.lse[2:4].any()
    assert not out.correct[2:4].any()


@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_row_that_counts_gives_zero(n_rows):
    """Catches 0 / 0 in the mean."""
    logits, labels, ids, logprobs = make_rows(10, n_rows, 17, 4)
    labels[:] = -100
    out, gradient = run_ours(logits, labels, ids, logprobs, hard_weight=0.5)
    assert out.loss == 0
    assert not gradient.any()
    hidden, weight = torch.randn(n_rows, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    out = linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, hard_weight=0.5)
    out.loss.backward()
    assert out.loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_rows_may_be_strided():
    """Catches a kernel that takes the stride of a row for its width."""
    logits, labels, ids, logprobs = make_rows(11, 6, 50, 4)
    padded = torch.full((6, 64), float("nan"))
    padded[:, :50] = logits
    expected, _ = run_ours(logits, labels, ids, logprobs, hard_weight=0.5)
    leaf = padded.requires_grad_(True)
    out = sparse_soft_ce(leaf[:, :50], labels, ids, logprobs, hard_weight=0.5, inplace=False)
    torch.testing.assert_close(out.loss, expected.loss)


def test_correct_says_whether_the_label_wins():
    """Catches an arg-max taken after the cells' logits were overwritten."""
    logits, labels, ids, logprobs = make_rows(12, 40, 9, 3)
    out, _ = run_ours(logits, labels, ids, logprobs, hard_weight=0.5, missing="tail")
    assert torch.equal(out.correct, (logits.argmax(1) == labels) & (labels != -100))
    torch.testing.assert_close(out.lse, torch.where(labels != -100, logits.logsumexp(1), 0.0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    n_rows=st.integers(1, 5),
    vocabulary=st.integers(2, 90),
    n_entries=st.integers(0, 20),
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([0.1, 3.0, 12.0]),
)
def test_any_shape(seed, n_rows, vocabulary, n_entries, form, scale):
    """Catches what the fixed shapes do not: cells that are the whole vocabulary, more entries than tokens."""
    rows = make_rows(seed, n_rows, vocabulary, n_entries, scale=scale)
    loss, gradient, size, _, _ = dense_loss(*rows, hard_weight=0.5, **form)
    out, ours = run_ours(*rows, hard_weight=0.5, **form)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert_elementwise(ours, gradient, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "wasserstein"}, "divergence 'wasserstein' is unknown"),
        ({"missing": "drop"}, "missing 'drop' is unknown"),
        ({"divergence": "tvd", "missing": "uniform"}, "use missing 'tail'"),
        ({"divergence": "reverse_kl", "missing": "renormalise"}, "use missing 'tail'"),
        ({"divergence": "jsd", "beta": 1.0}, "needs 0 < beta < 1"),
        ({"divergence": "alpha", "beta": 1.0}, "alpha needs beta"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"hard_weight": 1.5}, "hard_weight is 1.5"),
        ({"hard_weight": torch.ones(3)}, "expected a float or float32[4]"),
        ({"row_weight": torch.ones(3)}, "row_weight is [3]"),
        ({"partition": torch.ones(4)}, "expected bool[4]"),
    ],
)
def test_wrong_options_are_refused_with_the_mend(change, message):
    """Catches an option that is silently ignored."""
    logits, labels, ids, logprobs = make_rows(13, 4, 9, 3)
    with pytest.raises(ConfigError) as error:
        sparse_soft_ce(logits, labels, ids, logprobs, **{"hard_weight": 0.5, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_shapes_are_refused():
    """Catches broadcasting of labels or ids that belong to other rows."""
    logits, labels, ids, logprobs = make_rows(14, 4, 9, 3)
    for wrong in (
        (logits[0], labels, ids, logprobs),
        (logits, labels[:3], ids, logprobs),
        (logits, labels, ids[:3], logprobs),
        (logits, labels, ids, logprobs[:, :2]),
        (logits, labels.float(), ids, logprobs),
    ):
        with pytest.raises(ConfigError):
            sparse_soft_ce(*wrong, hard_weight=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"logprobs": rows["logprobs"].exp()}, "logprobs hold 0."),
        (lambda rows: {"logprobs": rows["logprobs"] * float("nan")}, "logprobs hold nan"),
        (lambda rows: {"ids": rows["ids"].numpy()}, "ids is a ndarray, expected a tensor"),
        (lambda rows: {"ids": rows["ids"].to("meta")}, "labels are on cpu and ids on meta"),
        (
            lambda rows: {key: rows[key].to("meta") for key in ("labels", "ids", "logprobs")},
            "logits are on cpu and labels",
        ),
    ],
)
def test_what_is_no_teacher_is_refused(change, message):
    """Catches probabilities taken for logarithms, a NaN taken for an absent entry, and a device that is not said."""
    rows = dict(zip(("logits", "labels", "ids", "logprobs"), make_rows(16, 4, 9, 3)))
    with pytest.raises(ConfigError) as error:
        sparse_soft_ce(**rows | change(rows), hard_weight=0.5)
    assert message in str(error.value)


def test_indices_outside_the_vocabulary_are_named():
    """Catches a write outside the row, and an error that does not say which row is wrong."""
    logits, labels, ids, logprobs = make_rows(15, 4, 9, 3)
    labels[2], ids[1, 2] = 4, 9
    with pytest.raises(ConfigError, match="id 9 of row 1 lies outside the vocabulary of 9"):
        sparse_soft_ce(logits, labels, ids, logprobs, hard_weight=0.5)
    ids[1, 2] = 8
    for label in (9, -1):
        labels[2] = label
        with pytest.raises(ConfigError, match=f"label {label} of row 2 lies outside the vocabulary of 9"):
            sparse_soft_ce(logits, labels, ids, logprobs, hard_weight=0.5)


def test_an_infinite_or_absent_number_is_not_hidden():
    """Catches a NaN that a maximum skips: the loss must be NaN, not a number without that token."""
    logits, labels, ids, logprobs = make_rows(16, 3, 5000, 3)
    labels[:], ids[:] = 7, 8
    logits[1, :3000] = float("nan")
    out, gradient = run_ours(logits, labels, ids, logprobs, hard_weight=0.5, missing="tail")
    assert out.hard[1].isnan()
    assert out.hard[[0, 2]].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()


def test_who_keeps_the_logits_for_a_backward_hears_that_they_are_gone():
    """Catches a term of one's own on the same logits whose gradient would be of the gradient in their place."""
    logits, *rows = make_rows(21, 4, 30, 3)
    z = logits.requires_grad_(True) * 1
    penalty = z.square().mean()
    loss = sparse_soft_ce(z, *rows, hard_weight=0.5).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_logits_beyond_the_cap_keep_their_gradient():
    """Catches 1 − tanh² for the slope of a softcap, of which nothing is left where tanh rounds to one."""
    rows = make_rows(20, 6, 200, 5, scale=12.0)
    common = {"hard_weight": 0.4, "missing": "tail", "softcap": 2.0}
    _, gradient, size, _, _ = dense_loss(*rows, **common)
    _, ours = run_ours(*rows, **common)
    assert_elementwise(ours, gradient, size)


def test_a_low_temperature_of_rows_whose_logits_rise():
    """Catches a block that is scaled by an earlier one's maximum: at τ = 0.1 ten logits more are an exponent of 100."""
    common = {"hard_weight": 0.4, "missing": "tail", "student_temperature": 0.1}
    loss, gradient, size, _, soft = dense_loss(*rising_rows(), **common)
    out, ours = run_ours(*rising_rows(), **common)
    torch.testing.assert_close(out.loss.double(), loss, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(out.soft.double(), soft, rtol=1e-5, atol=3e-6)
    assert_elementwise(ours, gradient, size / 0.1)


def test_the_default_dtype_does_not_reach_the_loss():
    """Catches λ and the normaliser rounded to bfloat16 in a process that sets it for its model."""
    rows = make_rows(18, 30, 77, 5)
    expected, gradient = run_ours(*rows, hard_weight=0.3)
    upstream = torch.tensor(1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        z = rows[0].clone().requires_grad_(True)
        found = sparse_soft_ce(z * 1, *rows[1:], hard_weight=0.3)
        (ours,) = torch.autograd.grad(found.loss, z, upstream)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, exact in zip((*found, ours), (*expected, gradient)):
        assert value.dtype == exact.dtype
        assert torch.equal(value, exact)
