"""What each way of aligning is worth: held-out bits per byte of targets trained through the project's own stages.

    python bench/quality_align.py --work DIR [--pivots NAME …] [--json OUT] [--minutes N]

Three tiny real models, every ordered pair of them; every granularity with the default vocabulary map, every map with
the default granularity, and the paper's preset; three seeds, beside an SFT control of the same data, steps and seed.
Runs whose aligned rows are byte for byte the same are made once. DIR keeps what is done, so that a stopped experiment
goes on; --minutes stops it, with exit code 3, after the first run beyond so many. Prints the tables of
docs/alignment.md.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.align import align
from fusechat.artifact import sha256_json
from fusechat.bench.align import shared_data
from fusechat.bench.machine import environment
from fusechat.bench.quality_tables import DEFAULT, SETTINGS, SFT, pair_tables
from fusechat.bench.report import parser
from fusechat.dialogue import dataset_fingerprint, read_dialogues, split_held_out
from fusechat.evaluate.bootstrap import compare
from fusechat.evaluate.bpb import Scores, bits_per_byte, common_dialogues, score_dialogues
from fusechat.extract import extract
from fusechat.records import Dialogue
from fusechat.store import open_aligned
from fusechat.train import train
from fusechat.train_config import TrainConfig

# Passes over the data: the pivot that has never seen a story needs more of them than those made of stories.
PASSES = {"aidreams231K": 20, "stories260K": 1, "babyllama-tok105": 1}
HELD_OUT = {"aidreams231K": 1200, "stories260K": 500, "babyllama-tok105": 500}
PAIRS = [
    ("aidreams231K", "babyllama-tok105"),
    ("aidreams231K", "stories260K"),
    ("stories260K", "babyllama-tok105"),
    ("babyllama-tok105", "stories260K"),
    ("stories260K", "aidreams231K"),
    ("babyllama-tok105", "aidreams231K"),
]
SEEDS = (0, 1, 2)
PIECE_BYTES, FUSED = 170, 192  # what the shortest context holds; dialogues are scarce, as they are
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
        self.held_out: list[Dialogue] = held_out
        self.log = work / "runs.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        runs = [json.loads(line) for line in lines]
        self.nll = {run["key"]: np.array(run["nll"]) for run in runs}
        self.share = {run["key"]: run["share"] for run in runs}

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

    def run(self, pivot: str, aligned: Path | None, seed: int) -> tuple[np.ndarray[Any, Any], float]:
        """Return a target's held-out negative log-likelihoods, and the share of dialogues its source taught.

        It is trained unless this very training is known.
        """
        config = TrainConfig(
            hard_weight=0.5, learning_rate=1e-3, epochs=PASSES[pivot], batch_size=8, micro_batch_size=8
        )
        held_out = self.held_out[: HELD_OUT[pivot]]
        changed = config.model_dump(exclude_defaults=True)  # a new key of the configuration leaves what is done known
        key = sha256_json([pivot, seed, changed, dataset_fingerprint(held_out), _taught(aligned)])
        if key not in self.nll:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            out = self.work / "target"
            for left in (out, out.with_name("target.partial")):
                shutil.rmtree(left, ignore_errors=True)
            start = time.process_time()
            provenance = train(self.model(pivot), self.store(pivot), aligned, out, config, seed=seed)
            self.share[key] = provenance["source_share"]
            self.nll[key] = score_dialogues(str(out), held_out, **OPTIONS).nll
            seconds = time.process_time() - start
            with self.log.open("a") as log:
                run = {"key": key, "seconds": seconds, "share": self.share[key], "nll": self.nll[key].tolist()}
                log.write(json.dumps(run) + "\n")
            print(f"{pivot} ← {aligned.name if aligned else SFT}, seed {seed}: {seconds:.0f} s", file=sys.stderr)
        return self.nll[key], self.share[key]

    def pair(self, pivot: str, source: str) -> dict[str, Any]:
        """Run one pair under every setting and return its lines of the table: of the settings there was time for."""
        sizes = np.array([sum(len(m.content.encode()) for m in d.messages) for d in self.held_out[: HELD_OUT[pivot]]])
        runs = {SFT: [self.run(pivot, None, seed) for seed in SEEDS]}
        for setting in SETTINGS:
            try:
                runs[setting] = [self.run(pivot, self.aligned(pivot, source, setting), seed) for seed in SEEDS]
            except OutOfTimeError:
                if setting == DEFAULT:
                    raise
        nll = {name: [found for found, _ in of_seeds] for name, of_seeds in runs.items()}
        scores = {name: Scores(nll=np.mean(found, axis=0), content_bytes=sizes) for name, found in nll.items()}
        known = common_dialogues(scores)
        ratios = {name: bits_per_byte(score).of(known) for name, score in scores.items()}
        to_sft, to_default = compare(ratios, against=SFT), compare(ratios, against=DEFAULT)
        per_bit = np.log(2) * sizes[known].sum()
        manifest = open_aligned(self.aligned(pivot, source, DEFAULT)).manifest
        return {
            "pivot": pivot,
            "source": source,
            "complete": set(SETTINGS) < set(runs),
            "n_held_out": len(known),
            "steps": PASSES[pivot] * FUSED // 8,
            "rows": manifest["coverage"]["rows"],
            "dialogues_taught_by_source": runs[DEFAULT][0][1],
            "settings": {
                name: {
                    "bits_per_byte": to_sft[name].level.value,
                    "difference_to_sft": _bounds(to_sft[name].difference),
                    "difference_to_default": _bounds(to_default[name].difference),
                    "difference_to_sft_by_seed": [
                        float((n - s)[known].sum() / per_bit) for n, s in zip(nll[name], nll[SFT])
                    ],
                }
                for name in runs
            },
        }


def _taught(aligned: Path | None) -> list[str]:
    """Return what tells one training's rows from another's: a cell axis without a row teaches nothing."""
    if aligned is None:
        return []
    store = open_aligned(aligned)
    found = [store.manifest["unaligned"]]
    for shard in map(store.shard, range(store.n_shards)):
        columns = {key: values for key, values in shard.columns.items() if len(values)}
        found += [sha256(key.encode() + columns[key].tobytes()).hexdigest() for key in sorted(columns)]
    return found


def _bounds(interval: Any) -> list[float]:
    return [interval.value, interval.low, interval.high]


def main() -> int:
    """Run or resume the experiment and report."""
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, required=True, help="what is done is kept here")
    options.add_argument("--pivots", nargs="+", choices=list(PASSES), default=list(PASSES), help="their pairs alone")
    options.add_argument("--minutes", type=float, default=float("inf"), help="stop after the first run beyond so many")
    chosen = options.parse_args()
    data = shared_data()
    if data is None:
        print("not measured: the real models are not here: set FUSECHAT_SHARED_DATA")
        return 0
    torch.set_num_threads(1)
    experiment = Experiment(data, chosen.work, chosen.minutes)
    pairs: list[dict[str, Any]] = []
    wanted = [pair for pair in PAIRS if pair[0] in chosen.pivots]
    for pair in wanted:
        with suppress(OutOfTimeError):
            pairs.append(experiment.pair(*pair))
    print("\n".join(pair_tables(pairs)))
    if chosen.json:
        result = {"environment": environment(), "seeds": SEEDS, "n_fused": FUSED, "pairs": pairs}
        Path(chosen.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    done = sum(pair["complete"] for pair in pairs)
    if done < len(wanted):
        print(f"{done} of {len(wanted)} pairs are done; the same command goes on")
        return 3
    harmed = [p for p in pairs if p["settings"][DEFAULT]["difference_to_sft"][1] > 0]
    return int(chosen.check and bool(harmed))


if __name__ == "__main__":
    sys.exit(main())
