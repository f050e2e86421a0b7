"""What `make run` gave: the README's table, from the metrics that the pipeline wrote.

    python -m benchmarks.demo     # after `make run`; prints the table, writes docs/results/demo.json and the README

Quality is over held-out text, latencies are medians of requests to parent and child in turn, in one process.
"""
import json
import platform
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "parent": "parent",
    "predicted": "child, as search predicted",
    "child": "child, before distillation",
    "distilled": "child, after distillation",
}
COLUMNS = {
    "speedup": ("speed-up", "{:.2f} ×"),
    "latency_ms": ("latency, ms", "{:,.0f}"),
    "throughput_tokens_per_s": ("tokens/s", "{:.1f}"),
    "memory_mib": ("memory, MiB", "{:,.0f}"),
    "num_params": ("parameters", "{:,.0f}"),
    "kl": ("KL to the parent", "{:.3f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "top1_agreement": ("same next token", "{:.0%}"),
}


def machine() -> str:
    """The processor's name, from the kernel, else from Python."""
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def table(metrics: dict[str, dict]) -> str:
    lines = ["| | " + " | ".join(name for name, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, title in ROWS.items():
        cells = [form.format(metrics[row][key]) if key in metrics[row] else "" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_into_readme(section: str, text: str) -> None:
    """Replace what stands between the README's markers of `section`."""
    readme = (ROOT / "README.md").read_text()
    start, end = f"<!-- {section}:", f"<!-- /{section} -->"
    head, rest = readme.split(start)
    comment, tail = rest.split("-->", 1)[0], rest.split(end)[1]
    (ROOT / "README.md").write_text(f"{head}{start}{comment}-->\n{text}\n{end}{tail}")


def main() -> None:
    metrics = {row: json.loads((ROOT / f"data/metrics/{row}.json").read_text()) for row in ROWS}
    solution = json.loads((ROOT / "data/solution.json").read_text())
    presets = yaml.safe_load((ROOT / "params.yaml").read_text())["use"]
    versions = {name: version(name) for name in ("torch", "transformers", "ortools")}
    result = {
        "command": "make run && python -m benchmarks.demo",
        "machine": machine(),
        "versions": versions,
        "presets": presets,
        "scenario": solution["scenario"],
        "constraints": {c["name"]: c["limit"] for c in solution["constraints"]},
        "metrics": metrics,
    }
    (ROOT / "docs" / "results").mkdir(parents=True, exist_ok=True)
    (ROOT / "docs" / "results" / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    limits = ", ".join(f"{c['name']} {c['limit']:g}" for c in solution["constraints"])
    caption = (
        f"Parent {presets['parent']}, asked for {limits}, workload {result['scenario']} (batch, prompt, generated tokens), "
        f"on {result['machine']}; torch {versions['torch']}. Written by `python -m benchmarks.demo` after `make run`."
    )
    text = f"{table(metrics)}\n\n{caption}"
    print(text)
    write_into_readme("results", text)


if __name__ == "__main__":
    main()
