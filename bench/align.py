"""Alignment: warping, byte matching, remapping, maps, and the whole stage from store to store.

    python bench/align.py [--parts rows warp maps stage] [--size small] [--json OUT] [--check]

Real tokenizers and texts are needed: ../shared/data, or the folder FUSECHAT_SHARED_DATA names. Equality with the plain
definitions of bench/align_baselines.py first; figures are CPU-seconds of one thread unless said.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusechat.align import dtw, vocab_map
from fusechat.align.rows import Choices, Matches, RowKind, RowView, match_rows, remap_rows
from fusechat.align.statistics import PairCounts
from fusechat.align.tokenizer import Vocabulary, light_vocabulary
from fusechat.align.vocabulary import stack_maps
from fusechat.artifact import ShardedWriter, write_json
from fusechat.bench.align_baselines import plain_dtw, plain_match, plain_remap
from fusechat.bench.claims import Claim, Work, absent, at_least, at_most
from fusechat.bench.report import parser, report
from fusechat.bench.timing import interleave, peak_rss_mib, rate, ratio
from fusechat.bytetable import token_byte_ends
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, Block, id_dtype, make_block, write_block

PIVOT, SOURCE = "openchat-3.5-exact", "qwen2-instruct"
K = 10
DIALOGUE_TOKENS = 512
PARTS = ("rows", "warp", "maps", "stage")


def shared_data() -> Path | None:
    """Return the folder of real data, or None."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FUSECHAT_SHARED_DATA", default))
    return folder if (folder / "manifest.jsonl").exists() else None


def texts(data: Path) -> list[str]:
    """Return English, Chinese and code in pieces of about DIALOGUE_TOKENS tokens."""
    course = data / "text" / "parallel_hf_course"
    pages = [p.read_text(encoding="utf-8") for lang in ("en", "zh-CN") for p in sorted((course / lang).rglob("*.mdx"))]
    pages += [p.read_text(encoding="utf-8") for p in sorted(Path(__file__).resolve().parents[1].rglob("csrc/**/*.cpp"))]
    whole = "\n".join(pages)
    size = 4 * DIALOGUE_TOKENS
    return [whole[i : i + size] for i in range(0, len(whole) - size, size)]


def encode(vocabulary: Vocabulary, pieces: list[str]) -> list[list[int]]:
    """Tokenize as the continuation of a text."""
    return vocabulary.continuation_encoder()(pieces)


def block(vocabulary: Vocabulary, pieces: list[str], copies: int) -> Block:
    """Return the columns of a TopKStore over `pieces`, `copies` times: the gold token and nine frequent ones a row."""
    rng = np.random.default_rng(0)
    encoded = encode(vocabulary, pieces)
    corpus = np.concatenate([np.array(ids, np.int32) for ids in encoded])
    records = []
    for number, (text, ids) in enumerate(zip(pieces, encoded)):
        ends = token_byte_ends(vocabulary.table, ids, text.encode())
        n = len(ids)
        top = rng.choice(corpus, (n, K))
        top[:, 0] = ids
        p = np.sort(rng.dirichlet(np.full(K + 1, 0.3), n)[:, :K])[:, ::-1] + 1e-6
        records.append(
            {
                "dialogue.index": np.array([number]),
                "token.input_ids": np.array([0, *ids], np.int32),
                "token.loss_mask": np.array([False] + [True] * n),
                "token.turn": np.array([-1] + [0] * n, np.int32),
                "token.byte_end": np.array([-1, *ends.tolist()], np.int32),
                "row.ids": top.astype(id_dtype(len(vocabulary.table))),
                "row.logprobs": np.log(p / np.maximum(p.sum(1, keepdims=True), 1)).astype(np.float16),
                "row.gold_logprob": np.log(p[:, 0]).astype(np.float32),
            }
        )
    numbered = [
        record | {"dialogue.index": np.array([copy * len(records) + i])}
        for copy in range(copies)
        for i, record in enumerate(records)
    ]
    return make_block(numbered)


