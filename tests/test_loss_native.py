"""What only the compiled loss does: several blocks a row, threads, two-byte floats bit by bit, and its own checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_loss import make_rows

from fusechat.errors import ConfigError
from fusechat.loss import sparse_soft_ce
from fusechat.loss.backend import backend_for
from fusechat.topk import topk_logprob

_native = pytest.importorskip("fusechat._native", reason="the compiled engine is not built")

OPTIONS = [
    {"missing": "tail", "divergence": "jsd"},
    {"missing": "uniform", "label_smoothing": 0.1},
    {"missing": "tail", "student_temperature": 2.0, "softcap": 9.0, "z_loss": 1e-4},
    {"missing": "tail", "student_temperature": 0.1},
]


def run(backend, monkeypatch, rows, dtype=torch.float32, **options):
    monkeypatch.setenv("FUSECHAT_LOSS", backend)
    z = rows[0].to(dtype).clone().requires_grad_(True)
    out = sparse_soft_ce(z * 1, *rows[1:], hard_weight=0.4, row_weight=torch.ones(len(z)), **options)
    out.loss.backward()
    return out, z.grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2047, 2048, 2049, 32001])
def test_rows_of_several_blocks_match_torch(vocabulary, dtype, options, monkeypatch):
    """Catches a block that takes another's maximum, and a remainder read or written beyond the row."""
    rows = make_rows(vocabulary, 5, vocabulary, 10)
    # The maximum rises from block to block, so that earlier blocks' exponentials are relative to another shift.
    rows[0].add_(torch.linspace(-20, 20, vocabulary))
    ours, ours_grad = run("native", monkeypatch, rows, dtype, **options)
    exact, exact_grad = run("torch", monkeypatch, rows, dtype, **options)
    torch.testing.assert_close(ours.loss, exact.loss, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    floor = 6e-8 if dtype == torch.float16 else 1e-9
    torch.testing.assert_close(ours_grad, exact_grad, rtol=tolerance, atol=floor)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64])
