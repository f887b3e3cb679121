"""A merged model in vLLM: `make test-vllm` runs this in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from merge_family import recipe

from fusechat.merge import merge

pytestmark = pytest.mark.vllm
PROMPT = [5, 17, 80, 3, 42, 42, 9, 61]
SCRIPT = """
import gc, json, sys
from vllm import LLM, SamplingParams
prompt = json.loads(sys.argv[1])
sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
found = []
for model in sys.argv[2:]:
    llm = LLM(model=model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=32,
              enable_prefix_caching=False, max_num_seqs=1)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    found.append([place[token].logprob for token, place in zip(prompt[1:], output.prompt_logprobs[1:])])
    del llm
    gc.collect()
print("RESULT", json.dumps(found))
"""


def test_merged_models_load_in_vllm(tmp_path: Path) -> None:
    """Catches names, dtypes, ties or shards that vLLM cannot read, or reads as another model than transformers does."""
    pytest.importorskip("vllm", reason="vLLM is not installed: run `make test-vllm`")
    merged = [tmp_path / "tied", tmp_path / "untied"]
    expected = [_merged_logprobs(folder, tied=folder.name == "tied") for folder in merged]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(PROMPT), *(str(folder / "out") for folder in merged)],
        env=os.environ | settings | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for found, wanted in zip(json.loads(done.stdout.partition("RESULT ")[2]), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-4)


def _merged_logprobs(folder: Path, *, tied: bool) -> list[float]:
    """Merge two models to `out` and return what transformers gives as log-probabilities of PROMPT there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    paths = {}
    for i, name in enumerate(("base", "a", "b")):
        torch.manual_seed(i)
        config = LlamaConfig(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        paths[name] = folder / name
    merge(recipe(paths, "sce"), folder / "out", max_shard_bytes=50_000)
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]