def warp_claims(data: Path, vocabularies: tuple[Vocabulary, Vocabulary], rounds: int, quick: bool) -> list[Claim]:
    """Warping of one pair, and of a corpus."""
    pivot, source = vocabularies
    strings = [v.strings() for v in vocabularies]
    marks = {"source_mark": source.mark, "pivot_mark": pivot.mark}
    whole = "\n".join(p.read_text() for p in sorted((data / "text/parallel_hf_course/en/chapter1").glob("*.mdx")))
    ids = encode(pivot, [whole])[0]
    claims = []
    for n_tokens, to_reach in ((512, 700.0), (2048, 1200.0)):
        if quick and n_tokens > 512:
            continue
        head = pivot.table.concatenate(np.array(ids[:n_tokens])).decode("utf-8", "ignore")
        sides = [[strings[0][i] for i in ids[:n_tokens]], [strings[1][i] for i in encode(source, [head])[0]]]
        got = dtw(sides[1], sides[0], **marks)
        assert (got.cost, [tuple(step) for step in got.path.tolist()]) == plain_dtw(sides[1], sides[0], **marks)
        seconds = interleave(
            {
                "plain": lambda s=sides: plain_dtw(s[1], s[0], **marks),
                "ours": lambda s=sides: [dtw(s[1], s[0], **marks) for _ in range(10)],
            },
            rounds,
        )
        gain = ratio(seconds, "plain", "ours", times=10)
        ms = seconds["ours"].median_s() * 100
        note = f"{len(sides[1])} × {len(sides[0])} tokens, {ms:.2f} ms"
        claims.append(at_least(f"dtw, one pair, {n_tokens} tokens", "plain Python", gain, to_reach, note=note))
    pieces = texts(data)[:200]
    ids = [[piece[:DIALOGUE_TOKENS] for piece in encode(v, pieces)] for v in (source, pivot)]
    pairs = [([strings[1][i] for i in s], [strings[0][i] for i in p]) for s, p in zip(*ids)]
    tokens = sum(len(p) for _, p in pairs)
    seconds = interleave({"ours": lambda: [dtw(s, p, **marks) for s, p in pairs]}, rounds)
    speed = rate(seconds["ours"], tokens / 1e6)
    name = f"dtw, corpus, {tokens // len(pairs)} tokens a dialogue"
    cells = sum(len(s) * len(p) for s, p in pairs) / seconds["ours"].median_s() / 1e9
    claims.append(at_least(name, "absolute", speed, 1.0, "M tokens/s", note=f"{cells:.2f} G cells/s"))
    return claims


