"""Multiple-choice questions as token sequences: one for each choice, the prompt before it."""
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

_PROMPT, _ANSWER = ("question", "prompt", "query"), ("answer", "gold", "label")  # what files in use call these columns


@dataclass(frozen=True)
class Question:
    """A prompt, the ways it may go on, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
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
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no questions at {path}: check `questions` in the preset of conf/score/")
    try:
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path).to_dict("records")
        else:
            rows = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {'parquet' if path.suffix == '.parquet' else 'jsonl'} ({error})") from error
    if num_questions is not None and len(rows) < num_questions:
        raise ValueError(f"{path} has {len(rows)} questions, {num_questions} are asked for: lower `num_questions` in conf/score/")
    if not rows:
        raise ValueError(f"{path} has no questions")
    chosen = sorted(random.Random("questions").sample(range(len(rows)), num_questions or len(rows)))
    return [_question(rows[index], f"{path}, question {index}") for index in chosen]


def _question(row: Mapping, where: str) -> Question:
    prompt, answer = (next((row[name] for name in names if name in row), None) for names in (_PROMPT, _ANSWER))
    choices = tuple(row["choices"]) if isinstance(row.get("choices"), list | tuple) or hasattr(row.get("choices"), "tolist") else ()
    if not isinstance(prompt, str) or not prompt.strip() or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: expected a text in {' or '.join(_PROMPT)} and a list of two texts or more in choices")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not pd.api.types.is_integer(answer) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: {' or '.join(_ANSWER)} is {answer!r}; expected a choice or its index, 0 to {len(choices) - 1}")
    return Question(prompt, choices, int(answer))


def tokenize(questions: list[Question], tokenizer, max_tokens: int) -> list[Choice]:
    """Every choice of every question after its prompt; of what is longer than `max_tokens` the end is kept.

    A choice's own tokens are those in which the text with it differs from the prompt alone.
    """
    found = []
    for number, question in enumerate(questions):
        prompt_ids = tokenizer(question.prompt.rstrip())["input_ids"]
        space = question.prompt[len(question.prompt.rstrip()) :] or " "
        for index, text in enumerate(question.choices):
            ids = tokenizer(question.prompt.rstrip() + space + text)["input_ids"]
            shared = next((i for i, pair in enumerate(zip(prompt_ids, ids, strict=False)) if pair[0] != pair[1]), len(prompt_ids))
            cut = max(0, len(ids) - max_tokens)
            found.append(Choice(number, index, ids[cut:], max(1, shared - cut), len(text)))
    return found
