"""Extraction: one model's top-k next-token log-probabilities over a dialogue set, as a TopKStore.

One row per position that predicts an assistant token; log-probabilities are of the full softmax at temperature 1, so
that the mass outside the top k stays known. Token ids are stored, never text.

    __init__   extract(): the request, the store, the shards that are missing
    backend    which backend, and where its engines run: hf, vllm, server
    task       one shard: encode, score, check, write
    engines    shards over several engines; child: an engine in a process of its own; on_ray: engines as Ray actors
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusechat.artifact import Json, ShardedWriter, sha256_file, sha256_json
from fusechat.bytetable import ByteTable
from fusechat.callable_module import make_callable
from fusechat.checkpoint import checkpoint_sha256, hub_commit, resolve_model
from fusechat.config import ExtractConfig, parse_extract
from fusechat.dialogue import check_dialogues, dataset_fingerprint
from fusechat.encode import encode_set
from fusechat.errors import ConfigError, DataError
from fusechat.extract.backend import engines_of
from fusechat.extract.engines import run_shards
from fusechat.extract.facts import ModelFacts, model_facts
from fusechat.extract.probe import PROBE_TOKENS
from fusechat.extract.task import Shard, Task
from fusechat.records import Dialogue
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, id_dtype, store_manifest
from fusechat.template import Template, load_template
from fusechat.tokenizer import load_tokenizer

__all__ = ["extract", "left_out"]
make_callable(__name__)

Progress = Callable[[int, int], None]
# Arguments of vLLM that another machine, or a step that ran out of memory, may need to have changed in mid-store. By
# default they depend on the machine's memory anyway.
_MEMORY_AND_LOGGING = {
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "swap_space",
    "cpu_offload_gb", "disable_log_stats",
}  # fmt: skip


def extract(
    model: str | Path,
    dialogues: Sequence[Dialogue],
    out: Path | str,
    config: ExtractConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Json:
    """Write a model's TopKStore and return its manifest; resumes at the first missing shard.

    `options` are keys of `ExtractConfig`, instead of `config`. `template` is `own`, `pivot:PATH`, or the path alone, of
    the tokenizer directory or .jinja file whose template renders the dialogues. `seed` matters to `cache: sampled`.
    `progress(done_tokens, all_tokens)` is called as tokens are scored; the second is an estimate until the end. The
    dialogues are read shard by shard. Raises ConfigError for unknown options, DataError for a model, tokenizer or
    template that does not fit and for NaN in the logits, MismatchError when `out` was made from other inputs,
    FusechatError when another process is writing there.
    """
    if config is None:
        config = parse_extract(options)
    elif options:
        raise ConfigError(f"extract takes a configuration or options, not both: {', '.join(options)}")
    check_dialogues(dialogues)
    model = str(model)
    directory, facts, tokenizer, template = open_inputs(model, config)
    table = ByteTable.from_tokenizer(tokenizer, facts.vocab_size)
    task = Task(
        model=model,
        directory=directory.absolute(),  # workers of a cluster start elsewhere
        out=Path(out).absolute(),
        config=config,
        template=template,
        vocab_size=facts.vocab_size,
        max_length_tokens=facts.max_length_tokens,
        dtype=facts.dtype,
        quantized=facts.quantization is not None,
        probe=_probe(dialogues, tokenizer, table, template, facts) if config.backend == "vllm-server" else (),
        seed=seed,
    )
    request = {
        "format": TOPK_FORMAT,
        "version": TOPK_VERSION,
        "model_sha256": _model_sha256(task),
        "tokenizer_sha256": table.sha256,
        "template_sha256": template.sha256,
        "dataset_fingerprint": dataset_fingerprint(dialogues),
        "n_dialogues": len(dialogues),
        "vocab_size": facts.vocab_size,
        "top_k": config.top_k,
        "max_length_tokens": facts.max_length_tokens,
        "backend": config.backend,
        "dtype": facts.dtype,
        "quantization": facts.quantization,
        "id_dtype": id_dtype(facts.vocab_size).name,
        "logprob_dtype": "float16",
        "shard_dialogues": config.shard_dialogues,
        **_what_rounding_depends_on(config, facts),
        **({"cache": "sampled", "seed": seed} if config.cache == "sampled" else {}),
    }
    with ShardedWriter(task.out, request) as writer:
        if writer.complete or not writer.begin():
            return store_manifest(task.out, TOPK_FORMAT)
        _make_missing(task, dialogues, writer, progress)
        return _finish(task, writer)


def open_inputs(model: str, config: ExtractConfig) -> tuple[Path, ModelFacts, Any, Template]:
    """Return a model's directory, facts, tokenizer and template; raises DataError when they do not fit.

    A model of the hub is downloaded, without its weights where a server has them. Reads no weights.
    """
    directory = resolve_model(model, weights=config.backend != "vllm-server")
    facts = model_facts(directory, config)
    if config.top_k > facts.vocab_size:
        raise DataError(f"top_k {config.top_k} is more than the {facts.vocab_size} tokens of {model}: ask for fewer")
    tokenizer = load_tokenizer(directory, trust_remote_code=config.trust_remote_code)
    return directory, facts, tokenizer, load_template(tokenizer, config.template.removeprefix("pivot:"))


def left_out(manifest: Json) -> str:
    """Say what of the data set a store lacks: dialogues skipped, with the commonest reasons, and dialogues cut."""
    reasons = Counter(manifest["skipped"].values()).most_common(2)
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons)
    skipped = f", {len(manifest['skipped']):,} dialogues skipped ({why})" if reasons else ""
    return skipped + (f", {len(manifest['cut_turns']):,} cut" if manifest["cut_turns"] else "")


def _what_rounding_depends_on(config: ExtractConfig, facts: ModelFacts) -> Json:
    """The settings, beside those every store names, that change what is stored.

    `tensor_parallel_size`, where it is given: where the GPUs decide, the note of every shard has what was chosen, which
    the next shards follow.
    """
    if config.backend == "vllm":
        told = {key: value for key, value in config.engine_args.items() if key not in _MEMORY_AND_LOGGING}
        size = config.tensor_parallel_size or 1
        return ({"engine_args": told} if told else {}) | ({"tensor_parallel_size": size} if size > 1 else {})
    in_batches = config.backend == "hf" and facts.dtype != "float32"
    return {"batch_tokens": config.batch_tokens} if in_batches else {}


def _model_sha256(task: Task) -> str:
    """The weights' fingerprint; where they live elsewhere, that of the configuration and the name they go by there."""
    if task.config.backend != "vllm-server":
        return checkpoint_sha256(task.directory)
    name = task.config.served_model or task.model
    return sha256_json({"served": name, "config": sha256_file(task.directory / "config.json")})


