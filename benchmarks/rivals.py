"""What the rivals' children really lose: the joint KL of each method's choice, beside the sum of scores that was predicted.

    python -m benchmarks.rivals      # after `make run`; writes docs/results/rivals.json, and the table in docs/search.md

The constraints are those of params.yaml, the tables and the library those of data/, or of the folder given by --data.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.demo import ROOT, machine, save_result, write_into
from puzzle_core.spec import Solution


def measured(data: Path) -> list[dict]:
    """The entries of rivals.json, each with the joint KL of its child (None where there is no architecture)."""
    with tempfile.TemporaryDirectory() as folder:
        where = [f"data={data}", f"out={folder}", f"hydra.run.dir={folder}"]
        for stage, more in (("rivals", []), ("realised", [f"architectures=[{folder}/rivals.json]"])):
            subprocess.run([sys.executable, "-m", f"stages.{stage}", *where, *more], cwd=ROOT, check=True)
        entries, rows = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("rivals", "realised"))
    joint_kl = {row["name"]: row["realised"] for row in rows}
    return [{**entry, "joint_kl": joint_kl.get(entry["method"])} for entry in entries]


def table(entries: list[dict], parent_ms: float) -> str:
    """As Markdown, least joint KL first; those that found nothing that fits say so at the end."""
    lines = ["| method | score predicted | above the MIP's | joint KL of the child | speed-up predicted | seconds |", "|---" * 6 + "|"]
    for entry in sorted(entries, key=lambda entry: (entry["joint_kl"] is None, entry["joint_kl"])):
        name = entry["method"].replace("_", " ")
        if entry["joint_kl"] is None:
            lines.append(f"| {name} | nothing that fits | | | | {entry['seconds']:.1f} |")
            continue
        cells = [f"{entry['score']:.3f}", f"{entry['gap']:.2%}", f"{entry['joint_kl']:.3f}", f"{parent_ms / entry['latency_ms']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {entry['seconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    data = parser.parse_args().data.resolve()
    solution, entries = Solution.from_json(json.loads((data / "solution.json").read_text())), measured(data)
    about = {
        "command": "make run && python -m benchmarks.rivals", "machine": machine(), "scenario": str(solution.scenario),
        "constraints": list(map(str, solution.constraints)), "priced": f"{entries[0]['source']} costs of {entries[0]['hardware']}",
    }  # fmt: skip
    save_result("rivals", {**about, "entries": entries})
    caption = f"Asked for {', '.join(about['constraints'])} on {about['scenario']}; {about['priced']}."
    text = f"{table(entries, solution.parent_totals['latency_ms'])}\n\n{caption}"
    print(text)
    write_into("docs/search.md", "rivals", text)


if __name__ == "__main__":
    main()
