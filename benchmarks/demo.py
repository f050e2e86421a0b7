"""What `make run` gave: the README's table, from the metrics that the pipeline wrote.

    python -m benchmarks.demo     # after `make run`; prints the table, writes docs/results/demo.json and the README

Quality is over held-out text, latencies are medians of requests to parent and child in turn, in one process.
"""
import json
import platform
from importlib.metadata import version
from pathlib import Path

import yaml

from puzzle_core import cards
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


def table(metrics: dict[str, dict]) -> str:
    return cards.table({title: metrics[row] for row, title in ROWS.items()})


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
    metrics = {row: json.loads((ROOT / f"data/metrics/{row}.json").read_text()) for row in ROWS}
    solution = Solution.from_json(json.loads((ROOT / "data/chosen.json").read_text()))
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
    }
    save_result("demo", result)
    limits = ", ".join(result["constraints"])
    caption = (
        f"Parent {presets['parent']}, asked for {limits}, workload {result['scenario']} (batch, prompt, generated tokens), "
        f"on {result['machine']}; torch {versions['torch']}. Written by `python -m benchmarks.demo` after `make run`."
    )
    text = f"{table(metrics)}\n\n{caption}"
    print(text)
    write_into("README.md", "results", text)


if __name__ == "__main__":
    main()
