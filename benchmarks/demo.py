"""What `make run` gave: the README's table, from the metrics that the pipeline wrote.

    python -m benchmarks.demo     # after `make run`; prints the table, writes docs/results/demo.json and the README

Quality is over the corpus's test split. Latencies are medians of requests to parent and child in turn, in one process. The machine was
not as fast when the costs or the other child were measured, so each latency stands beside the parent's of the same process only.
"""
import json
import platform
from importlib.metadata import version
from pathlib import Path

import yaml

from puzzle_core import cards
from puzzle_core.evaluation import RECORD
from puzzle_core.files import read_json
from puzzle_core.spec import Solution

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "parent": "parent",
    "predicted": "child, as search predicted",
    "child": "child, before distillation",
    "distilled": "child, after distillation",
}


def machine() -> str:
    """The processor's name, from the kernel, else from Python."""
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def table(metrics: dict[str, dict], timed: dict[str, dict]) -> str:
    """The README's table of rows of metrics and, by the same names, of what parent and child took when they were measured together."""
    rows = {title: {**metrics[row], **timed.get(row, {"child": {}})["child"]} for row, title in ROWS.items()}
    return cards.table(rows, {ROWS[row]: pair["parent"] for row, pair in timed.items()})


def save_result(name: str, result: dict) -> Path:
    """Write docs/results/NAME.json."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=float) + "\n")
    return path


def write_into(page: str, section: str, text: str) -> None:
    """Replace what stands between the markers of `section` in a page of the project."""
    path = ROOT / page
    start, end = f"<!-- {section}:", f"<!-- /{section} -->"
    head, rest = path.read_text().split(start)
    comment, tail = rest.split("-->", 1)[0], rest.split(end)[1]
    path.write_text(f"{head}{start}{comment}-->\n{text}\n{end}{tail}")


def main() -> None:
    metrics = {row: read_json(ROOT / f"data/metrics/{row}.json") for row in ROWS}
    timed = {row: read_json(ROOT / "data" / row / RECORD) for row in ("child", "distilled")}
    solution = Solution.from_json(read_json(ROOT / "data/chosen.json"))
    presets = yaml.safe_load((ROOT / "params.yaml").read_text())["use"]
    versions = {name: version(name) for name in ("torch", "transformers", "ortools")}
    result = {
        "command": "make run && python -m benchmarks.demo",
        "machine": machine(),
        "versions": versions,
        "presets": presets,
        "scenario": str(solution.scenario),
        "constraints": list(map(str, solution.constraints)),
        "metrics": metrics,
        "timed": timed,
    }
    save_result("demo", result)
    limits = ", ".join(result["constraints"])
    caption = (
        f"Parent {presets['parent']}, asked for {limits}, workload {result['scenario']} (batch, prompt, generated tokens), "
        f"on {result['machine']}; torch {versions['torch']}. Each pair of "
        f"times is of one process. {cards.SPEEDUP} Written by `python -m benchmarks.demo` after `make run`."
    )
    text = f"{table(metrics, timed)}\n\n{caption}"
    print(text)
    write_into("README.md", "results", text)


if __name__ == "__main__":
    main()