def row_claims(vocabularies: tuple[Vocabulary, Vocabulary], pieces: list[str], rounds: int) -> list[Claim]:
    """Matching and remapping in memory."""
    pivot, source = (RowView.of(block(v, pieces, 4), v.table) for v in vocabularies)
    n_tokens = len(pivot.block["token.input_ids"])
    partner = np.arange(len(pivot.block))
    matches = match_rows(pivot, source, partner)
    offsets = pivot.block.offsets["row"], source.block.offsets["row"]
    for d in range(8):
        sides = [view.starts[o[d] : o[d + 1]].tolist() for view, o in zip((pivot, source), offsets)]
        found = matches.source_row[offsets[0][d] : offsets[0][d + 1]]
        assert np.where(found >= 0, found - offsets[1][d], -1).tolist() == plain_match(*sides)
    seconds = interleave({"ours": lambda: match_rows(pivot, source, partner)}, rounds)
    speed = rate(seconds["ours"], n_tokens / 1e6)
    work = Work.of(seconds["ours"], 26 * n_tokens)
    note = "bound by instructions, not by memory"
    claims = [at_least("bytes, matching alone", "absolute", speed, 20, "M tokens/s", note=note, work=work)]

    maps = stack_maps([vocab_map(source.table, pivot.table, "prefix")])
    target = maps.target[0, :, 0]
    n = len(source.gold)
    same = Matches(
        kind=np.full(n, RowKind.FINER, np.uint8),
        source_row=np.arange(n),
        chain=np.ones(n, np.int32),
        rest_bytes=np.zeros(n, np.int32),
    )
    # Every source row through the map as it stands; the pivot's side only lends its vocabulary.
    rows = RowView(
        block=source.block, table=pivot.table, control=source.control, gold=np.zeros(n, np.int32), turn=source.turn,
        starts=source.starts, ends=source.ends, at_end=np.zeros(n, np.bool_),
    )  # fmt: skip
    first = Choices(granularity="first")

    def remap() -> object:
        return remap_rows(same, rows, source, np.zeros(n, np.int16), maps, first)

    got = remap_rows(same, rows, source, np.zeros(n, np.int16), maps, first)
    ids, logprobs = source.block["row.ids"], source.block["row.logprobs"]
    collided = 0
    for r, row in enumerate(plain_remap(ids[:2000], logprobs[:2000], target)):
        present = ~np.isneginf(got.logprobs[r])
        assert set(got.ids[r][present].tolist()) == set(row)
        want = np.array([row[i] for i in got.ids[r][present].tolist()])
        assert np.allclose(np.exp(got.logprobs[r][present].astype(float)), np.minimum(want, 1), rtol=1e-2)
        collided += len(row) < K
    seconds = interleave({"ours": remap}, rounds)
    speed, work = rate(seconds["ours"], n / 1e6), Work.of(seconds["ours"], 104 * n)
    note = f"{collided / 20:.0f} % of rows collide"
    claims.append(at_least(f"remap of top-{K} rows", "absolute", speed, 10, "M rows/s", note=note, work=work))
    seconds = interleave(
        {
            f"{threads}": lambda threads=threads: (
                match_rows(pivot, source, partner, threads),
                remap_rows(same, rows, source, np.zeros(n, np.int16), maps, first, threads),
            )
            for threads in (1, 2)
        },
        2 * rounds,
    )
    gain = min(seconds["1"].wall_s) / min(seconds["2"].wall_s)
    claims.append(at_least("two threads, wall clock, best round", "one thread", gain, 1.7))
    return claims


def map_claims(vocabularies: tuple[Vocabulary, Vocabulary], pieces: list[str], quick: bool) -> list[Claim]:
    """Vocabulary maps of a 152k × 32k pair."""
    pivot, source = vocabularies
    views = [RowView.of(block(v, pieces, 1), v.table) for v in vocabularies]
    matches = match_rows(views[0], views[1], np.arange(len(pieces)))
    rows = np.flatnonzero(matches.source_row >= 0)
    counts = PairCounts.of(
        views[1].gold[matches.source_row[rows]].astype(np.int64), views[0].gold[rows].astype(np.int64)
    )
    spellings = {"source_spelling": source.spelling(), "pivot_spelling": pivot.spelling()}
    claims = []
    for method in ("ms", "ms-soft", "ms-upstream"):
        options = spellings if method == "ms-upstream" else {}
        start = time.process_time()
        vocab_map(source.table, pivot.table, method, counts=counts, **options)
        note = f"{len(counts.count):,} pairs"
        claims.append(at_most(f"map {method}", "absolute", time.process_time() - start, 2, "CPU-seconds", note=note))
    if not quick:
        start = time.process_time()
        vocab_map(source.table, pivot.table, "mined")
        claims.append(at_most("map mined, 152k × 32k", "absolute", time.process_time() - start, 90, "CPU-seconds"))
    return claims


