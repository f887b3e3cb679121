"""How much of one tokenization another can serve: rows by kind, by pair and language, beside the paper's preset.

    python bench/align_coverage.py

Prints the tables of docs/alignment.md. Real tokenizers and texts are needed: ../shared/data, or the folder that
FUSECHAT_SHARED_DATA names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from align import shared_data

from fusechat.align import dtw
from fusechat.align.paper import branches
from fusechat.align.rows import RowKind, RowView, match_rows
from fusechat.align.tokenizer import Vocabulary, light_vocabulary
from fusechat.bytetable import token_byte_ends
from fusechat.errors import DataError
from fusechat.store import make_block

PAIRS = [
    ("openchat-3.5-exact", "qwen2-instruct"),
    ("openchat-3.5-exact", "internlm2-chat"),
    ("openchat-3.5-exact", "llama-2-exact"),
    ("openchat-3.5-exact", "nous-hermes-2-solar-exact"),
    ("openchat-3.5-exact", "gpt2"),
    ("openchat-3.5-exact", "llama-3"),
    ("llama-3", "qwen2-instruct"),
]
LANGUAGES = ("en", "zh-CN", "ru", "hi", "code")
PIECE_CHARACTERS, PIECES = 1500, 12


def pieces(data: Path, language: str) -> list[str]:
    """Return some pieces of a language's text."""
    if language == "code":
        files = sorted(Path(__file__).resolve().parents[1].glob("csrc/align/*.cpp"))
    else:
        files = sorted((data / "text" / "parallel_hf_course" / language).rglob("*.mdx"))
    whole = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return [whole[i * PIECE_CHARACTERS : (i + 1) * PIECE_CHARACTERS] for i in range(PIECES)]


def view(vocabulary: Vocabulary, tokenizer_ids: list[int], text: bytes) -> RowView:
    """Return the rows of one plain text behind a BOS that sees nothing."""
    ends = token_byte_ends(vocabulary.table, tokenizer_ids, text)
    n = len(tokenizer_ids)
    record = {
        "dialogue.index": np.array([0]),
        "token.input_ids": np.array([0, *tokenizer_ids], np.int32),
        "token.loss_mask": np.array([False] + [True] * n),
        "token.turn": np.array([-1] + [0] * n, np.int32),
        "token.byte_end": np.array([-1, *ends.tolist()], np.int32),
        "row.ids": np.zeros((n, 1), np.int32),
    }
    return RowView.of(make_block([record]), vocabulary.table)


def measure(pivot: Vocabulary, source: Vocabulary, texts: list[str]) -> list[float] | None:
    """Return the shares of rows same, coarser, finer, none; those the paper serves; and those it serves wrongly.

    None where a tokenizer does not spell the text.
    """
    kinds = np.zeros(len(RowKind))
    served = wrong = rows = 0
    strings = [v.strings() for v in (pivot, source)]
    encoders = [v.continuation_encoder() for v in (pivot, source)]
    for text in texts:
        ids = [encode([text])[0] for encode in encoders]
        try:
            sides = [view(v, i, text.encode()) for v, i in zip((pivot, source), ids)]
        except DataError:
            return None
        kinds += np.bincount(match_rows(sides[0], sides[1], np.array([0])).kind, minlength=len(RowKind))
        tokens = [[names[i] for i in side] for names, side in zip(strings, ids)]
        marks = {"source_mark": source.mark, "pivot_mark": pivot.mark}
        partners = dtw(tokens[1], tokens[0], **marks).pivot_to_source
        chosen = branches(partners, tokens[1], tokens[0], **marks)
        used = chosen >= 0
        # A row speaks of what follows its token: both tokens must end at the same byte.
        wrong += int((sides[0].ends[used] != sides[1].ends[chosen[used]]).sum())
        served += int(used.sum())
        rows += len(chosen)
    return [*(kinds / kinds.sum()).tolist(), served / rows, wrong / rows]


def picture(pivot: Vocabulary, source: Vocabulary, text: str) -> str:
    """Draw where the tokens of two tokenizations of one line begin, and the kind of each of the pivot's rows."""
    sides = [view(v, v.continuation_encoder()([text])[0], text.encode()) for v in (pivot, source)]
    lines = [[" "] * len(text) for _ in range(3)]
    for line, side in zip(lines, reversed(sides)):
        for start in side.starts.tolist():
            line[start] = "|"
    for start, kind in zip(sides[0].starts.tolist(), match_rows(*sides, np.array([0])).kind.tolist()):
        lines[2][start] = "=<>."[kind]
    names = ("text", "source", "pivot", "row")
    return "\n".join(f"{name:<8}{''.join(line)}".rstrip() for name, line in zip(names, [list(text), *lines]))


def main() -> int:
    """Print the tables."""
    data = shared_data()
    if data is None:
        print("real tokenizers are not here: set FUSECHAT_SHARED_DATA")
        return 1
    loaded = {n: light_vocabulary(data / "tokenizers" / n) for n in sorted({n for pair in PAIRS for n in pair})}
    print("| pivot ← source | text | same | coarser | finer | none | paper serves | … at another prefix |")
    print("|---|---|---|---|---|---|---|---|")
    for pivot, source in PAIRS:
        for language in LANGUAGES:
            shares = measure(loaded[pivot], loaded[source], pieces(data, language))
            cells = " | ".join("–" if shares is None else f"{share:.1%}" for share in shares or [None] * 6)
            print(f"| {pivot} ← {source} | {language} | {cells} |", flush=True)
    text = "Tokenizers disagree: internationalization, 1234567 and unbelievably."
    print("\n" + picture(loaded["openchat-3.5-exact"], loaded["qwen2-instruct"], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
