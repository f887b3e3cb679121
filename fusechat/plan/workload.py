"""How much there is to read: dialogues and their lengths in each model's tokens, counted on a sample or assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fusechat.config import DataConfig, ExtractConfig, RunConfig
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError
from fusechat.plan.models import shipped
from fusechat.records import Dialogue
from fusechat.split import load_split, read_options
from fusechat.template import OWN, PLAIN

SAMPLE_DIALOGUES = 512
ASSUMED_BYTES_PER_TOKEN = 4.0
ASSUMED_ROW_SHARE = 0.75
ASSUMED_TURNS = 2.0
_ASSUMED_SPREAD = 0.7  # σ of a log-normal: chat data's lengths spread about a factor of two around the median


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """A data set in one model's tokens: a sample of lengths int64[n], the longest first and the others in no order of
    theirs, and the share of rows."""

    n_dialogues: int
    sample: npt.NDArray[np.int64]
    row_share: float
    distinct_ids: int
    """How many different tokens occur."""
    turns_per_dialogue: float = ASSUMED_TURNS
    """How many runs of assistant tokens a dialogue has."""

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.n_dialogues * float(self.sample.mean())

    @property
    def rows(self) -> float:
        """All positions that predict an assistant token."""
        return self.tokens * self.row_share

    @property
    def longest(self) -> int:
        """Tokens of the longest dialogue."""
        return int(self.sample.max())

    @property
    def typical(self) -> float:
        """The length at which a token, rather than a dialogue, finds itself on average."""
        return float((self.sample.astype(float) ** 2).sum() / self.sample.sum())

    def padded_share(self, batch_dialogues: int) -> float:
        """Return padded tokens over tokens in random batches of `batch_dialogues`."""
        rng = np.random.default_rng(0)
        draws = rng.choice(self.sample, (1000, batch_dialogues))
        return float(draws.max(axis=1).sum() * batch_dialogues / draws.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The dialogues of a run: what is fused on, chosen on and held out, and what was assumed about them."""

    train: Sequence[Dialogue] | None
    n_train: int
    n_validation: int
    """What a sweep of merges chooses on."""
    n_held_out: int
    bytes_per_dialogue: float
    assumptions: tuple[str, ...]


def find_workload(config: RunConfig, dialogues: int | None, tokens_per_dialogue: int | None) -> Workload:
    """Return the workload of a run: cut from a local file as the run cuts it, known of a shipped data set, or as given.

    Raises ConfigError when nothing is known of a data set that is no local file and nothing was given.
    """
    data = config.data
    if dialogues is None and Path(data.train).exists():
        split = load_split(config)
        n_bytes = sum(len(m.content.encode()) for d in split.train for m in d.messages)
        return Workload(
            train=split.train,
            n_train=len(split.train),
            n_validation=len(split.validation),
            n_held_out=len(split.held_out),
            bytes_per_dialogue=n_bytes / len(split.train),
            assumptions=(),
        )
    known = shipped("data.json").get(data.train, {})
    count = dialogues or known.get("dialogues")
    if count is None:
        raise ConfigError(f"nothing is known of the data set {data.train}: give --dialogues and --tokens-per-dialogue")
    count = min(count, data.limit or count)
    size = ASSUMED_BYTES_PER_TOKEN * tokens_per_dialogue if tokens_per_dialogue else None
    size = size or (known["text_bytes"] / known["dialogues"] if known else 2400.0)
    assumed = (
        f"{count:,} dialogues of {size / ASSUMED_BYTES_PER_TOKEN:,.0f} tokens on average "
        f"({ASSUMED_BYTES_PER_TOKEN:g} bytes a token), {ASSUMED_ROW_SHARE:.0%} of them the assistant's"
    )
    held_out, of_train, assumed_too = _set_apart(data, "held_out", data.held_out_fraction, count)
    n_train = count - of_train
    validation, more = 0, ""
    if config.merge.sweep:
        validation, of_train, more = _set_apart(data, "validation", data.validation_fraction, n_train)
        n_train -= of_train
    if n_train < 1:
        raise ConfigError(f"of {count} dialogues none is left to fuse on: give more")
    return Workload(
        train=None,
        n_train=n_train,
        n_validation=validation,
        n_held_out=held_out,
        bytes_per_dialogue=size,
        assumptions=tuple(text for text in (assumed, assumed_too, more) if text),
    )


