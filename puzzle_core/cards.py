"""A child's model card: what it is, of which parent, under which licence, what was asked for and what was measured."""
import itertools
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from puzzle_core.files import atomic
from puzzle_core.parents import Parent
from puzzle_core.serving import hardware_name
from puzzle_core.spec import CLOCKED, PARENT, SUBBLOCKS, Architecture, Solution

COLUMNS = {
    "speedup": ("speed-up", "{:.2f} ×"),
    "latency_ms": ("latency, parent → child, ms", "{:,.0f}"),
    "throughput_tokens_per_s": ("tokens/s, parent → child", "{:.1f}"),
    "memory_mib": ("memory, MiB", "{:,.0f}"),
    "num_params": ("parameters", "{:,.0f}"),
    "kl": ("KL to the parent", "{:.3f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "top1_agreement": ("same next token", "{:.0%}"),
}

SPEEDUP = "Times are those of the turn whose speed-up is the median."

ASSEMBLED = "Its blocks were distilled one by one and put together; it was not yet trained as a whole."
DISTILLED = "Its blocks were distilled one by one and put together; then it was healed as a whole: global distillation, {:,} tokens of {}."


def cell(row: dict[str, float], key: str, form: str, parent: dict[str, float] | None) -> str:
    """One figure of a row; a time only as a pair with that of `parent`, the parent's row of the same measurement; else ""."""
    if key not in row or (key in CLOCKED and parent is None):
        return ""
    return f"{form.format(parent[key])} → {form.format(row[key])}" if key in CLOCKED else form.format(row[key])


def table(rows: dict[str, dict[str, float]], parents: dict[str, dict[str, float]]) -> str:
    """Rows of metrics by title, as Markdown, with the parent's row of the same measurement where there is one, by the same titles."""
    lines = ["| | " + " | ".join(name for name, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, row in rows.items():
        cells = [cell(row, key, form, parents.get(title)) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracies(rows: dict[str, dict[str, float]]) -> str:
    """Accuracy on each task, ± standard error, of rows of metrics by title, as Markdown; "" where none was measured."""
    tasks = [key.removesuffix("_chance") for key in rows["parent"] if key.endswith("_chance")]
    if not tasks:
        return ""
    rows = {title: row for title, row in rows.items() if f"{tasks[0]}_accuracy" in row}
    lines = ["| | " + " | ".join(tasks) + " | retained |", "|---" * (len(tasks) + 2) + "|"]
    lines.append("| chance | " + " | ".join(f"{rows['parent'][f'{task}_chance']:.3f}" for task in tasks) + " | |")
    for title, row in rows.items():
        cells = [f"{row[f'{task}_accuracy']:.3f} ± {row[f'{task}_accuracy_stderr']:.3f}" for task in tasks]
        share = f"{row['accuracy_retained']:.1%} ± {row['accuracy_retained_stderr']:.1%}" if "accuracy_retained" in row else ""
        lines.append(f"| {title} | " + " | ".join([*cells, share]) + " |")
    text = "Accuracy on tasks, by lm-eval; retained: the child's accuracy over chance as a share of the parent's, over the tasks on which"
    return "\n".join([*lines, "", f"{text} the parent is two standard errors above chance.", ""])


def _architecture(architecture: Architecture) -> str:
    """How many layers got which variant, then layer by layer, equal neighbours in one row."""
    counts = [Counter(str(architecture[layer, s]) for layer in range(len(architecture.layers))) for s in SUBBLOCKS]
    lines = [f"- {s}: {', '.join(f'{n} × {v}' for v, n in count.most_common())}" for s, count in zip(SUBBLOCKS, counts, strict=True)]
    lines += ["", f"| layers | {' | '.join(SUBBLOCKS)} |", "|---" * 3 + "|"]
    for pair, group in itertools.groupby(range(len(architecture.layers)), key=lambda layer: architecture.layers[layer]):
        layers = list(group)
        lines.append(f"| {layers[0]}–{layers[-1]} | {' | '.join(map(str, pair))} |" if len(layers) > 1 else
                     f"| {layers[0]} | {' | '.join(map(str, pair))} |")  # fmt: skip
    return "\n".join(lines)


_TEXT = """# A child of {parent}

Made with Puzzle (distillation-based architecture search, [arXiv 2411.19146](https://arxiv.org/abs/2411.19146)) from its
parent: {origin}. {how}

## Load it

```python
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
```

{needs}

## Measured beside its parent

{table}

{speedup_is}

{accuracies}
Asked for: {constraints}. Workload {scenario} (batch, prompt, generated tokens) in {dtype} on {hardware}; the search
went by {priced}; quality on the
test split of {corpus}; torch {torch}, transformers {transformers}.

## Architecture

{architecture}

`no_op`: gone, its norms too. `linear`: one matrix. `kvN`: N key-value heads. `wN`: N channels. `parent`: as it was.

## License

{license}
"""


def write(folder: Path, parent: Parent, solution: Solution, measured: dict[str, dict[str, float]], how: str, corpus: str) -> None:
    """Write README.md into a child's folder.

    `measured` has the rows `parent` and `child`, `how` says in a sentence what was done to the child, `corpus` which text
    the quality was measured on.
    """
    origin, is_parent = parent.origin, all(variant == PARENT for _, _, variant in solution.architecture.items())
    data = ModelCardData(
        model_name=f"child of {origin.name}",
        base_model=origin.hub_id,
        license=origin.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["puzzle", "distillation", "neural-architecture-search", *([] if is_parent else ["custom_code"])],
        eval_results=[
            EvalResult("text-generation", dataset_type=corpus, dataset_name=corpus, metric_type=key, metric_value=measured["child"][key])
            for key in ("kl", "perplexity", "top1_agreement")
        ]
        + [
            EvalResult("text-generation", dataset_type=task, dataset_name=task, metric_type="accuracy", metric_value=value)
            for key, value in measured["child"].items()
            if (task := key.removesuffix("_accuracy")) != key
        ],
    )
    rows = {"parent": measured["parent"], "this child, as the search predicted": solution.predicted(), "this child": measured["child"]}
    text = _TEXT.format(
        parent=origin.name,
        origin=origin.text,
        how=how,
        trust="" if is_parent else ", trust_remote_code=True",
        needs="It needs torch and transformers"
        + ("." if is_parent else "; `modeling_puzzle.py`, which lies beside the weights, builds the layers that differ."),
        table=table(rows, {"this child": measured["parent"]}),
        speedup_is=SPEEDUP,
        accuracies=accuracies(rows),
        constraints=", ".join(map(str, solution.constraints)) or "nothing",
        scenario=solution.scenario,
        priced=solution.priced,
        dtype=str(parent.model.dtype).removeprefix("torch."),
        hardware=hardware_name(parent.device),
        corpus=corpus,
        architecture=_architecture(solution.architecture),
        license=f"The parent's: {origin.license}." if origin.license else "The parent's, which is not recorded here: look it up.",
        **{name: version(name) for name in ("torch", "transformers")},
    )
    with atomic(folder / "README.md") as part:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(part)
