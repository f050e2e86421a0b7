"""Predicted against realised: what the costs table says an architecture takes, and what its child takes when it is served whole.

    python -m benchmarks.costs                           # CPU: the embedded parent, one thread. GPU: random weights of two geometries
    python -m benchmarks.costs --parents pico --out none # small, writes nothing

Costs are measured as `profile-hardware` does. Architectures are a frontier of the search on synthetic scores, and random ones;
none of them was measured before. Each child is built, served whole requests in turn with the parent, and compared with what the table
predicts at the parent's pace: turn by turn, times are scaled by what the parent takes in that turn over what the table says that it
takes, since a machine that others share is not as fast now as it was then. So the error of the latency, the median over turns, is
that of the speed-up. The scale is fitted on the parent alone; `as_priced` is without.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from benchmarks.demo import ROOT, write_into
from benchmarks.machine import random_parent, write_results
from puzzle_core import costs, search, tables
from puzzle_core.children import make_child, random_weights
from puzzle_core.files import read_json
from puzzle_core.parents import Parent, load_parent, pick_device
from puzzle_core.problem import Problem
from puzzle_core.serving import side_by_side
from puzzle_core.spec import PARENT, SUBBLOCKS, Architecture, Scenario, Variant
from puzzle_core.subblocks import resolve_space

JUDGED = ("latency_ms", "throughput_tokens_per_s", "memory_mib")
SHOWN = (*JUDGED, "prefill_ms", "decode_ms")
PACE_EXPONENT = {"latency_ms": 1, "prefill_ms": 1, "decode_ms": 1, "throughput_tokens_per_s": -1, "memory_mib": 0}
LIMITS = {"median": 0.05, "worst": 0.10}
DEFAULTS = {  # parents, workload, search space, how costs are measured, timed requests
    "cpu": (["smollm2-135m"], "b1p64g32", "demo", costs.Torch("cpu", repeats=6, decode_contexts=2), 7),
    "cuda": (["smollm2-135m", "llama-3.2-1b"], "b8p512g128", "paper", costs.Torch("cuda", repeats=7, warmup=2, decode_steps=8), 5),
}


def load(name: str, device: torch.device) -> Parent:
    """The embedded parent on a CPU; else random weights of that geometry, made where they are used."""
    if device.type == "cpu" and name == "smollm2-135m":
        return load_parent(**yaml.safe_load((ROOT / f"conf/parent/{name}.yaml").read_text()))
    return random_parent(name, "float32" if device.type == "cpu" else "bfloat16", device)


def synthetic_scores(space: dict[str, list[Variant]], num_layers: int, table: pd.DataFrame) -> pd.DataFrame:
    """A score for each layer and variant that grows with the parameters lost: what a search needs to have an opinion."""
    random = np.random.default_rng(0)
    params = table[table.metric == "num_params"].drop_duplicates(["subblock", "variant"]).set_index(["subblock", "variant"]).value
    rows = []
    for layer in range(num_layers):
        for subblock in SUBBLOCKS:
            for variant in space[subblock]:
                lost = 1 - params[subblock, str(variant)] / params[subblock, str(PARENT)]
                value = 0.0 if variant == PARENT else float((0.01 + lost) * random.lognormal(sigma=1.0))
                rows.append((layer, subblock, str(variant), "kl", value, 1, ""))
    return tables.check("scores", pd.DataFrame(rows, columns=list(tables.SCHEMAS["scores"].columns)))


def architectures(problem: Problem, space: dict[str, list[Variant]]) -> dict[str, Architecture]:
    """From heavy to light: along the frontier of the search, and drawn at random."""
    points = search.frontier(problem, {}, "speedup", points=7)[1:-1]
    chosen = {f"search, speedup {point.constraints[-1].limit:.2f}": point.architecture for point in points}
    random = np.random.default_rng(1)
    for share in (0.2, 0.4, 0.6, 0.8):
        def draw(subblock: str, share: float = share) -> Variant:
            others = [v for v in space[subblock] if v != PARENT]
            return others[random.integers(len(others))] if random.random() < share else PARENT

        chosen[f"random, {share:.0%} replaced"] = Architecture(tuple(tuple(draw(s) for s in SUBBLOCKS) for _ in range(problem.num_layers)))
    return chosen


def compared(predicted: dict, parent_predicted: dict, found: dict[str, dict]) -> dict:
    """What was predicted of an architecture beside what its child took, and the pace of the parent, by the median of the turns' ratios."""
    child, of_parent = found["child"], parent_predicted["latency_ms"]
    pace = child["speedup"] * child["latency_ms"] / of_parent
    rows: dict = {"pace": pace, "speedup": {"predicted": of_parent / predicted["latency_ms"], "realised": child["speedup"]}}
    for total in SHOWN:
        at_pace = predicted[total] * pace ** PACE_EXPONENT[total]
        rows[total] = {"as_priced": predicted[total], "predicted": at_pace, "realised": child[total]}
        rows[total] |= {"error": at_pace / child[total] - 1, "error_as_priced": predicted[total] / child[total] - 1}
    return rows


