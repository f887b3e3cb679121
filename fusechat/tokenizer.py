"""A tokenizer as its own files have it: which they are, and loading it faithfully."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusechat.artifact import read_json
from fusechat.errors import DataError, first_line

_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken",
    "*.jinja", "chat_template.json",
)  # fmt: skip


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files that a model's tokenizer and its chat template are made of."""
    return sorted({path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()})


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a directory's tokenizer as its tokenizer.json defines it; raises DataError when there is none.

    AutoTokenizer chooses a class by the model's type, and that class rewrites the definition: transformers 5 gives a
    Qwen2 model Qwen2's splitting whatever its file says, and Llama's class drops a leading space. Only directories
    without a tokenizer.json go through it, and `trust_remote_code` lets it run Python that lies there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    defined = (directory / "tokenizer.json").exists()
    try:
        if defined:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers package raises bare Exception
        if not defined and not trust_remote_code and _brings_code(directory):
            load = f"t.AutoTokenizer.from_pretrained('{directory}', trust_remote_code=True)"
            raise DataError(
                f"the tokenizer of {directory} is Python of its own without a tokenizer.json: make one where you trust "
                f"that code, with python -c \"import transformers as t; {load}.save_pretrained('{directory}')\""
            ) from error
        raise DataError(f"{directory} has no tokenizer that loads: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer of {directory} has no fast form (tokenizer.json): convert it with transformers")
    return tokenizer


def _brings_code(directory: Path) -> bool:
    file = directory / "tokenizer_config.json"
    return file.exists() and "AutoTokenizer" in (read_json(file).get("auto_map") or {})
