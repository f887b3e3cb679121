"""What each way of aligning is worth: held-out bits per byte of targets trained through the project's own stages.

    python bench/quality_align.py --work DIR [--json OUT] [--minutes N]

Three tiny real models, every ordered pair of them; every granularity with the default vocabulary map, every map with
the default granularity, and the paper's preset; three seeds, beside an SFT control of the same data, steps and seed.
Runs whose training data are byte for byte the same are made once. DIR keeps what is done, so that a stopped experiment
goes on; --minutes stops it, with exit code 3, after the first run beyond so many. Prints the tables of
docs/alignment.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.align import align
from fusechat.artifact import sha256_json
from fusechat.bench.align import shared_data
from fusechat.bench.machine import environment
from fusechat.bench.report import parser
from fusechat.config import TrainConfig
from fusechat.dialogue import dataset_fingerprint, read_dialogues, split_held_out
from fusechat.evaluate.bpb import Scores, bits_per_byte, common_dialogues, score_dialogues
from fusechat.extract import extract
from fusechat.records import Dialogue
from fusechat.store import open_aligned, open_topk
from fusechat.train import train
from fusechat.train.dataset import FusionDataset

# Passes over the data: the pivot that has never seen a story needs more of them than those made of stories.
PASSES = {"aidreams231K": 20, "stories260K": 3, "babyllama-tok105": 1}
PAIRS = [
    ("aidreams231K", "babyllama-tok105"),
    ("aidreams231K", "stories260K"),
    ("stories260K", "babyllama-tok105"),
    ("babyllama-tok105", "stories260K"),
    ("stories260K", "aidreams231K"),
    ("babyllama-tok105", "aidreams231K"),
]
SETTINGS: dict[str, dict[str, str]] = {
    "cells, prefix (default)": {},
    "chain": {"granularity": "chain"},
    "gold": {"granularity": "gold"},
    "first": {"granularity": "first"},
    "exact": {"vocab": "exact"},
    "mined": {"vocab": "mined"},
    "ms": {"vocab": "ms"},
    "ms-soft": {"vocab": "ms-soft"},
    "ms-upstream": {"vocab": "ms-upstream"},
    "preset: paper": {"preset": "paper"},
}
DEFAULT, SFT = next(iter(SETTINGS)), "SFT"
SEEDS = (0, 1, 2)
PIECE_BYTES, FUSED, HELD_OUT = 170, 192, 1200  # what the shortest context holds; dialogues are scarce, as they are
OPTIONS: dict[str, Any] = {"max_length_tokens": 256, "dtype": "float32"}


class OutOfTimeError(Exception):
    """The minutes given are over; what was done is kept."""


class Experiment:
    """The data, the stores, and the runs that are done."""

    def __init__(self, data: Path, work: Path, minutes: float) -> None:
        self.data, self.work = data, work
        self.deadline = time.monotonic() + 60 * minutes
        dialogues, _ = read_dialogues(
            data / "derived" / "tinystories_dev.txt",
            format="text",
            separator=["<|endoftext|>", "\n"],  # babyllama-tok105 has no token for a line break
            max_bytes=PIECE_BYTES,
        )
        fused, held_out = split_held_out(dialogues, 1 - FUSED / len(dialogues), seed=0)
        self.fused: list[Dialogue] = fused
        self.held_out: list[Dialogue] = held_out[:HELD_OUT]
        self.log = work / "runs.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.nll = {run["key"]: np.array(run["nll"]) for run in map(json.loads, lines)}

    def model(self, name: str) -> str:
        return str(self.data / "models" / name)

    @cache  # noqa: B019
    def store(self, name: str) -> Path:
        out = self.work / "extract" / name
        extract(self.model(name), self.fused, out, top_k=10, **OPTIONS)
        return out

    @cache  # noqa: B019
    def aligned(self, pivot: str, source: str, setting: str) -> Path:
        out = self.work / "align" / f"{pivot} {source} {setting.replace(':', '')}"
        align(self.store(pivot), self.store(source), out, workers=1, **SETTINGS[setting])
        return out

    def run(self, pivot: str, aligned: Path | None, seed: int) -> np.ndarray[Any, Any]:
        """Return the held-out negative log-likelihoods of a target, trained unless this very training is known."""
        config = TrainConfig(
            hard_weight=0.5, learning_rate=1e-3, epochs=PASSES[pivot], batch_size=8, micro_batch_size=8
        )
        key = sha256_json(
            [pivot, seed, config.model_dump(), dataset_fingerprint(self.held_out), self._taught(pivot, aligned, config)]
        )
        if key not in self.nll:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            out = self.work / "target"
            for left in (out, out.with_name("target.partial")):
                shutil.rmtree(left, ignore_errors=True)
            start = time.process_time()
            train(self.model(pivot), self.store(pivot), aligned, out, config, seed=seed)
            self.nll[key] = score_dialogues(str(out), self.held_out, **OPTIONS).nll
            seconds = time.process_time() - start
            with self.log.open("a") as log:
                log.write(json.dumps({"key": key, "seconds": seconds, "nll": self.nll[key].tolist()}) + "\n")
            print(f"{pivot} ← {aligned.name if aligned else SFT}, seed {seed}: {seconds:.0f} s", file=sys.stderr)
        return self.nll[key]

    def _taught(self, pivot: str, aligned: Path | None, config: TrainConfig) -> str:
        digest = hashlib.sha256()
        rows = open_aligned(aligned) if aligned else None
        weight = config.hard_weight if aligned else 1.0
        dataset = FusionDataset(open_topk(self.store(pivot)), rows, hard_weight=weight)
        for i in range(len(dataset)):
            example, targets = dataset[i], dataset[i].targets
            for part in (targets.ids, targets.logprobs, targets.low, targets.high, targets.partition):
                digest.update(repr((part.dtype, part.shape)).encode() + part.tobytes())
            digest.update(example.hard_weight.tobytes())
        return digest.hexdigest()

    def pair(self, pivot: str, source: str) -> dict[str, Any]:
        """Run one pair under every setting and return its lines of the table."""
        sizes = np.array([sum(len(m.content.encode()) for m in d.messages) for d in self.held_out])
        runs = {SFT: [self.run(pivot, None, seed) for seed in SEEDS]}
        for setting in SETTINGS:
            runs[setting] = [self.run(pivot, self.aligned(pivot, source, setting), seed) for seed in SEEDS]
        scores = {name: Scores(nll=np.mean(nll, axis=0), content_bytes=sizes) for name, nll in runs.items()}
        known = common_dialogues(scores)
        levels, gains = bits_per_byte(scores, known, against=SFT)
        _, over_default = bits_per_byte(scores, known, against=DEFAULT)
        per_bit = np.log(2) * sizes[known].sum()
        manifest = open_aligned(self.aligned(pivot, source, DEFAULT)).manifest
        fusion = FusionDataset(
            open_topk(self.store(pivot)), open_aligned(self.aligned(pivot, source, DEFAULT)), hard_weight=0.5
        )
        return {
            "pivot": pivot,
            "source": source,
            "n_held_out": len(known),
            "steps": PASSES[pivot] * FUSED // 8,
            "rows": manifest["coverage"]["rows"],
            "dialogues_taught_by_source": fusion.source_share,
            "settings": {
                name: {
                    "bits_per_byte": levels[name].value,
                    "difference_to_sft": _bounds(gains[name]),
                    "difference_to_default": _bounds(over_default[name]),
                    "difference_to_sft_by_seed": [
                        float((n - s)[known].sum() / per_bit) for n, s in zip(runs[name], runs[SFT])
                    ],
                }
                for name in runs
            },
        }


def _bounds(interval: Any) -> list[float]:
    return [interval.value, interval.low, interval.high]


def markdown(pairs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the tables, one a pair."""
    for pair in pairs:
        rows = ", ".join(f"{kind} {share:.0%}" for kind, share in pair["rows"].items())
        yield f"**{pair['pivot']} ← {pair['source']}**: {rows}; {pair['dialogues_taught_by_source']:.0%} of the"
        yield f"dialogues taught by the source; {pair['steps']} steps; {pair['n_held_out']:,} pieces held out.\n"
        yield "| | bits per byte | difference to SFT | of the seeds | difference to the default |"
        yield "|---|---|---|---|---|"
        for name, line in pair["settings"].items():
            if name == SFT:
                yield f"| SFT | {line['bits_per_byte']:.3f} | | | |"
                continue
            seeds = [_signed(value) for value in sorted(line["difference_to_sft_by_seed"])]
            to_default = "" if name == DEFAULT else _difference(line["difference_to_default"])
            yield (
                f"| {name} | {line['bits_per_byte']:.3f} | {_difference(line['difference_to_sft'])} "
                f"| {seeds[0]} … {seeds[-1]} | {to_default} |"
            )
        yield ""


