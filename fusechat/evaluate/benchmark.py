"""What is asked: MT-Bench's questions, AlpacaEval's instructions, or a file of either form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fusechat.artifact import Json
from fusechat.errors import ConfigError, DataError
from fusechat.evaluate.alpaca import load_instructions
from fusechat.evaluate.mtbench import Question, load_questions

MT_BENCH: Final = "mt-bench"
ALPACA: Final = "alpaca"

# FastChat's temperatures by category, and the one it takes for a category it does not know.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0,
    "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
_OTHER_TEMPERATURE = 0.7
_OFFICIAL = {MT_BENCH: 80, ALPACA: 805}
_MAX_TOKENS = {MT_BENCH: 1024, ALPACA: 2048}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Questions in order, the form of the answers file, and how answers are sampled unless asked otherwise.

    `instructions` holds the rows of an AlpacaEval file, whose questions are numbered by their place.
    """

    form: Literal["mt-bench", "alpaca"]
    questions: tuple[Question, ...]
    instructions: tuple[Json, ...] = ()

    @property
    def max_tokens(self) -> int:
        """The most tokens of an answer."""
        return _MAX_TOKENS[self.form]

    def temperature(self, question: Question) -> float:
        """MT-Bench's temperature of the category; instructions are answered greedily."""
        return TEMPERATURES.get(question.category, _OTHER_TEMPERATURE) if self.form == MT_BENCH else 0.0


def load_benchmark(name: str, questions: Path | None) -> Benchmark:
    """Return the benchmark `name`: "mt-bench" or "alpaca" from the user's copy `questions`, or a file of either form.

    Raises ConfigError when the copy is missing, DataError when it is not the whole official benchmark, FormatError.
    """
    if name not in _OFFICIAL:
        if questions is not None:
            raise ConfigError(f"--benchmark {name} is a file itself: leave --questions out")
        return _read(Path(name))
    if questions is None:
        copy = (
            "question.jsonl of FastChat's llm_judge/data/mt_bench"
            if name == MT_BENCH
            else "alpaca_eval.json or any model_outputs.json of alpaca_eval"
        )
        raise ConfigError(f"--benchmark {name} needs --questions: {copy}")
    benchmark = _read(questions)
    if benchmark.form != name:
        raise DataError(f"{questions} has the form of {benchmark.form}, not of {name}")
    if len(benchmark.questions) != _OFFICIAL[name]:
        raise DataError(
            f"{questions} has {len(benchmark.questions)} questions and {name} has {_OFFICIAL[name]}: "
            f"give the whole file, or answer this one with --benchmark {questions}"
        )
    return benchmark


def _read(path: Path) -> Benchmark:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: --benchmark is mt-bench, alpaca or a file of either form")
    if path.suffix == ".jsonl":
        return Benchmark(form=MT_BENCH, questions=tuple(load_questions(path).values()))
    rows = tuple(load_instructions(path))
    questions = tuple(
        Question(id=n, category=str(row.get("dataset", "")), turns=(row["instruction"],)) for n, row in enumerate(rows)
    )
    return Benchmark(form=ALPACA, questions=questions, instructions=rows)
