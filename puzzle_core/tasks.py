"""Accuracy on tasks, through EleutherAI's lm-eval: questions in local files, or its own tasks, by name, from the hub.

lm-eval is imported where it is needed: it takes seconds, and whoever asks for no tasks need not have it.
"""
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from puzzle_core.errors import UserError
from puzzle_core.questions import Cloze, Question, WinogradSchema, drawn, read_items
from puzzle_core.spec import did_you_mean


@dataclass(frozen=True)
class Task:
    """Questions that a model is asked: an entry of `evaluation.tasks` in params.yaml."""

    name: str
    path: str | None = None  # a file of questions; None: lm-eval's task of that name, from the hub
    num_questions: int | None = None  # drawn the same way every time; None: all
    metric: str = "acc"  # or acc_norm: log-likelihood per character; or another that an lm-eval task of its own has
    delimiter: str | None = None  # between prompt and answer; None: a space, or what white space the prompt ends with
    num_fewshot: int | None = None

    @classmethod
    def of(cls, name: str, settings: dict | None) -> "Task":
        known = [field.name for field in fields(cls)][1:]
        for key in settings or {}:
            if key not in known:
                raise UserError(f"unknown key '{key}' in evaluation.tasks.{name}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
        return cls(name, **settings or {})


@dataclass(frozen=True)
class Answers:
    """What one model answered to one task."""

    right_N: np.ndarray  # of each question 1.0 where it was right, else 0.0 (or a metric's own value)
    chance: float  # the share that guessing gets

    @property
    def accuracy(self) -> float:
        return float(self.right_N.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy, as lm-eval has it."""
        return standard_error(self.right_N)


def standard_error(values_N: np.ndarray) -> float:
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else 0.0


def retained(parent: list[Answers], child: list[Answers]) -> tuple[float, float] | None:
    """Child's accuracy over chance as a share of the parent's, both summed over tasks, and its standard error.

    Only tasks count on which the parent is two standard errors above chance: on others the share is noise. None without any: then there
    is nothing to retain. Both models were asked the same questions, so the error is that of child - share · parent, question by question.
    """
    counted = [(p, c) for p, c in zip(parent, child, strict=True) if p.accuracy - p.chance > 2 * p.stderr]
    if not counted:
        return None
    above = sum(p.accuracy - p.chance for p, _ in counted)
    share = sum(c.accuracy - c.chance for _, c in counted) / above
    return share, math.hypot(*(standard_error(c.right_N - share * p.right_N) for p, c in counted)) / above


class Exam:
    """Tasks that are ready to be put to models, one after the other."""

    def __init__(self, tasks: list[Task], batch_size: int):
        """`batch_size`: answers in one forward pass. ValueError or OSError for what cannot be read or reached."""
        _require_lm_eval()
        self.tasks, self.batch_size = tasks, batch_size
        hub = [task.name for task in tasks if task.path is None]
        loaded = _from_hub(hub) if hub else {}
        self.parts = {task.name: loaded[task.name] if task.path is None else {task.name: _local(task)} for task in tasks}
        names = [name for parts in self.parts.values() for name in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"evaluation.tasks: {', '.join(twice)} would be asked twice; a group of lm-eval has its parts already")
        for task in tasks:
            for part in self.parts[task.name].values():
                shots = part.get_config("num_fewshot") if task.num_fewshot is None else task.num_fewshot
                part.set_config("num_fewshot", shots or 0)
                part.set_fewshot_seed(1234)

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Answers]:
        """The model's answers by name of task."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        own = copy.deepcopy(tokenizer)  # HFLM gives it a padding token
        lm = HFLM(model, tokenizer=own, backend="causal", batch_size=self.batch_size, softmax_dtype=torch.float32)
        parts = {name: part for parts in self.parts.values() for name, part in parts.items()}
        asked = {
            name: drawn(len(part.eval_docs), task.num_questions, name)
            for task in self.tasks
            for name, part in self.parts[task.name].items()
            if task.path is None and task.num_questions is not None
        }
        results = evaluate(lm, {"tasks": parts}, samples=asked or None, bootstrap_iters=0)
        return {task.name: self._answers(task, results["samples"]) for task in self.tasks}

    def _answers(self, task: Task, samples: dict[str, list[dict]]) -> Answers:
        right, chance = [], []
        for name, part in self.parts[task.name].items():
            for sample in _once(samples[name]):
                if task.metric not in sample["metrics"]:
                    raise UserError(f"evaluation.tasks.{task.name}: no metric '{task.metric}', only {', '.join(sample['metrics'])}")
                right.append(float(sample[task.metric]))
                chance.append(1 / len(sample["arguments"]) if part.OUTPUT_TYPE == "multiple_choice" else 0.0)
        return Answers(np.array(right), sum(chance) / len(chance))


def _once(samples: list[dict]) -> Iterator[dict]:
    """Each question with the first of the filters that its task has."""
    yield from (sample for sample in samples if sample["filter"] == samples[0]["filter"])


def _require_lm_eval() -> None:
    try:
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(f"evaluation.tasks needs lm-eval: pip install 'puzzle[tasks]', or `make install` ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every argument that it does not need here


def _from_hub(names: list[str]) -> dict[str, dict]:
    """lm-eval's own tasks: for each name its parts, of which a group has several."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f"evaluation.tasks: no `path`, and lm-eval has no task '{name}'.{hint}")
    return {name: manager.load([name])["tasks"] for name in names}


def _local(task: Task):
    """The questions of a file as a task of lm-eval."""
    from lm_eval.api.task import ConfigurableTask

    items = read_items(task.path, task.num_questions)
    metrics = ["acc", "acc_norm"] if isinstance(items[0], Question) else ["acc"]
    rows = [_row(item, task.delimiter) for item in items]
    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "fewshot_split": "test",
            "target_delimiter": "",  # it is in the rows: lm-eval counts white space that ends a prompt to the answer
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            **_COLUMNS[type(items[0])],
        }
    )


_COLUMNS = {
    Question: {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer"},
    Cloze: {"output_type": "loglikelihood", "doc_to_text": "prompt", "doc_to_target": "answer"},
    WinogradSchema: {
        "output_type": "multiple_choice", "doc_to_text": "answer", "doc_to_choice": "prompts", "doc_to_target": "continuation"
    },
}


def _row(item: Question | Cloze | WinogradSchema, delimiter: str | None) -> dict:
    def before(prompt: str) -> str:
        if delimiter is not None:
            return prompt + delimiter
        return prompt if prompt[-1:].isspace() else f"{prompt} "

    match item:
        case Question(prompt, choices, answer):
            return {"prompt": before(prompt), "choices": list(choices), "answer": answer}
        case Cloze(context, continuation):
            return {"prompt": before(context), "answer": continuation}
        case WinogradSchema(contexts, continuation, answer):
            return {"prompts": [before(context) for context in contexts], "continuation": continuation, "answer": answer}
