"""A store of a teacher of your own, whatever gives logits: it aligns and teaches like one of `fusechat extract`.

python docs/examples/own_teacher.py MODEL DIALOGUES OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fusechat.artifact import ShardedWriter
from fusechat.bytetable import ByteTable
from fusechat.dialogue import dataset_fingerprint, load_dialogues
from fusechat.encode import encode_all
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, id_dtype, make_block, row_positions, write_block
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

folder, data, out = map(Path, sys.argv[1:])
dialogues = load_dialogues(data)
tokenizer = load_tokenizer(folder)
teacher = AutoModelForCausalLM.from_pretrained(folder).eval()  # or anything else that gives logits
vocab_size = teacher.config.vocab_size
table = ByteTable.from_tokenizer(tokenizer, vocab_size)
found = encode_all(dialogues, tokenizer, table, template=load_template(tokenizer), max_length_tokens=512)

request = {  # with another value it would be another store
    "format": TOPK_FORMAT,
    "version": TOPK_VERSION,
    "model_sha256": "my teacher of 29 November",
    "tokenizer_sha256": table.sha256,
    "dataset_fingerprint": dataset_fingerprint(dialogues),
    "vocab_size": vocab_size,
}


@torch.inference_mode()
def columns(index, encoded):
    at = row_positions(encoded.loss_mask)  # rows: positions whose next token is the assistant's
    ids = torch.from_numpy(encoded.input_ids).long()
    logprobs = teacher(ids[None]).logits[0, at].float().log_softmax(-1)  # natural, of the full softmax
    best = logprobs.topk(10)
    tokens = {f"token.{name}": getattr(encoded, name) for name in ("input_ids", "loss_mask", "turn", "byte_end")}
    return {"dialogue.index": np.array([index])} | tokens | {
        "row.ids": best.indices.numpy().astype(id_dtype(vocab_size)),
        "row.logprobs": best.values.numpy().astype(np.float16),
        "row.gold_logprob": logprobs.gather(1, ids[at + 1, None])[:, 0].numpy(),
    }  # fmt: skip


block = make_block(map(columns, found.index, found.encoded))
counts = {"n_dialogues": len(block), "n_rows": len(block["row.ids"]), "n_tokens": len(block["token.turn"])}
with ShardedWriter(out, request) as writer:
    if not writer.complete:
        writer.add("shard-00000.safetensors", lambda path: write_block(path, block), **counts)
        writer.finish(model=str(folder.resolve()), template="own", skipped=found.skipped, cut_turns=found.cut_turns)
print(f"{out}: {counts}")
