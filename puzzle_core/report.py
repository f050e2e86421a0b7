"""A run as one HTML page: what was asked for, what came of it, with what errors; pictures and styles are inside the page."""
import base64
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from puzzle_core import cards, evaluation, plots
from puzzle_core.errors import UserError
from puzzle_core.files import read_json
from puzzle_core.spec import CLOCKED, Solution, without_times

TEMPLATE = Path(__file__).with_name("report.html")
ROWS = {"parent": "parent", "predicted": "predicted", "child": "before distillation", "distilled": "after distillation"}
CHILDREN = ("child", "distilled")
FORMATS = {
    **cards.COLUMNS,
    "prefill_ms": ("time to first token, parent → child, ms", "{:,.1f}"),
    "decode_ms": ("time per output token, parent → child, ms", "{:,.2f}"),
    "kv_mib": ("KV cache, MiB", "{:,.1f}"),
}
ORDER = ("kl", "perplexity", "top1_agreement", "speedup", "latency_ms", "prefill_ms", "decode_ms", "throughput_tokens_per_s", "memory_mib",
         "kv_mib", "num_params")  # fmt: skip
PACKAGES = ("torch", "transformers", "datasets", "ortools", "lm_eval")


@dataclass(frozen=True)
class Run:
    """What a run has left in its data folder: rows of metrics by name, the solution, curves, other pictures.

    `timed` has of each child the parent's row and its own from one measurement: times are taken from there alone.
    """

    metrics: dict[str, dict[str, float]]
    solution: Solution
    training: list[dict[str, float]]
    held_out: list[dict[str, float]]
    pool: list[dict[str, float]]
    frontier: list[dict[str, float]]
    pictures: dict[str, Path]
    timed: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def read(cls, data: Path) -> "Run":
        """Metrics of the parent and of a child there must be; FileNotFoundError says which stage is missing."""
        metrics = {name: read_json(data / f"metrics/{name}.json") for name in ("parent", "predicted", "child")}
        if (data / "metrics/distilled.json").exists():
            metrics["distilled"] = read_json(data / "metrics/distilled.json")

        def plot(name: str) -> list[dict]:
            return read_json(data / f"plots/{name}.json") if (data / f"plots/{name}.json").exists() else []

        pictures = sorted(path for path in (data / "plots").glob("*.png") if path.stem not in ("solution", "frontier"))
        return cls(
            metrics,
            Solution.from_json(read_json(data / "chosen.json")),
            plot("gkd_curve"),
            plot("gkd_held_out"),
            [row for row in plot("pool") if row["realised"] is not None],
            plot("frontier"),
            {path.stem: path for path in pictures},
            {name: pair for name in CHILDREN if name in metrics and (pair := _pair(data, name, metrics[name]))},
        )

    @property
    def children(self) -> list[str]:
        return [name for name in CHILDREN if name in self.metrics]


def _pair(data: Path, name: str, row: dict[str, float]) -> dict[str, dict[str, float]] | None:
    """Parent and child as they were measured together, from the child's folder, unless an earlier version wrote it."""
    pair = evaluation.recorded(data / name)
    if pair is not None and without_times(pair["child"]) != without_times(row):
        raise UserError(f"{data / name} is not the child that {data}/metrics/{name}.json is of: `dvc checkout`, or run its stage again")
    return pair