def _probe(
    dialogues: Sequence[Dialogue], tokenizer: Any, table: ByteTable, template: Template, facts: ModelFacts
) -> tuple[int, ...]:
    """The first tokens of the first dialogue that can be encoded; raises DataError when there is none."""
    for shard in _shards(dialogues, 64):
        found = encode_set(
            shard.dialogues, tokenizer, table, template=template, max_length_tokens=facts.max_length_tokens
        )
        if found.encoded:
            return tuple(found.encoded[0].input_ids[:PROBE_TOKENS].tolist())
    raise DataError(f"no dialogue can be encoded with the template {template.name}: look at one of them")


def _shards(dialogues: Sequence[Dialogue], size: int) -> Iterator[Shard]:
    for number, first in enumerate(range(0, len(dialogues), size)):
        yield Shard(number=number, first=first, dialogues=list(dialogues[first : first + size]))


def _make_missing(task: Task, dialogues: Sequence[Dialogue], writer: ShardedWriter, progress: Progress | None) -> None:
    """Make every shard that is not there."""
    tokens = sum(shard["n_tokens"] for shard in writer.done.values())
    seen = sum(shard["n_dialogues"] + len(shard["skipped"]) for shard in writer.done.values())
    seen += sum(len(shard["skipped"]) for shard in writer.empty.values())
    whole_shards_tokens = tokens

    def advance(more: int) -> None:
        nonlocal tokens
        tokens += more
        if progress is not None:
            per_dialogue = whole_shards_tokens / seen if seen else 0.0
            progress(tokens, max(tokens, round(per_dialogue * len(dialogues))))

    def note(shard: Shard, result: Json) -> None:
        nonlocal seen, whole_shards_tokens
        seen += len(shard.dialogues)
        if "file" in result:
            writer.done[result["file"]] = result
            whole_shards_tokens += result["n_tokens"]
        else:
            writer.empty[shard.name] = result
        advance(0)

    shards = _shards(dialogues, task.config.shard_dialogues)
    lacking = (shard for shard in shards if shard.name not in writer.done and shard.name not in writer.empty)
    first = next(lacking, None)
    if first is None:  # no engine need load its model to find nothing to do
        return
    missing = itertools.chain([first], lacking)
    if task.config.ray is not None:
        from fusechat.extract.on_ray import run_on_ray

        run_on_ray(task, missing, note=note, advance=advance)
    else:
        earlier = [shard["engine"] for shard in writer.done.values()]
        run_shards(engines_of(task, earlier), missing, note=note, advance=advance)


def _finish(task: Task, writer: ShardedWriter) -> Json:
    notes = [writer.done[name] for name in sorted(writer.done)]
    skipped: Json = {}
    cut_turns: Json = {}
    engines: list[Json] = []
    for note in [*notes, *writer.empty.values()]:
        skipped |= note.pop("skipped")
        cut_turns |= note.pop("cut_turns")
    for note in notes:
        engine = note.pop("engine")
        if engine not in engines:
            engines.append(engine)
    if not notes:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise DataError(
            f"no dialogue can be encoded for {task.model} with the template {task.template.name}: {reasons}"
        )
    return writer.finish(
        model=str(task.directory.resolve()),
        model_id=task.model,
        revision=hub_commit(task.directory),
        template=task.config.template.removeprefix("pivot:"),
        **({"trust_remote_code": True} if task.config.trust_remote_code else {}),
        engines=engines,
        skipped=dict(sorted(skipped.items(), key=lambda item: int(item[0]))),
        cut_turns=dict(sorted(cut_turns.items(), key=lambda item: int(item[0]))),
    )