def test_threads_do_not_change_a_bit(n_rows, monkeypatch):
    """Catches scratch memory shared between threads or left dirty between rows."""
    rows = make_rows(n_rows, n_rows, 777, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, one_grad = run("native", monkeypatch, rows, missing="tail")
        torch.set_num_threads(3)
        three, three_grad = run("native", monkeypatch, rows, missing="tail")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one_grad, three_grad)
    assert torch.equal(one.soft, three.soft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_byte_floats_round_as_torch_does(dtype, monkeypatch):
    """Catches truncation instead of rounding, and subnormal halves flushed to zero."""
    rows = make_rows(3, 4, 600, 0)
    rows[1][:] = 5
    rows[0].mul_(4.0)
    _, full = run("native", monkeypatch, (rows[0].to(dtype).float(), *rows[1:]))
    _, narrow = run("native", monkeypatch, rows, dtype)
    assert torch.equal(narrow, full.to(dtype))
    assert (full.to(dtype)[full != 0] != 0).sum() > 0


def test_memory_outside_the_rows_stays_untouched(monkeypatch):
    """Catches a vector store over the end of a row: the columns behind it belong to somebody else."""
    monkeypatch.setenv("FUSECHAT_LOSS", "native")
    for vocabulary in (1, 15, 17, 2051):
        logits, labels, ids, logprobs = make_rows(4, 3, vocabulary, 2)
        memory = torch.full((3, vocabulary + 40), 123.0)
        memory[:, 20 : 20 + vocabulary] = logits
        view = memory[:, 20 : 20 + vocabulary].requires_grad_(True)
        sparse_soft_ce(view, labels, ids, logprobs, hard_weight=0.5)
        assert (memory[:, :20] == 123).all()
        assert (memory[:, 20 + vocabulary :] == 123).all()


def test_arrays_of_the_wrong_shape_or_kind_are_refused():
    """Catches memory read through a wrong shape: the engine trusts nothing that Python hands it."""
    good = {
        "logits": np.zeros((3, 8), np.float32), "gradient": None, "format": "float32",
        "labels": np.zeros(3, np.int64), "ids": np.zeros((3, 2), np.int64), "logprobs": np.zeros((3, 2), np.float32),
        "hard_weight": np.ones(3, np.float32), "row_scale": np.ones(3, np.float32), "partition": np.zeros(3, bool),
        "ranges": None, "divergence": "ce", "missing": "tail", "temperature": 1.0, "student_temperature": 1.0,
        "beta": 0.5, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0, "threads": 1,
    }  # fmt: skip
    _native.sparse_soft_ce(**good)
    ranges = [np.arange(8, dtype=np.int32), np.zeros((3, 2), np.int32), np.full((3, 2), 8, np.int32)]
    _native.sparse_soft_ce(**{**good, "ranges": tuple(ranges)})
    wrong = [
        {"labels": np.zeros(2, np.int64)},
        {"labels": np.zeros(3, np.int32)},
        {"ids": np.zeros((2, 2), np.int64)},
        {"logprobs": np.zeros((3, 1), np.float32)},
        {"logits": np.zeros((8, 3), np.float32).T},
        {"logits": np.zeros(8, np.float32)},
        {"gradient": np.zeros((3, 7), np.float32)},
        {"gradient": np.zeros((3, 8), np.float64)},
        {"format": "bfloat16"},
        {"format": "float64"},
        {"divergence": "none"},
        {"missing": "none"},
        {"ranges": (np.arange(7, dtype=np.int32), *ranges[1:])},
        {"ranges": (np.arange(1, 9, dtype=np.int32), *ranges[1:])},
        {"ranges": (ranges[0], ranges[1], np.full((3, 2), 9, np.int32))},
        {"ranges": (ranges[0], np.full((3, 2), -1, np.int32), ranges[2])},
    ]
    for change in wrong:
        with pytest.raises((ValueError, TypeError)):
            _native.sparse_soft_ce(**{**good, **change})


def test_the_backend_is_chosen_and_can_be_forced(monkeypatch):
    """Catches a silent fallback: on the CPU the engine is used unless told otherwise."""
    monkeypatch.delenv("FUSECHAT_LOSS", raising=False)
    assert backend_for(torch.device("cpu")) == "native"
    assert backend_for(torch.device("meta")) == "torch"
    monkeypatch.setenv("FUSECHAT_LOSS", "torch")
    assert backend_for(torch.device("cpu")) == "torch"
    monkeypatch.setenv("FUSECHAT_LOSS", "numpy")
    with pytest.raises(ValueError, match="use native, triton or torch"):
        backend_for(torch.device("cpu"))


@pytest.mark.parametrize(
    "logits", [torch.zeros(3, 8, dtype=torch.float64), torch.zeros(8, 3).t()], ids=["f64", "columns"]
)
def test_a_forced_backend_is_used_or_refused(logits, monkeypatch):
    """Catches a comparison of backends that measures torch's twice."""
    rows = (torch.zeros(3).long(), torch.zeros(3, 2).long(), torch.zeros(3, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for forced in ("native", "triton"):
        monkeypatch.setenv("FUSECHAT_LOSS", forced)
        with pytest.raises(ConfigError, match=f"FUSECHAT_LOSS is {forced}, which takes float32"):
            sparse_soft_ce(logits, *rows, hard_weight=0.5)
    for free in ("", "torch"):
        monkeypatch.setenv("FUSECHAT_LOSS", free)
        assert sparse_soft_ce(logits, *rows, hard_weight=0.5).loss.isfinite()
    monkeypatch.setenv("FUSECHAT_LOSS", "native")
    with pytest.raises(ConfigError, match="runs on the CPU, but the tensors are on cuda:0"):
        backend_for(torch.device("cuda:0"))


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    """Catches a traceback from within Triton."""
    monkeypatch.setenv("FUSECHAT_LOSS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="runs on a GPU, but the tensors are on the CPU"):
        topk_logprob(torch.zeros(3, 8), torch.zeros(20, 8), 2)
    monkeypatch.setattr("fusechat.loss.backend.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton, which is not installed"):
        backend_for(torch.device("cuda:0"))