def page(run: Run, texts: list[dict[str, str]], swept: str, settings: dict, hardware: str) -> str:
    """The page's HTML. `texts` are rows of `evaluation.continuations`, `swept` the constraint of the frontier."""
    solution = run.solution
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(
        parent=settings["use"]["parent"],
        asked=", ".join(map(str, solution.constraints)) or "no constraint",
        solution=solution,
        healed="distilled" in run.metrics,
        tiles=_tiles(run.metrics["parent"], run.metrics[run.children[-1]], run.timed.get(run.children[-1])),
        columns=[ROWS[name] for name in ROWS if name in run.metrics],
        totals=_totals(run.metrics, run.timed),
        untimed=[ROWS[name] for name in run.children if name not in run.timed],
        tasks=_tasks(run.metrics),
        domains=_domains(run.metrics),
        predictions=_predictions(run.metrics, run.children),
        pool=run.pool,
        frontier=_drawn(lambda path: _frontier_picture(run, swept, path)) if run.frontier else None,
        curve=_drawn(lambda path: plots.curve_picture(run.training, run.held_out, path)) if run.training else None,
        pictures={name: _inline(path.read_bytes()) for name, path in run.pictures.items()},
        texts=texts,
        names=ROWS,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        hardware=hardware,
        versions={name: version(name) for name in PACKAGES if importlib.util.find_spec(name)},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _inline(png: bytes) -> Markup:
    return Markup(f"data:image/png;base64,{base64.b64encode(png).decode()}")


def _drawn(draw: Callable[[Path], None]) -> Markup:
    """What `draw` writes to the path it is given, as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "picture.png")
        return _inline((Path(folder) / "picture.png").read_bytes())


def _frontier_picture(run: Run, swept: str, path: Path) -> None:
    metric, scenario = run.solution.metric, run.solution.scenario
    rows = {ROWS["predicted"]: run.solution.predicted()}
    for name in run.children:
        row = without_times(run.metrics[name])
        if swept in CLOCKED and name in run.timed:  # at the pace of the costs, which the curve is of
            of_parent, of_child = run.timed[name]["parent"], run.timed[name]["child"]
            row |= {swept: run.solution.parent_totals[swept] * of_child[swept] / of_parent[swept]}
        rows[f"realised, {ROWS[name]}"] = row
    marks = {label: (row[swept], row[metric]) for label, row in rows.items() if swept in row and metric in row}
    title = f"least total {metric} at each limit of {swept}, on {scenario}"
    plots.frontier_picture(run.frontier, swept, metric, path, title, marks)


def _tiles(parent: dict[str, float], final: dict[str, float], timed: dict[str, dict] | None) -> list[tuple[str, str, str]]:
    """What stands at the top: name, figure, what it is held against."""
    took = f"{cards.cell(timed['child'], 'latency_ms', '{:,.0f}', timed['parent'])} ms a request" if timed else "beside the parent"
    tiles = [
        ("speed-up", f"{final['speedup']:.2f} ×", took),
        ("KL to the parent", f"{final['kl']:.3f}", f"± {final['kl_stderr']:.3f} nats a token"),
        ("perplexity", f"{final['perplexity']:.1f}", f"parent {parent['perplexity']:.1f}"),
        ("same next token", f"{final['top1_agreement']:.0%}", "of test tokens"),
        ("parameters", f"{final['num_params'] / parent['num_params']:.0%}", f"{final['num_params'] / 1e6:,.1f} M left"),
    ]
    if "accuracy_retained" in final:
        error = final["accuracy_retained_stderr"]
        tiles.insert(1, ("accuracy retained", f"{final['accuracy_retained']:.1%}", f"± {error:.1%}, over chance"))
    return tiles


def _cell(row: dict[str, float], key: str, form: str) -> str:
    """A figure with its standard error, where the row has one; "" where it has no such figure."""
    if key not in row:
        return ""
    error = row.get(f"{key}_stderr")
    return form.format(row[key]) + (f" ± {form.format(error)}" if error else "")


def _totals(metrics: dict[str, dict], timed: dict[str, dict]) -> list[tuple[str, list[str]]]:
    """Every figure of every row; a time only beside the parent's of the same measurement."""
    table, names = [], [name for name in ROWS if name in metrics]
    for key in ORDER:
        if key in CLOCKED:
            pairs = (timed.get(name, {"parent": None, "child": {}}) for name in names)
            cells = [cards.cell(pair["child"], key, FORMATS[key][1], pair["parent"]) for pair in pairs]
        else:
            cells = [_cell(metrics[name], key, FORMATS[key][1]) for name in names]
        if any(cells):
            table.append((FORMATS[key][0], cells))
    return table


def _tasks(metrics: dict[str, dict]) -> list[tuple[str, list[str]]]:
    """Accuracy on each task: chance, and parent and children; the share that is retained in the last row."""
    rows = [metrics[name] for name in ("parent", *CHILDREN) if name in metrics]
    tasks = [key.removesuffix("_chance") for key in rows[0] if key.endswith("_chance")]
    table = [
        (task, [f"{rows[0][f'{task}_chance']:.3f}", *(_cell(row, f"{task}_accuracy", "{:.3f}") for row in rows)]) for task in tasks
    ]
    return [*table, ("retained, over chance", ["", *(_cell(row, "accuracy_retained", "{:.1%}") for row in rows)])] if tasks else []


def _domains(metrics: dict[str, dict]) -> list[tuple[str, list[str]]]:
    """KL of the children, then perplexity of parent and children, on each domain."""
    rows = [metrics[name] for name in ("parent", *CHILDREN) if name in metrics]
    domains = [key.removeprefix("perplexity_") for key in metrics["parent"] if key.startswith("perplexity_")]
    table = []
    for domain in domains:
        kls = [_cell(row, f"kl_{domain}", "{:.3f}") for row in rows[1:]]
        table.append((domain, kls + [_cell(row, f"perplexity_{domain}", "{:.1f}") for row in rows]))
    return table


def _predictions(metrics: dict[str, dict], children: list[str]) -> list[tuple[str, list[str]]]:
    """What search predicted, and by how much what was measured is off."""
    table = []
    for key in without_times(dict.fromkeys(ORDER)):
        predicted = metrics["predicted"].get(key)
        if predicted is None or key not in metrics["child"]:
            continue
        cells = [FORMATS[key][1].format(predicted)]
        for name in children:
            value = metrics[name][key]
            off = value / predicted - 1 if predicted else math.nan
            cells.append(FORMATS[key][1].format(value) + (f" ({off:+.1%})" if math.isfinite(off) else ""))
        table.append((FORMATS[key][0], cells))
    return table
