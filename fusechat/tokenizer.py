"""Loading a tokenizer faithfully."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusechat.errors import DataError


def load_tokenizer(directory: Path) -> Any:
    """Load a directory's tokenizer as its tokenizer.json defines it; raises DataError when there is none.

    AutoTokenizer chooses a class by the model's type, and that class rewrites the definition: transformers 5 gives a
    Qwen2 model Qwen2's splitting whatever its file says, and Llama's class drops a leading space. Only directories
    without a tokenizer.json go through it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if (directory / "tokenizer.json").exists() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(directory)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise DataError(f"{directory} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer of {directory} has no fast form (tokenizer.json): convert it with transformers")
    return tokenizer
