"""MT-Bench's files and ratings; the real judgments where the real data is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.errors import DataError, FormatError
from fusechat.evaluate.journal import read_rows
from fusechat.evaluate.mtbench import (
    Question,
    check_answers,
    check_references,
    judge_messages,
    load_answers,
    load_prompts,
    load_questions,
    parse_rating,
)
from fusechat.evaluate.ratings import ratings_table

QUESTIONS = {q: Question(id=q, category="math" if q % 2 else "writing", turns=("a?", "b?")) for q in range(6)}


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Rating: [[7]]", 7),
        ("[[8.5]] is my rating, not [[3]]", 8.5),
        ("see [1], so [[9]]", 9),
        ("The rating is [6].", 6),
        ("[[10.]]", 10),
        ("[[05]]", 5),
        ("Rating: [[11]]", 11),
        ("[[-3]]", -1),
        ("[[rating]]", -1),
        ("Rating: 7/10", -1),
        ("[[ 7 ]]", -1),
        ("", -1),
    ],
)
def test_a_rating_is_the_first_number_in_double_brackets_else_in_single_ones(judgment: str, rating: float) -> None:
    assert parse_rating(judgment) == rating


@given(st.text(alphabet="[]0123456789. a", max_size=30))
def test_parsing_never_fails_and_never_invents(text: str) -> None:
    rating = parse_rating(text)
    assert rating == -1 or (rating >= 0 and "[" in text)


def test_real_judgments_are_parsed_with_the_scores_they_were_given(shared_data: Path) -> None:
    rows = read_rows(shared_data / "chat/instructlab_mt_bench/model_judgment/gpt-4_single.jsonl")
    assert len(rows) == 160
    assert [parse_rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]


def test_prompts_are_those_the_real_judgments_were_made_with(shared_data: Path) -> None:
    chat = shared_data / "chat"
    questions = load_questions(chat / "fastchat/mt_bench/question.jsonl")
    prompts = load_prompts(chat / "fastchat/judge_prompts.jsonl")
    references = load_answers(chat / "fastchat/mt_bench/reference_answer/gpt-4.jsonl")
    answers = load_answers(chat / "instructlab_mt_bench/model_answer/instructlab/granite-7b-lab.jsonl")
    check_answers("granite", answers, questions)
    check_references(chat, references, questions)
    for row in read_rows(chat / "instructlab_mt_bench/model_judgment/gpt-4_single.jsonl"):
        q = row["question_id"]
        name, messages = judge_messages(prompts, questions[q], answers[q], references.get(q), row["turn"])
        assert (name, messages[1]["content"]) == (row["judge"][1], row["user_prompt"])


def test_real_answer_files_are_read_and_are_complete(shared_data: Path) -> None:
    questions = load_questions(shared_data / "chat/fastchat/mt_bench/question.jsonl")
    files = sorted((shared_data / "chat/fastchat/mt_bench/model_answer").glob("*.jsonl"))
    assert len(files) == 6
    for file in files:
        check_answers(file.name, load_answers(file), questions)


def test_the_command_counts_what_the_real_judge_did_not_rate(shared_data: Path, tmp_path: Path) -> None:
    chat = shared_data / "chat"
    judgments = chat / "instructlab_mt_bench/model_judgment/gpt-4_single.jsonl"
    questions = ["--questions", str(chat / "fastchat/mt_bench/question.jsonl")]
    done = CliRunner().invoke(
        app, ["eval", "ratings", str(judgments), *questions, "--json", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    counts = json.loads((tmp_path / "out.json").read_text())["models"]["granite-7b-lab"]
    stated = [row["score"] for row in read_rows(judgments) if row["score"] != -1]
    assert (counts["judgments"], counts["unparsable"], counts["off_scale"], counts["rated"]) == (160, 120, 2, 38)
    assert counts["fastchat_mean"] == pytest.approx(np.mean(stated))
    assert "without a rating" in done.output


def test_answers_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    answers = {q: ["x", "y"] for q in QUESTIONS}
    with pytest.raises(DataError, match="answers none of the 6 questions: is it of another benchmark"):
        check_answers("a.jsonl", {100 + q: ["x", "y"] for q in QUESTIONS}, QUESTIONS)
    with pytest.raises(DataError, match="answers question 99, no question of this benchmark"):
        check_answers("a.jsonl", answers | {99: ["x"]}, QUESTIONS)
    with pytest.raises(DataError, match="lacks answers to questions 4, 5"):
        check_answers("a.jsonl", {q: answers[q] for q in range(4)}, QUESTIONS)
    with pytest.raises(DataError, match="answers 1 of 2 turns of question 3"):
        check_answers("a.jsonl", answers | {3: ["x"]}, QUESTIONS)
    (tmp_path / "outputs.json").write_text('[{"instruction": "x", "output": "y"}]')
    with pytest.raises(FormatError, match="line 1 is list, expected a JSON object"):
        load_answers(tmp_path / "outputs.json")
    (tmp_path / "outputs.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    with pytest.raises(FormatError, match="no answers of FastChat's form"):
        load_answers(tmp_path / "outputs.jsonl")


def test_missing_references_are_named() -> None:
    with pytest.raises(DataError, match="lacks the reference answers to questions 3, 5 "):
        check_references(Path("r.jsonl"), {1: ["x", "y"], 3: ["x"]}, QUESTIONS)


def test_files_that_are_no_questions_or_prompts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"question_id": 1, "turns": "no list"}\n')
    with pytest.raises(FormatError, match="lacks question_id or turns"):
        load_questions(file)
    file.write_text('{"question_id": 1, "turns": ["a"]}\n' * 2)
    with pytest.raises(FormatError, match="question 1 twice"):
        load_questions(file)
    with pytest.raises(FormatError, match="lacks the prompts single-math-v1, single-math-v1-multi-turn"):
        load_prompts(file)
    with pytest.raises(FormatError, match="does not exist"):
        load_prompts(tmp_path / "absent.jsonl")


def _row(model: str, q: int, turn: int, score: float) -> dict[str, object]:
    return {"model": model, "question_id": q, "turn": turn, "score": score, "judge": ["j", "single-v1"]}


def test_means_are_over_ratings_and_what_is_none_is_counted() -> None:
    rows = [_row("a", q, turn, 4 + turn) for q in QUESTIONS for turn in (1, 2)]
    rows[0]["score"], rows[1]["score"] = -1, 12
    rows += [_row("a", 5, 1, 9)]  # judged again
    table = ratings_table(rows, QUESTIONS, samples=200)
    counts = table["models"]["a"]
    assert (counts["judgments"], counts["unparsable"], counts["off_scale"], counts["rated"]) == (13, 1, 1, 11)
    rated = [5.0] * 5 + [6.0] * 5 + [9.0]
    assert table["groups"]["overall"]["models"]["a"]["rating"][0] == pytest.approx(np.mean(rated))
    assert table["groups"]["turn 1"]["models"]["a"]["rating"][0] == pytest.approx((5 * 5 + 9) / 6)
    assert table["groups"]["math"]["models"]["a"]["rating"][0] == pytest.approx((5 * 3 + 6 * 3 + 9) / 7)
    assert counts["if_unrated"] == pytest.approx([(sum(rated) + 2) / 13, (sum(rated) + 20) / 13])
    assert counts["judge_sd"] == pytest.approx(np.std([5, 9], ddof=1))
    assert counts["fastchat_mean"] == pytest.approx((sum(rated) + 12) / 12)


def test_differences_between_models_are_paired_by_question() -> None:
    rng = np.random.default_rng(0)
    questions = {q: Question(id=q, category="", turns=("a", "b")) for q in range(60)}
    base = {q: int(rng.integers(2, 9)) for q in questions}
    rows = [_row("base", q, t, base[q]) for q in questions for t in (1, 2)]
    rows += [_row("better", q, t, base[q] + (t == 2)) for q in questions for t in (1, 2)]
    table = ratings_table(rows, questions, samples=300)
    better = table["groups"]["overall"]["models"]["better"]
    assert better["difference_to_base"] == pytest.approx([0.5, 0.5, 0.5])
    assert better["p_holm"] < 0.01
    assert table["groups"]["turn 1"]["models"]["better"]["p_holm"] == 1


def test_judgments_of_several_judges_or_of_foreign_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"several judges \(i, j\)"):
        ratings_table([_row("a", 1, 1, 5), _row("a", 1, 1, 5) | {"judge": ["i", "p"]}], QUESTIONS)
    with pytest.raises(DataError, match="question 77"):
        ratings_table([_row("a", 77, 1, 5)], QUESTIONS)
    with pytest.raises(DataError, match="no judgment of FastChat's form"):
        ratings_table([{"instruction": "x"}], QUESTIONS)
    with pytest.raises(DataError, match="no judgments"):
        ratings_table([], QUESTIONS)
    with pytest.raises(DataError, match="no judgments of b, only of a"):
        ratings_table([_row("a", 1, 1, 5)], QUESTIONS, against="b")
