"""Recipes by name, as they are after pip install: of runs, of merges, and to copy out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.config import load_config
from fusechat.errors import ConfigError
from fusechat.recipe import FOLDER, recipe_path, recipes
from fusechat.run import run


def test_a_run_by_name_stands_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that looks for its models, or writes, beside the installed package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "derived").mkdir()
    (tmp_path / "derived" / "tinystories_dev.txt").write_text("once")
    config = load_config("recipe:stories", ["seed=3"])
    assert (config.out, config.seed) == (str(tmp_path / "runs" / "stories"), 3)
    assert config.data.train == str(tmp_path / "derived" / "tinystories_dev.txt")
    with pytest.raises(ConfigError, match="did you mean `stories`"):
        run("recipe:storys")
    with pytest.raises(ConfigError, match="no recipe 'merge-sce'"):
        run("recipe:merge-sce")
    assert recipe_path("recipe:merge-sce", merge=True) == FOLDER / "merge-sce.yaml"


def test_all_are_listed_and_any_can_be_copied() -> None:
    """Catches a recipe that only a checkout has."""
    listed = CliRunner().invoke(app, ["recipe"], env={"COLUMNS": "80"}).output
    assert [line.split()[0] for line in listed.splitlines() if line[0] != " "] == list(recipes())
    assert "weighs the targets by the size of their updates." in " ".join(listed.split())  # not its first line alone
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert {"stories", "merge-sce", "accelerate-fsdp2"} <= recipes().keys()
    for name, path in recipes().items():
        printed = CliRunner().invoke(app, ["recipe", name]).output
        assert printed == path.read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(printed), dict)
    refused = CliRunner().invoke(app, ["recipe", "fsdp"])
    assert isinstance(refused.exception, ConfigError)