def _set_apart(data: DataConfig, part: str, fraction: float, n_train: int) -> tuple[int, int, str]:
    """Return how many dialogues `data.held_out` or `data.validation` has, how many of them `train` loses, and what was
    assumed."""
    place = getattr(data, part)
    share = max(1, round(fraction * n_train))
    if place is None:
        return share, share, ""
    if Path(place).exists():
        return len(load_dialogues(place, **read_options(data))), 0, ""
    known = shipped("data.json").get(place)
    if known is not None:
        return known["dialogues"], 0, ""
    return share, 0, f"{share:,} dialogues in data.{part}, of which nothing is known: {fraction:.0%} of the others"


def lengths(workload: Workload, model: str, config: ExtractConfig, context_tokens: int) -> tuple[Lengths, str]:
    """Return a data set's lengths in a model's tokens, and how they were found.

    `config` is what the model is extracted with. A local tokenizer and template encode up to 512 dialogues, the longest
    among them; without them the lengths are log-normal about the mean bytes.
    """
    limit = min(config.max_length_tokens, context_tokens)
    if workload.train is None or not (Path(model).is_dir() and _is_here(config.template)):
        # The longest first, the others in a fixed order that says nothing of their size: so many stand for a shard.
        places = np.random.default_rng(0).permutation(999)
        quantiles = (np.append(999, places) + 0.5) / 1000
        shape = np.exp(_ASSUMED_SPREAD * np.array([NormalDist().inv_cdf(q) for q in quantiles]))
        mean = workload.bytes_per_dialogue / ASSUMED_BYTES_PER_TOKEN
        sample = np.clip(shape / shape.mean() * mean, 2, limit).astype(np.int64)
        everything = int(min(1e9, workload.n_train * mean))
        return Lengths(
            n_dialogues=workload.n_train, sample=sample, row_share=ASSUMED_ROW_SHARE, distinct_ids=everything
        ), "assumed"
    encoded = _encode(workload.train, Path(model), config, limit)
    counts = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
    rows = sum(int(mask[1:].sum()) for _, mask in encoded)
    distinct = len(np.unique(np.concatenate([ids for ids, _ in encoded])))
    turns = sum(int(np.diff(mask, prepend=False, append=False).sum()) // 2 for _, mask in encoded)
    return Lengths(
        n_dialogues=workload.n_train,
        sample=counts,
        row_share=rows / int(counts.sum()),
        distinct_ids=distinct,
        turns_per_dialogue=turns / len(encoded),
    ), "counted"


def _is_here(template: str) -> bool:
    """Return whether a template is no model of the hub, whose weights would come with it."""
    return template in (OWN, PLAIN) or template.endswith((".jinja", ".jinja2")) or Path(template).exists()


def _encode(
    dialogues: Sequence[Dialogue], directory: Path, config: ExtractConfig, limit: int
) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    from fusechat.bytetable import ByteTable
    from fusechat.encode import encode_all
    from fusechat.template import load_template
    from fusechat.tokenizer import load_tokenizer

    longest = max(range(len(dialogues)), key=lambda i: sum(len(m.content) for m in dialogues[i].messages))
    others = [dialogue for i, dialogue in enumerate(dialogues) if i != longest]
    step = max(1.0, len(others) / (SAMPLE_DIALOGUES - 1))
    n_others = min(len(others), SAMPLE_DIALOGUES - 1)
    chosen = [dialogues[longest], *(others[int(i * step)] for i in range(n_others))]
    tokenizer = load_tokenizer(directory, trust_remote_code=config.trust_remote_code)
    encoded = encode_all(
        chosen,
        tokenizer,
        ByteTable.from_tokenizer(tokenizer),
        template=load_template(tokenizer, config.template),
        max_length_tokens=limit,
    ).encoded
    return [(e.input_ids, e.loss_mask) for e in encoded]
