"""Accuracy on tasks, through EleutherAI's lm-eval: questions in local files, or its own tasks, by name, from the hub.

lm-eval is imported where it is needed: it takes seconds, and whoever asks for no tasks need not have it.
"""
import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Real

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from puzzle_core.errors import UserError
from puzzle_core.questions import Cloze, Question, WinogradSchema, drawn, read_items
from puzzle_core.spec import did_you_mean
from puzzle_core.trace import float32_logits


@dataclass(frozen=True)
class Task:
    """Questions that a model is asked: an entry of `evaluation.tasks` in params.yaml."""

    name: str
    path: str | None = None  # a file of questions; None: lm-eval's task of that name, from the hub
    num_questions: int | None = None  # drawn the same way every time; None: all
    metric: str = "acc"  # or acc_norm: log-likelihood per character; or another share of right answers that an lm-eval task has
    delimiter: str | None = None  # between prompt and answer; None: a space, or what white space the prompt ends with
    num_fewshot: int | None = None
    chance: float | None = None  # that guessing gets; None: of multiple choice what the choices say, else 0

    @classmethod
    def of(cls, name: str, settings: dict | None) -> "Task":
        known = [field.name for field in fields(cls)][1:]
        if not isinstance(settings, Mapping | None):
            raise UserError(f"evaluation.tasks.{name} is {settings!r}; expected keys among {', '.join(known)}, or null")
        for key in settings or {}:
            if key not in known:
                raise UserError(f"unknown key '{key}' in evaluation.tasks.{name}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
        return cls(name, **settings or {})

    def __post_init__(self):
        """ValueError that names the key which has no such value."""
        of_key = {
            **{key: (isinstance(getattr(self, key), str), "a text") for key in ("path", "metric", "delimiter")},
            "num_questions": (_is_number(self.num_questions, int) and self.num_questions >= 1, "a whole number of at least 1, or null"),
            "num_fewshot": (_is_number(self.num_fewshot, int) and self.num_fewshot >= 0, "a whole number of at least 0, or null"),
            "chance": (_is_number(self.chance, int | float) and 0 <= self.chance < 1, "a share from 0 to below 1, or null"),
        }
        for key, (fits, expected) in of_key.items():
            if getattr(self, key) is not None and not fits:
                raise UserError(f"evaluation.tasks.{self.name}.{key} is {getattr(self, key)!r}; expected {expected}")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Answers:
    """What one model answered to one task."""

    right_N: np.ndarray  # of each question 1.0 where it was right, else 0.0, or how right it was
    chance: float  # the share that guessing gets

    @property
    def accuracy(self) -> float:
        return float(self.right_N.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy, as lm-eval has it; of a group, that of all its questions together."""
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
        hub = [task for task in tasks if task.path is None]
        loaded = _from_hub(hub) if hub else {}
        self.parts = {task.name: loaded[task.name] if task.path is None else {task.name: _local(task)} for task in tasks}
        names = [name for parts in self.parts.values() for name in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"evaluation.tasks: {', '.join(twice)} would be asked twice; a group of lm-eval has its parts already")
        for task in tasks:
            for part in self.parts[task.name].values():
                _require_share(task, part)
                shots = part.get_config("num_fewshot") if task.num_fewshot is None else task.num_fewshot
                _require_examples(task, part, shots or 0)
                part.set_config("num_fewshot", shots or 0)
                part.set_fewshot_seed(1234)

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Answers]:
        """The model's answers by name of task."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        own = copy.deepcopy(tokenizer)  # HFLM gives it a padding token
        lm = HFLM(model, tokenizer=own, backend="causal", batch_size=self.batch_size)
        parts = {name: part for parts in self.parts.values() for name, part in parts.items()}
        asked = {
            name: drawn(len(part.eval_docs), task.num_questions, name)
            for task in self.tasks
            for name, part in self.parts[task.name].items()
            if task.path is None and task.num_questions is not None
        }
        with float32_logits(model):
            results = evaluate(lm, {"tasks": parts}, samples=asked or None, bootstrap_iters=0)
        return {task.name: self._answers(task, results["samples"]) for task in self.tasks}

    def _answers(self, task: Task, samples: dict[str, list[dict]]) -> Answers:
        right, chance = [], []
        for name, part in self.parts[task.name].items():
            for sample in _once(samples[name]):
                value = sample.get(task.metric)
                if not isinstance(value, Real | np.bool_) or not 0 <= value <= 1:
                    raise UserError(
                        f"evaluation.tasks.{task.name}: {task.metric} of a question of {name} is {value!r}, no share of a right answer "
                        f"(0 to 1). Use another metric: {', '.join(_shares(part))}"
                    )
                right.append(float(value))
                chance.append(_chance(task, part, sample["doc"]) if task.chance is None else task.chance)
        return Answers(np.array(right), sum(chance) / len(chance))


_PICKS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # lm-eval's metrics that take the best of the choices for the answer


def _chance(task: Task, part, doc: dict) -> float:
    """The share of a question that guessing gets: of picking a choice, those that count as right; nothing else can be guessed."""
    if part.OUTPUT_TYPE != "multiple_choice" or task.metric not in _PICKS:
        return 0.0
    choices, gold = part.doc_to_choice(doc), part.doc_to_text(doc) if part.multiple_input else part.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    return len({choices.index(g) if g in choices else g for g in golds if g in choices or g in range(len(choices))}) / len(choices)


def _shares(part) -> list[str]:
    """The metrics of a task of lm-eval that are the mean of what each question got, the more the better."""
    from lm_eval.api.metrics import mean

    better = part.higher_is_better()
    return [metric for metric, aggregate in part.aggregation().items() if aggregate is mean and better.get(metric)]


def _require_share(task: Task, part) -> None:
    """ValueError where the task's metric is no accuracy, or where what guessing gets is not known."""
    where, name = f"evaluation.tasks.{task.name}", part.task_name
    usable = ", ".join(_shares(part)) or "none of this task's: leave it out"
    if task.metric not in part.aggregation():
        raise UserError(f"{where}: {name} has no metric '{task.metric}'. Those that can be used: {usable}")
    if task.metric not in _shares(part):
        raise UserError(
            f"{where}: {task.metric} of {name} is no accuracy: lm-eval does not take the mean of what each question got, or less of it "
            f"is better. Metrics that can be used: {usable}"
        )
    if task.chance is None and part.OUTPUT_TYPE == "multiple_choice" and part.get_config("process_results"):
        raise UserError(f"{where}: {name} makes {task.metric} of the choices in a way of its own. Say what guessing gets: `chance: 0.25`")


def _require_examples(task: Task, part, shots: int) -> None:
    """ValueError where a question cannot have as many solved examples, none of which is itself."""
    if not shots:
        return
    pool = list(part.fewshot_docs() or ())
    same_file = part.fewshot_cfg.split == part.config.test_split  # then lm-eval leaves the question out, with every copy of it
    most = len(pool) - (max(Counter(map(repr, pool)).values(), default=0) if same_file else 0)
    if shots > most:
        raise UserError(
            f"evaluation.tasks.{task.name}.num_fewshot is {shots}, and {part.task_name} has {len(pool)} questions to take examples from; "
            f"expected at most {most}, as none may be the question itself"
        )


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


def _from_hub(tasks: list[Task]) -> dict[str, dict]:
    """lm-eval's own tasks: for each name its parts, of which a group has several. ValueError for a group that is no one task."""
    from lm_eval.tasks import TaskManager

    manager, found = TaskManager(), {}
    for task in tasks:
        if task.name not in manager.all_tasks:
            hint = did_you_mean(task.name, manager.all_tasks)
            raise UserError(f"evaluation.tasks: no `path`, and lm-eval has no task '{task.name}'.{hint}")
        loaded = manager.load([task.name])
        found[task.name] = loaded["tasks"]
        if task.name in loaded["groups"]:
            _require_weights(task, loaded["groups"][task.name], found[task.name].values())
    return found


def _require_weights(task: Task, group, parts: Iterable) -> None:
    """ValueError where each question would count once, and lm-eval lets each part count once."""
    by_part = any(of.metric == task.metric and not of.weight_by_size for of in group.aggregate_metric_list or [])
    if by_part and task.num_questions is None and len({len(part.eval_docs) for part in parts}) > 1:
        raise UserError(
            f"evaluation.tasks.{task.name}: lm-eval takes the mean of this group's parts, whatever their sizes; here each question counts. "
            "Ask as many of each part (`num_questions`), or name the parts one by one"
        )


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
