"""The configuration refuses what it does not know and says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusechat.config import load_config, parse_config, parse_extract, parse_train, source_name
from fusechat.errors import ConfigError

MINIMAL = "pivot: ./p\nsources: [./a, {model: org/b, name: bee}]\ndata: {train: ./x.jsonl}\nout: runs/one\n"


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, MINIMAL))
    assert config.pivot == str(tmp_path / "p")
    assert config.out == str(tmp_path / "runs/one")
    assert config.sources[0].model == str(tmp_path / "a")
    assert config.sources[1].model == "org/b"
    assert [source_name(s) for s in config.sources] == ["a", "bee"]


def test_overrides_change_single_keys_and_keep_their_neighbours(tmp_path: Path) -> None:
    text = MINIMAL + "train: {epochs: 2, batch_size: 8, micro_batch_size: 8}\n"
    config = load_config(_write(tmp_path, text), ["train.epochs=5", "merge.variant=paper"])
    assert (config.train.epochs, config.train.batch_size, config.merge.variant) == (5, 8, "paper")


@pytest.mark.parametrize(
    ("addition", "overrides", "expected"),
    [
        ("trian: {}\n", [], "unknown key `trian`, did you mean `train`?"),
        ("train: {hard_wieght: 1}\n", [], "unknown key `train.hard_wieght`, did you mean `hard_weight`?"),
        ("train: {lora: {rnak: 1}}\n", [], "unknown key `train.lora.rnak`, did you mean `rank`?"),
        ("train: {hard_weight: 2}\n", [], "`train.hard_weight`: Input should be less than or equal to 1, got 2"),
        ("train: {batch_size: 7}\n", [], "batch_size must be a multiple of micro_batch_size"),
        ("", ["train.epochs"], "override `train.epochs` is not of the form key.subkey=value"),
        ("", ["sources=[./a, ./b/a]"], "two sources are named 'a'"),
        ("", ["sources=[{model: ./a, name: sft}]"], "may not be named 'sft'"),
        ("", ["sources=[]"], "at least 1 item"),
        ("train: {objective: uld, z_loss: 0.1}\n", [], "objective uld takes no z_loss"),
        (
            "train: {select: weighted, source_weights: {a: 1, c: 2}}\n",
            [],
            "names c: there are pivot and the sources a, bee",
        ),
        (
            "merge: {method: linear, weights: [1, 2, 3]}\n",
            [],
            "merge.weights has 3 numbers for 2 sources: give one each",
        ),
        ("merge: {method: linear, weights: [1, -1]}\n", [], "weights sum to zero"),
        ("merge: {weights: [1, 2]}\n", [], "weights is not of method: sce: leave it out (default None)"),
        ("merge: {select_topk: 1}\n", ["merge.method=linear"], "select_topk is not of method: linear: leave it out"),
        ("merge: {variant: paper}\n", ["train.mode=multi"], "leave out merge.variant (default fuseai)"),
        ("x: [", [], "is not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, addition: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(_write(tmp_path, MINIMAL + addition), overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_belongs_together_is_taken(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL)
    weighted = ["train.select=weighted", "train.source_weights={pivot: 0, a: 1, bee: 2}"]
    assert load_config(path, weighted).train.source_weights["bee"] == 2
    assert load_config(path, ["merge.method=linear", "merge.weights=[1, 3]"]).merge.weights == [1, 3]
    multi = load_config(path, ["train.mode=multi", "merge.select_topk=0.1"])  # a default written out is no wish
    assert parse_config(multi.model_dump(), "again") == multi


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_training_settings_alone() -> None:
    assert parse_train(["epochs=2", "lora={rank: 4}"]).lora is not None
    with pytest.raises(ConfigError, match="did you mean `epochs`"):
        parse_train(["epoch=2"])


def test_a_source_says_only_what_differs_for_it(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: bee}", "name: bee, extract: {backend: vllm, engine_args: {seed: 1}}}")
    config = load_config(_write(tmp_path, text + "extract: {top_k: 7, engine_args: {block_size: 16}}\n"))
    assert config.sources[0].extract is None
    bee = config.sources[1].extract
    assert bee is not None
    assert (bee.backend, bee.top_k, bee.engine_args) == ("vllm", 7, {"block_size": 16, "seed": 1})
    assert config.extract.backend == "hf"
    assert parse_config(config.model_dump(), "again") == config
    with pytest.raises(ConfigError, match=r"`sources.1.extract.bakcend`, did you mean `backend`"):
        load_config(_write(tmp_path, text.replace("backend", "bakcend")))
    with pytest.raises(ConfigError, match="needs servers"):
        load_config(_write(tmp_path, text.replace("backend: vllm", "backend: vllm-server")))


def test_draws_cannot_be_tempered(tmp_path: Path) -> None:
    sampled = _write(tmp_path, MINIMAL + "extract: {cache: sampled}\n")
    assert load_config(sampled).extract.cache == "sampled"
    with pytest.raises(ConfigError, match="set it to 1"):
        load_config(sampled, ["train.temperature=2"])


def test_extraction_settings_alone() -> None:
    config = parse_extract({"top_k": 4}, ["engine_args.seed=2", "fast_driver=true"])
    assert (config.top_k, config.engine_args, config.fast_driver) == (4, {"seed": 2}, True)
    with pytest.raises(ConfigError, match="did you mean `concurrency`"):
        parse_extract({}, ["concurency=2"])
