"""What a child is, measured: quality against the parent on test text, speed and memory beside the parent in one run."""
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError
from puzzle_core.files import read_json, write_json
from puzzle_core.quality import sequence_sums
from puzzle_core.serving import pick_serving, place, side_by_side, warn_if_elsewhere
from puzzle_core.spec import Solution
from puzzle_core.tasks import Answers, Exam, Task, retained

RECORD = "evaluation.json"  # in a child's folder: it and its parent as they were measured, one after the other


MOST_NATS = 700  # whose exponential a float holds


@dataclass(frozen=True)
class Settings:
    """How a child is measured: `evaluation` in params.yaml."""

    text: dict[str, int]  # num_tokens, seq_len, batch_size of test text
    domain_tokens: int  # of each domain that the corpus knows, beside it; 0: none
    repeats: int  # timed requests of each model
    tasks: dict[str, dict | None] | None  # name: what a Task is made of; None: no questions are asked
    task_batch_size: int  # answers in one forward pass

    def batches(self, corpus: Corpus, domain: str | None = None) -> list:
        """Token batches [B, T] of the test split, of all text or of one domain."""
        size = dict(self.text)
        if domain is not None:
            size |= {"num_tokens": self.domain_tokens, "batch_size": min(size["batch_size"], -(-self.domain_tokens // size["seq_len"]))}
        return corpus.batches("test", **size, seed="evaluation", domain=domain)

    def exam(self) -> Exam | None:
        """The questions of `tasks`; ValueError or OSError where they cannot be asked."""
        return Exam([Task.of(*entry) for entry in self.tasks.items()], self.task_batch_size) if self.tasks else None


def compare(parent: PreTrainedModel, child: PreTrainedModel, batches: list, what: str = "test text") -> dict[str, dict[str, float]]:
    """Per token of [B, T] token batches: KL(parent ‖ child) in nats, perplexity, share of equal top-1 predictions.

    `kl_stderr` is the standard error of the mean over sequences, 0 of a single one. NotFiniteError where a model's logits overflow.
    """
    ids = [torch.as_tensor(batch, device=parent.device) for batch in batches]
    progress = tqdm(ids, desc=f"compare on {what}", unit="batch")
    sums_N4 = torch.cat([sequence_sums(parent, child, batch) for batch in progress]).cpu()
    num_sequences, seq_len = len(sums_N4), ids[0].shape[1]
    kl_N = sums_N4[:, 0] / seq_len
    kl, other, *losses = (sums_N4.sum(0) / num_sequences).tolist()
    losses = [loss / (seq_len - 1) for loss in losses]
    if not all(map(math.isfinite, (kl, *losses))) or max(losses) > MOST_NATS:
        raise NotFiniteError(
            f"{what}: the child's KL is {kl / seq_len:g}, its cross-entropy {losses[1]:g} nats a token; lower lr in conf/gkd/, or use "
            "dtype float32 in conf/parent/"
        )
    perplexity = [math.exp(loss) for loss in losses]
    error = kl_N.std().item() / math.sqrt(num_sequences) if num_sequences > 1 else 0.0
    return {
        "parent": {"kl": 0.0, "kl_stderr": 0.0, "perplexity": perplexity[0], "top1_agreement": 1.0},
        "child": {"kl": kl / seq_len, "kl_stderr": error, "perplexity": perplexity[1], "top1_agreement": 1 - other / seq_len},
    }


def by_domain(parent: PreTrainedModel, child: PreTrainedModel, corpus: Corpus, settings: Settings) -> dict[str, dict[str, float]]:
    """The same on each of the corpus's domains, its name at the end of each metric's: `kl_code`."""
    rows = {"parent": {}, "child": {}}
    for domain in corpus.domains if settings.domain_tokens else []:
        for name, row in compare(parent, child, settings.batches(corpus, domain), domain).items():
            rows[name] |= {f"{metric}_{domain}": value for metric, value in row.items() if metric != "kl_stderr"}
    return rows


def accuracies(parent: PreTrainedModel, child: PreTrainedModel, tokenizer, settings: Settings) -> dict[str, dict[str, float]]:
    """Accuracy on each task with its standard error and chance, and the share of the parent's accuracy over chance that the child has:
    of each task, and of all together (`accuracy_retained`), where the parent is two standard errors above chance."""
    exam = settings.exam()
    return accuracy_rows(*(exam.ask(model, tokenizer) if exam else {} for model in (parent, child)))


def accuracy_rows(of_parent: dict[str, Answers], of_child: dict[str, Answers]) -> dict[str, dict[str, float]]:
    """`accuracies` of what both answered, by task."""
    rows: dict[str, dict[str, float]] = {"parent": {}, "child": {}}
    for name, answers in (("parent", of_parent), ("child", of_child)):
        for task, of_task in answers.items():
            rows[name] |= {f"{task}_accuracy": of_task.accuracy, f"{task}_accuracy_stderr": of_task.stderr}
            rows[name] |= {f"{task}_chance": of_task.chance}
            rows[name] |= _share(task, [of_parent[task]], [of_task])
        rows[name] |= _share("accuracy", list(of_parent.values()), list(answers.values()))
    return rows


def _share(name: str, parent: list[Answers], child: list[Answers]) -> dict[str, float]:
    found = retained(parent, child)
    return dict(zip((f"{name}_retained", f"{name}_retained_stderr"), found, strict=True)) if found else {}


def measure(
    parent: PreTrainedModel, child: PreTrainedModel, corpus: Corpus, solution: Solution, serving: str, settings: Settings
) -> dict[str, dict[str, float]]:
    """One row of metrics for the parent and one for the child, the same names as the prediction of `solution` has."""
    warn_if_elsewhere(solution, parent, serving)
    answers = accuracies(parent, child, corpus.tokenizer, settings)
    quality, domains = compare(parent, child, settings.batches(corpus)), by_domain(parent, child, corpus, settings)
    totals = side_by_side({"parent": parent, "child": child}, solution.scenario, serving, settings.repeats, warmup=1)
    return {name: {**quality[name], **totals[name], **answers[name], **domains[name]} for name in quality}


def record(folder: Path, measured: dict[str, dict[str, float]], parent: PreTrainedModel, solution: Solution, serving: str) -> None:
    """Write both rows of `measure` into the child's folder, with what their times are true of."""
    where = place(parent, pick_serving(serving, parent.device))
    write_json(folder / RECORD, {"scenario": str(solution.scenario), "hardware": where, **measured})


def recorded(folder: Path) -> dict[str, dict[str, float]] | None:
    """The rows `parent` and `child` of one measurement; None of a child that was measured before they were kept together."""
    return read_json(folder / RECORD) if (folder / RECORD).exists() else None


@torch.no_grad()
def continuations(
    models: dict[str, PreTrainedModel], corpus: Corpus, num_prompts: int, prompt_len: int, num_tokens: int
) -> list[dict[str, str]]:
    """The beginnings of documents of the test split, of different domains where there are any, how they go on, and what each model makes
    of them greedily: rows of `prompt`, `text` and the models' names."""
    documents, chosen, domains = list(corpus.splits["test"]), [], set()
    random.Random("continuations").shuffle(documents)
    for document in documents:
        ids = corpus.tokenizer(document.text, add_special_tokens=False)["input_ids"][: prompt_len + num_tokens]
        if len(ids) == prompt_len + num_tokens and (document.domain is None or document.domain not in domains):
            chosen.append(corpus.start + ids)
            domains.add(document.domain)
        if len(chosen) == num_prompts:
            break
    if not chosen:
        return []
    whole, prompt_len = torch.tensor(chosen), len(corpus.start) + prompt_len
    parts = {"prompt": whole[:, :prompt_len], "text": whole[:, prompt_len:]}
    for name, model in models.items():
        prompts = parts["prompt"].to(model.device)
        how = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": corpus.tokenizer.eos_token_id}
        answer = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
        parts[name] = answer[:, prompt_len:].cpu()
    decoded = {name: corpus.tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in parts.items()}
    return [dict(zip(decoded, row, strict=True)) for row in zip(*decoded.values(), strict=True)]


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as text, a column each; what a row does not know stays empty."""
    return pd.DataFrame(rows).to_string(float_format=lambda value: f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}", na_rep="")
