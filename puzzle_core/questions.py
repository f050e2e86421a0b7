"""Questions in files: multiple choice, texts that go on with one word (LAMBADA), one ending for several texts (WinoGrande)."""
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from puzzle_core.corpus import start_ids
from puzzle_core.errors import UserError

_PROMPT, _ANSWER = ("question", "prompt", "query"), ("answer", "gold", "label")  # what files in use call these columns


@dataclass(frozen=True)
class Question:
    """A prompt, the ways it may go on, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Cloze:
    """A text and how it goes on; the answer is right if that is what the model would say, token by token."""

    context: str
    continuation: str


@dataclass(frozen=True)
class WinogradSchema:
    """Several texts that may precede one continuation, and the one that does."""

    contexts: tuple[str, ...]
    continuation: str
    answer: int


@dataclass(frozen=True)
class Choice:
    """One choice of one question in tokens: those from `start` on are the choice's own."""

    question: int
    index: int  # among the question's choices
    input_ids: list[int]
    start: int
    num_characters: int


def read_questions(path: str | Path, num_questions: int | None = None) -> list[Question]:
    """The questions of a jsonl or parquet file, or `num_questions` of them, drawn the same way every time.

    Columns: question, prompt or query; choices, a list of texts; answer, gold or label, an index into choices or the
    right choice itself. ValueError that names file and row for anything else.
    """
    return [_question(row, where) for row, where in _rows(path, num_questions)]


def read_items(path: str | Path, num_questions: int | None = None) -> list[Question] | list[Cloze] | list[WinogradSchema]:
    """The same of a file of any of three kinds, which its columns tell: those of `read_questions`; context and
    continuation; context_options, continuation and the index gold."""
    rows = _rows(path, num_questions)
    of_row = _schema if "context_options" in rows[0][0] else _cloze if "context" in rows[0][0] else _question
    return [of_row(row, where) for row, where in rows]


def _rows(path: str | Path, num_rows: int | None) -> list[tuple[Mapping, str]]:
    """Each row, and where it is for messages."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no questions at {path}: check `questions` in conf/score/, `evaluation.tasks` in params.yaml")
    try:
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path).to_dict("records")
        else:
            rows = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as {'parquet' if path.suffix == '.parquet' else 'jsonl'} ({error})") from error
    if not rows:
        raise UserError(f"{path} has no questions")
    return [(rows[index], f"{path}, question {index}") for index in drawn(len(rows), num_rows, path)]


def drawn(num_rows: int, num_wanted: int | None, where: object) -> list[int]:
    """Which rows are asked where not all are: the same ones every time, in order."""
    if num_wanted is not None and num_rows < num_wanted:
        raise UserError(f"{where} has {num_rows} questions, {num_wanted} are asked for: lower `num_questions`")
    return sorted(random.Random("questions").sample(range(num_rows), num_wanted or num_rows))


def _texts(row: Mapping, column: str) -> tuple:
    value = row.get(column)
    return tuple(value) if isinstance(value, list | tuple) or hasattr(value, "tolist") else ()


def _answer(answer: object, choices: tuple, columns: str, where: str) -> int:
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not pd.api.types.is_integer(answer) or not 0 <= answer < len(choices):
        raise UserError(f"{where}: {columns} is {answer!r}; expected a choice or its index, 0 to {len(choices) - 1}")
    return int(answer)


def _all_texts(*values: object) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


def _question(row: Mapping, where: str) -> Question:
    prompt, answer = (next((row[name] for name in names if name in row), None) for names in (_PROMPT, _ANSWER))
    choices = _texts(row, "choices")
    if len(choices) < 2 or not _all_texts(prompt, *choices):
        raise UserError(f"{where}: expected a text in {' or '.join(_PROMPT)} and a list of two texts or more in choices")
    return Question(prompt, choices, _answer(answer, choices, " or ".join(_ANSWER), where))


def _cloze(row: Mapping, where: str) -> Cloze:
    if not _all_texts(row.get("context"), row.get("continuation")):
        raise UserError(f"{where}: expected a text in context and one in continuation")
    return Cloze(row["context"], row["continuation"])


def _schema(row: Mapping, where: str) -> WinogradSchema:
    contexts, continuation = _texts(row, "context_options"), row.get("continuation")
    if len(contexts) < 2 or not _all_texts(continuation, *contexts):
        raise UserError(f"{where}: expected a list of two texts or more in context_options and a text in continuation")
    return WinogradSchema(contexts, continuation, _answer(row.get("gold"), contexts, "gold", where))


def tokenize(questions: list[Question], tokenizer, max_tokens: int) -> list[Choice]:
    """Every choice of every question after its prompt; of what is longer than `max_tokens` the end is kept.

    A choice's own tokens are those in which the text with it differs from the prompt alone. Each begins as the tokenizer begins a text.
    """
    found, start = [], start_ids(tokenizer)
    for number, question in enumerate(questions):
        prompt_ids = tokenizer(question.prompt.rstrip(), add_special_tokens=False)["input_ids"]
        space = question.prompt[len(question.prompt.rstrip()) :] or " "
        for index, text in enumerate(question.choices):
            ids = tokenizer(question.prompt.rstrip() + space + text, add_special_tokens=False)["input_ids"]
            shared = next((i for i, pair in enumerate(zip(prompt_ids, ids, strict=False)) if pair[0] != pair[1]), len(prompt_ids))
            cut = max(0, len(start) + len(ids) - max_tokens)
            first = max(1, len(start), len(start) + shared - cut)
            found.append(Choice(number, index, start + ids[cut:], first, len(text)))
    return found