def write_stores(data: Path, folder: Path, copies: int) -> int:
    """Write a pivot and a source store of the texts, `copies` times; return the pivot's tokens."""
    n_tokens = 0
    for side, name in (("pivot", PIVOT), ("source", SOURCE)):
        vocabulary = light_vocabulary(data / "tokenizers" / name)
        # As hub repositories have it; the folder of some real tokenizers here lacks the file.
        model = folder / f"{side}-model"
        model.mkdir()
        (model / "tokenizer.json").write_text(vocabulary.definition, encoding="utf-8")
        names = {"bos_token": vocabulary.bos_token, "eos_token": vocabulary.eos_token}
        write_json(model / "tokenizer_config.json", names)
        request = {"format": TOPK_FORMAT, "version": TOPK_VERSION, "dataset_fingerprint": "bench", "top_k": K}
        request |= {"tokenizer_sha256": vocabulary.table.sha256, "vocab_size": len(vocabulary.table)}
        writer = ShardedWriter(folder / side, request)
        shard = block(vocabulary, texts(data), 1)
        for number in range(copies):
            columns = dict(shard.columns) | {"dialogue.index": shard["dialogue.index"] + number * len(shard)}
            numbered = Block(columns=columns, offsets=shard.offsets)
            writer.add(
                f"shard-{number:05d}.safetensors",
                lambda path, numbered=numbered: write_block(path, numbered),
                n_dialogues=len(shard),
                n_rows=len(shard["row.ids"]),
            )
        writer.finish(model=str(model))
        n_tokens += copies * len(shard["token.input_ids"]) if side == "pivot" else 0
    return n_tokens


def stage_claims(data: Path, copies: int) -> list[Claim]:
    """The stage from store to store, in processes of its own for the memory, at two sizes for the fixed cost."""
    seconds, peaks, sizes = [], [], []
    for n in (copies // 4, copies):
        with tempfile.TemporaryDirectory() as folder:
            sizes.append(write_stores(data, Path(folder), n))
            command = [sys.executable, "-m", "fusechat.bench.align", "--stage", folder]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds.append(float(out[0]))
            peaks.append(float(out[1]))
    slope = (sizes[1] - sizes[0]) / (seconds[1] - seconds[0]) / 1e6
    fixed = seconds[0] - sizes[0] / slope / 1e6
    note = f"beyond a fixed {fixed:.1f} s for vocabularies and maps"
    name = "align, bytes + ms, store to store"
    growth = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) * 1e6
    return [
        at_least(name, "absolute", slope, 1.0, "M tokens/s", note=note),
        at_most(
            f"{name}, peak memory", "absolute", peaks[1], 500, "MiB", note=f"+{growth:.0f} MiB per further M tokens"
        ),
    ]


def run_stage(folder: Path) -> None:
    """Align the stores in `folder` on one thread; print CPU-seconds and peak MiB."""
    from fusechat.align import align

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.process_time()
    align(folder / "pivot", folder / "source", folder / "out", vocab="ms", workers=1)
    print(time.process_time() - start, peak_rss_mib())


def main() -> int:
    """Measure everything and report."""
    options = parser(__doc__ or "")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these alone")
    options.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.stage:
        run_stage(chosen.stage)
        return 0
    data = shared_data()
    if data is None:
        return report(
            "align", [absent("alignment", "", "", "no real tokenizers here: set FUSECHAT_SHARED_DATA")], chosen
        )
    quick = chosen.size == "small"
    rounds = 3 if quick else 7
    vocabularies = light_vocabulary(data / "tokenizers" / PIVOT), light_vocabulary(data / "tokenizers" / SOURCE)
    pieces = list(itertools.islice(texts(data), 200))
    measure: dict[str, Callable[[], list[Claim]]] = {
        "rows": lambda: row_claims(vocabularies, pieces, rounds),
        "warp": lambda: warp_claims(data, vocabularies, rounds, quick),
        "maps": lambda: map_claims(vocabularies, pieces, quick),
        "stage": lambda: stage_claims(data, 16 if quick else 40),
    }
    claims = [claim for part in PARTS if part in chosen.parts for claim in measure[part]()]
    return report("align", claims, chosen)


if __name__ == "__main__":
    sys.exit(main())
