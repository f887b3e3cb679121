"""Random-sampling distillation: draws estimate the whole distribution without bias, the top k do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusechat
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError
from fusechat.extract.sampled import uniforms, weights_of_draws
from fusechat.model import load_model
from fusechat.store import open_topk, row_positions
from fusechat.topk import drawn_logprob

K = 8


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=6))
def test_weights_are_counts(draws: list[list[int]]) -> None:
    ids, logprobs = weights_of_draws(np.array(draws, dtype=np.int64))
    for row, row_ids, row_logprobs in zip(draws, ids, logprobs):
        found = {int(i): float(np.exp(w)) for i, w in zip(row_ids, row_logprobs) if np.isfinite(w)}
        assert found == pytest.approx({token: row.count(token) / 4 for token in set(row)})
        assert (np.diff(row_logprobs[: len(found)]) <= 0).all(), "most frequent first"
        assert (row_ids[len(found) :] == 0).all()


def test_a_draw_is_the_token_whose_share_of_the_unit_interval_it_falls_into() -> None:
    p = torch.tensor([0.5, 0.0, 0.125, 0.375])
    hidden, weight = torch.ones(1, 1), torch.log(p)[:, None]
    uniform = torch.tensor([[0.0, 0.49, 0.51, 0.62, 0.63, 0.999999]], dtype=torch.float64)
    ids, gold = drawn_logprob(hidden, weight, uniform, torch.tensor([2]))
    assert ids.tolist() == [[0, 0, 2, 2, 3, 3]]
    assert gold.item() == pytest.approx(np.log(0.125))


def _dense(ids: Any, logprobs: Any, vocab_size: int) -> Any:
    out = np.zeros((len(ids), vocab_size))
    np.add.at(out, (np.arange(len(ids))[:, None], ids.astype(int)), np.exp(logprobs.astype(np.float64)))
    return out


@pytest.fixture(scope="module")
def estimates(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One dialogue's rows: the exact softmax, the renormalised top k, and stores of many seeds as dense rows."""
    folder = tmp_path_factory.mktemp("sampled")
    one = load_dialogues(tiny_world.dialogues)[:1]
    model = load_model(tiny_world.source)
    dense = {}
    for name, options in (("top-k", {}), *((f"seed {s}", {"cache": "sampled", "seed": s}) for s in range(120))):
        out = folder / name
        fusechat.extract(str(tiny_world.source), one, out, top_k=K, **options)
        store = open_topk(out)
        record = store[0]
        dense[name] = _dense(record["row.ids"], record["row.logprobs"], store.manifest["vocab_size"])
    ids = torch.from_numpy(record["token.input_ids"].astype(np.int64))
    with torch.no_grad():
        exact = torch.softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    rows = row_positions(record["token.loss_mask"])
    gold = exact[rows].gather(1, ids[rows + 1][:, None])[:, 0].log()
    np.testing.assert_allclose(record["row.gold_logprob"], gold, atol=1e-5)
    return {
        "exact": exact[rows].numpy(),
        "top-k": dense["top-k"] / dense["top-k"].sum(1, keepdims=True),
        "draws": np.stack([value for name, value in dense.items() if name != "top-k"]),
    }


def test_draws_are_unbiased_where_the_top_k_are_not(estimates: dict[str, Any]) -> None:
    exact, draws = estimates["exact"], estimates["draws"]
    assert np.allclose(draws.sum(-1), 1, atol=2e-3), "no mass is missing; float16 keeps 11 bits"
    deviation = np.sqrt(exact * (1 - exact) / (K * len(draws)))
    z = (draws.mean(0) - exact) / deviation
    assert abs(z.mean()) < 0.05
    assert 0.9 < z.std() < 1.1, "the spread of a multinomial and nothing beside it"
    # Total variation of what is taught on average: that of the draws shrinks with their number, the top k's stays.
    tvd_draws = 0.5 * np.abs(draws.mean(0) - exact).sum(1)
    tvd_top = 0.5 * np.abs(estimates["top-k"] - exact).sum(1)
    assert tvd_top.mean() > 0.5
    assert tvd_draws.mean() < 0.5 * tvd_top.mean()


def test_the_gradient_of_the_loss_is_unbiased_too(estimates: dict[str, Any]) -> None:
    """∂loss/∂z = q − t, so the loss over the draws, on average, teaches the whole distribution."""
    from fusechat.loss import sparse_soft_ce

    exact, draws = estimates["exact"][:4], estimates["draws"][:, :4]
    n, vocab_size = exact.shape
    torch.manual_seed(0)
    logits = torch.randn(n, vocab_size)

    def gradient(target: Any) -> Any:
        z = logits.clone().requires_grad_()
        ids = torch.from_numpy(np.argsort(-target, axis=1)[:, :vocab_size].copy())
        logprobs = torch.from_numpy(np.log(np.maximum(np.take_along_axis(target, ids.numpy(), 1), 1e-45)))
        output = sparse_soft_ce(z, torch.zeros(n, dtype=torch.int64), ids, logprobs.float(), hard_weight=0.0)
        output.loss.backward()
        assert z.grad is not None
        return z.grad.numpy()

    full = gradient(exact)
    mean = np.mean([gradient(draw) for draw in draws], axis=0)
    deviation = np.sqrt(exact * (1 - exact) / (K * len(draws))) / n
    assert (np.abs(mean - full) < 5.5 * deviation + 1e-5).all()
    assert np.abs(gradient(estimates["top-k"][:4]) - full).max() > 10 * deviation.max()


def test_draws_depend_on_seed_and_dialogue_alone(tiny_world: Any, tmp_path: Path) -> None:
    dialogues = load_dialogues(tiny_world.dialogues)
    options: Any = {"cache": "sampled", "top_k": K}

    def rows(name: str, **more: Any) -> list[bytes]:
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / name, **options, **more)
        store = open_topk(tmp_path / name)
        return [store[i]["row.ids"].tobytes() for i in store]

    one = rows("one", seed=3)
    assert rows("shards", seed=3, shard_dialogues=4, batch_tokens=1) == one
    assert rows("seed", seed=4) != one
    assert not np.array_equal(uniforms(0, 1, 3, K), uniforms(0, 2, 3, K))
    with pytest.raises(ConfigError, match="cache is for backend: hf"):
        fusechat.extract("x", dialogues, tmp_path / "v", cache="sampled", backend="vllm")