def _difference(bounds: Sequence[float]) -> str:
    value, low, high = bounds
    return f"{_signed(value)} ± {(high - low) / 2:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def main() -> int:
    """Run or resume the experiment and report."""
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, required=True, help="what is done is kept here")
    options.add_argument("--minutes", type=float, default=float("inf"), help="stop after the first run beyond so many")
    chosen = options.parse_args()
    data = shared_data()
    if data is None:
        print("not measured: the real models are not here: set FUSECHAT_SHARED_DATA")
        return 0
    torch.set_num_threads(1)
    experiment = Experiment(data, chosen.work, chosen.minutes)
    pairs: list[dict[str, Any]] = []
    with suppress(OutOfTimeError):
        pairs += (experiment.pair(*pair) for pair in PAIRS)
    print("\n".join(markdown(pairs)))
    if chosen.json:
        result = {"environment": environment(), "seeds": SEEDS, "n_fused": FUSED, "pairs": pairs}
        Path(chosen.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(pairs) < len(PAIRS):
        print(f"{len(pairs)} of {len(PAIRS)} pairs are done; the same command goes on")
        return 3
    harmed = [p for p in pairs if p["settings"][DEFAULT]["difference_to_sft"][1] > 0]
    return int(chosen.check and bool(harmed))


if __name__ == "__main__":
    sys.exit(main())