def told(row: dict) -> str:
    cells = [f"{total} {row[total]['predicted']:.4g} / {row[total]['realised']:.4g} ({row[total]['error']:+.1%})" for total in SHOWN]
    return f"{', '.join(cells)}; speed-up {row['speedup']['predicted']:.3g} / {row['speedup']['realised']:.3g}, pace {row['pace']:.3f}"


def spread_of(errors: list[float]) -> dict[str, float]:
    return {"median": statistics.median(errors), "worst": max(errors)}


def compare(name: str, device: torch.device, scenario: Scenario, preset: str, backend: costs.Torch, requests: int) -> dict:
    """Profile one parent, then build and time a child of each architecture."""
    start = time.perf_counter()
    parent = load(name, device)
    space = resolve_space(yaml.safe_load((ROOT / f"conf/search_space/{preset}.yaml").read_text()), parent.model.config, parent.family)
    table, made = costs.profile(parent, space, [scenario], backend, tables.read_known("costs"))
    table = tables.check("costs", table)
    profile_s = time.perf_counter() - start
    print(f"{name}: {made} costs for {scenario} on {table.hardware[0]} in {profile_s:.0f} s", flush=True)
    times = table[table.unit == "ms"]
    print(times.assign(ms=[f"{v:.4f} ± {s:.4f}" for v, s in zip(times.value, times.spread, strict=True)]).pivot(
        index=["subblock", "variant"], columns="metric", values="ms"), flush=True)  # fmt: skip
    problem = Problem.from_tables(synthetic_scores(space, len(parent.layers), table), table, "kl", str(scenario))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        weights_of = random_weights(parent, Path(folder))
        for title, architecture in architectures(problem, space).items():
            child = make_child(parent, architecture, weights_of)
            found = side_by_side({"parent": parent.model, "child": child}, scenario, backend.serving, requests, warmup=1)
            rows[title] = compared(problem.totals(problem.rows_of(architecture)), problem.parent_totals, found)
            print(f"{title}: {told(rows[title])}", flush=True)
            del child
    summary = {
        key: {total: spread_of([abs(row[total][key]) for row in rows.values()]) for total in JUDGED} for key in ("error", "error_as_priced")
    }
    for total, found in summary["error"].items():
        verdict = "met" if all(found[key] <= limit for key, limit in LIMITS.items()) else "missed"
        priced = summary["error_as_priced"][total]
        print(f"{name} {total}: median error {found['median']:.1%}, worst {found['worst']:.1%} (5 %, 10 %: {verdict}); "
              f"as priced {priced['median']:.1%}, {priced['worst']:.1%}", flush=True)  # fmt: skip
    return {
        "parent": name,
        "hardware": table.hardware[0],
        "scenario": str(scenario),
        "profile_s": profile_s,
        "seconds": time.perf_counter() - start,
        "parent_predicted": problem.parent_totals,
        **summary,
        "architectures": rows,
        "costs": times[["subblock", "variant", "metric", "value", "spread"]].to_dict("records"),
    }


def write_table() -> None:
    """The errors in docs/costs.md, of every machine that there is a result of."""
    lines = ["| parent, workload | on | architectures | latency | as priced | throughput | as priced | memory |", "|---" * 8 + "|"]
    for path in sorted((ROOT / "docs/results").glob("costs_*.json")):
        for found in read_json(path)["figures"]:
            both = [found["error"], found["error_as_priced"]]
            cells = [f"{some[total]['median']:.1%}, {some[total]['worst']:.1%}" for total in JUDGED for some in both][:-1]
            start = [f"{found['parent']}, {found['scenario']}", found["hardware"], str(len(found["architectures"]))]
            lines.append(f"| {' | '.join(start + cells)} |")
    asked = f"asked for are {LIMITS['median']:.0%} and {LIMITS['worst']:.0%}"
    limits = f"Median error and worst error, of times at the parent's pace and as priced; {asked}."
    write_into("docs/costs.md", "costs", "\n".join([*lines, "", limits]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--serving", default="auto")
    parser.add_argument("--parents", nargs="+", help="geometries of benchmarks/machine.py")
    parser.add_argument("--workload", help="a scenario id, e.g. b8p512g128")
    parser.add_argument("--space", help="a preset of conf/search_space/")
    parser.add_argument("--out", help="none: write no result")
    given = parser.parse_args()
    device = pick_device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    parents, workload, space, backend, requests = DEFAULTS[device.type]
    backend = costs.Torch(**{**vars(backend), "serving": given.serving})
    found = []
    for name in given.parents or parents:
        scenario = Scenario.parse(given.workload or workload)
        found.append(compare(name, device, scenario, given.space or space, backend, requests))
        if given.out != "none":  # after each, so that a run cut short leaves what it has
            write_results("costs", found, device, "costs_gpu" if device.type == "cuda" else "costs_cpu")
            write_table()


if __name__ == "__main__":
    main()
