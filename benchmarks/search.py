"""How fast the search proves its answers, beside CBC, and how close reinforcement learning comes.

    python -m benchmarks.search      # needs `pip install pulp`; writes docs/results/search.json, and the table in docs/search.md

The instances are synthetic, made here from a seed. The sample library is data/samples/ where there is one, else synthetic
too: scores and costs shaped like measured ones (docs/search.md), but of no model. Everything runs on one thread.
"""
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pulp

from benchmarks.demo import ROOT, machine, save_result, write_into
from puzzle_core import mip, rivals, search, tables
from puzzle_core.constraints import constraints_from
from puzzle_core.problem import Problem
from puzzle_core.spec import Scenario

SEEDS, BUDGETS, SPEEDUP = 5, 20, 1.5


def instance(num_layers: int, num_attention: int, num_ffn: int, seed: int, joint: bool) -> mip.Program:
    """Scores over four orders of magnitude from layer to layer; runtime and memory limited to 60 % of the parent's.

    `joint`: one row for each pair of an attention and an FFN option, whose score is not quite the sum of the two.
    """
    random = np.random.default_rng(seed)
    costs = [np.sort(random.uniform(0, size, n))[::-1] for n, size in zip((num_attention, num_ffn) * 2, (1, 2, 1, 4), strict=True)]
    for cost in costs:
        cost[-1] = 0.0  # no_op
    rows = []  # layer, half, score, runtime, memory
    for layer in range(num_layers):
        sizes = (num_attention, num_ffn)
        scores = [10 ** random.uniform(-4, 0) * np.arange(n) ** 1.5 / n * random.lognormal(0, 0.5, n) for n in sizes]
        if joint:
            total = np.add.outer(*scores) * random.lognormal(0, 0.1, sizes)
            runtime, memory = np.add.outer(costs[0], costs[1]), np.add.outer(costs[2], costs[3])
            rows += zip([layer] * total.size, [mip.BOTH] * total.size, total.ravel(), runtime.ravel(), memory.ravel(), strict=True)
        else:
            for half in (mip.FIRST, mip.SECOND):
                rows += zip([layer] * sizes[half], [half] * sizes[half], scores[half], costs[half], costs[2 + half], strict=True)
    layer_O, half_O, *values = map(np.array, zip(*rows, strict=True))
    parent = num_layers * np.array([costs[0][0] + costs[1][0], costs[2][0] + costs[3][0]])
    return mip.Program(layer_O, half_O, values[0], np.stack(values[1:]), 0.6 * parent)


def measured_like(num_layers: int, num_options: int, seed: int) -> mip.Program:
    """Joint blocks of a runtime that differs a little from layer to layer, as timings do; room for all of the parent."""
    random = np.random.default_rng(seed)
    runtime_V = np.linspace(1, 0.02, num_options)
    runtime_LV = runtime_V * random.normal(1, 0.01, (num_layers, num_options)).clip(0.9, 1.1)
    depth_L = np.linspace(-1, 1, num_layers)
    sensitivity_L = (0.3 + 1.5 * depth_L**4) * random.lognormal(0, 0.4, num_layers)
    score_LV = 0.1 * np.outer(sensitivity_L, (1 - runtime_V) ** 1.7) * random.lognormal(0, 0.15, (num_layers, num_options))
    score_LV[:, 0] = 0.0
    layer_O = np.repeat(np.arange(num_layers), num_options)
    halves = np.full(len(layer_O), mip.BOTH)
    return mip.Program(layer_O, halves, score_LV.ravel(), runtime_LV.reshape(1, -1), np.array([runtime_LV[:, 0].sum()]))


def sample_tables(num_layers: int = 30, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A synthetic library of the demo's shape: first and last layers matter most, larger cuts hurt more, with noise."""
    random = np.random.default_rng(seed)
    costs_of = {  # (size of the cut, prefill_ms, decode_ms, parameters, KV bytes)
        "attention": {
            "parent": (0, 2.6, 0.45, 9e5, 1536), "kv1": (0.4, 2.2, 0.38, 7e5, 512), "linear": (0.5, 0.9, 0.14, 3.3e5, 0),
            "no_op": (1, 0, 0, 0, 0),
        },
        "ffn": {
            "parent": (0, 4.4, 0.8, 2.7e6, 0), "w768": (0.35, 2.3, 0.43, 1.3e6, 0), "w384": (0.8, 1.3, 0.24, 6.6e5, 0),
            "no_op": (2, 0, 0, 0, 0),
        },
    }  # fmt: skip
    scores, costs = [], []
    depth_L = np.linspace(-1, 1, num_layers)
    for subblock, variants in costs_of.items():
        sensitivity_L = (0.3 + 1.2 * depth_L**4) * random.lognormal(0, 0.5, num_layers)
        for variant, (cut, prefill_ms, decode_ms, num_params, kv_bytes) in variants.items():
            for layer in range(num_layers):
                value = 0.1 * cut * sensitivity_L[layer] * random.lognormal(0, 0.25)
                scores.append((layer, subblock, variant, "kl", float(value), 16384, ""))
            costs += [(subblock, variant, prefill_ms, decode_ms, 4 * num_params, num_params, kv_bytes)]
    costs.append(("outside", "parent", 12.0, 9.0, 4 * 2.8e7, 2.8e7, 0))
    units = {"prefill_ms": "ms", "decode_ms": "ms", "param_bytes": "bytes", "num_params": "count", "kv_bytes_per_token": "bytes"}
    rows = [
        (subblock, variant, "b1p64g32", metric, float(value), unit, "analytic", "synthetic")
        for subblock, variant, *values in costs
        for (metric, unit), value in zip(units.items(), values, strict=True)
    ]
    of_scores, of_costs = (list(tables.SCHEMAS[name].columns) for name in ("scores", "costs"))
    return pd.DataFrame(scores, columns=of_scores), pd.DataFrame([(-1, *row) for row in rows], columns=of_costs)


def sample_library(folder: Path) -> tuple[Path, str]:
    """The folder of the sample library and what it is: data/samples/, or synthetic tables written to `folder`."""
    for scores in sorted((ROOT / "data" / "samples").rglob("scores.parquet")):
        if (scores.parent / "costs.parquet").exists():
            return scores.parent, str(scores.parent.relative_to(ROOT))
    for name, table in zip(("scores", "costs"), sample_tables(), strict=True):
        tables.write(name, table, folder / f"{name}.parquet")
    return folder, "synthetic, 30 layers of 4 + 4 variants"


def cbc(program: mip.Program, time_limit_s: float) -> tuple[float, float]:
    """Seconds that CBC through PuLP takes to the proven optimum, model included, and the score it finds."""
    start = time.perf_counter()
    problem, num_options = pulp.LpProblem(), len(program.weight_O)
    x = [pulp.LpVariable(f"x{row}", cat="Binary") for row in range(num_options)]
    problem += pulp.LpAffineExpression(zip(x, program.weight_O.tolist(), strict=True))
    for cell in program.cells:
        problem += pulp.lpSum(x[row] for row in cell) == 1
    for share_O, room in zip(program.share_KO, program.room_K, strict=True):
        problem += pulp.LpAffineExpression(zip(x, share_O.tolist(), strict=True)) <= float(room)
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=time_limit_s))
    seconds = time.perf_counter() - start
    return seconds, float(sum(weight for weight, choice in zip(program.weight_O, x, strict=True) if (choice.value() or 0) > 0.5))


def ours(program: mip.Program, time_limit_s: float) -> tuple[float, mip.Found]:
    start = time.perf_counter()
    found = mip.minimise(program, start + time_limit_s)
    return time.perf_counter() - start, found


def against_cbc(joint: bool) -> dict:
    """80 layers of 54 choices, both solvers in turn on the same instances."""
    seconds, theirs, proven, agree = [], [], [], []
    for seed in range(SEEDS):
        program = instance(80, 6, 9, seed, joint)
        spent, found = ours(program, 60)
        rival, score = cbc(program, 60)
        seconds.append(spent)
        theirs.append(rival)
        proven.append(found.proven)
        agree.append(found.weight <= score * (1 + 1e-9))
    middle, rival = statistics.median(seconds), statistics.median(theirs)
    return {
        "seconds": seconds, "cbc_seconds": theirs, "all_proven": all(proven), "never_worse_than_cbc": all(agree),
        "measured": f"{middle:.2f} s median, {max(seconds):.2f} s worst; CBC {rival:.2f} s, {rival / middle:.1f} × slower",
        "reached": all(proven) and all(agree) and max(seconds) <= 5 and rival >= 3 * middle,
    }  # fmt: skip


def joint_blocks() -> dict:
    program = measured_like(80, 16, seed=0)
    seconds, proven = [], []
    for fraction in np.linspace(0.5, 0.75, BUDGETS):
        spent, found = ours(replace(program, room_K=fraction * program.room_K), 60)
        seconds.append(spent)
        proven.append(found.proven)
    middle = statistics.median(seconds)
    measured = f"{middle:.2f} s median, {max(seconds):.2f} s worst; {sum(proven)} of {BUDGETS} proven"
    return {"seconds": seconds, "measured": measured, "reached": all(proven) and middle <= 1}


def largest() -> dict:
    runs = [ours(instance(126, 7, 9, seed, joint=True), 30) for seed in range(SEEDS)]
    gaps = [(found.weight - found.bound) / found.weight for _, found in runs]
    slowest = max(seconds for seconds, _ in runs)
    measured = f"gap {max(gaps):.4%} at worst, {slowest:.2f} s at worst; {sum(found.proven for _, found in runs)} of {SEEDS} proven"
    return {"seconds": [seconds for seconds, _ in runs], "gaps": gaps, "measured": measured, "reached": max(gaps) < 1e-4 and slowest <= 31}


def sample(folder: Path) -> tuple[Problem, list[str]]:
    scores, costs = (tables.read(name, folder / f"{name}.parquet") for name in ("scores", "costs"))
    at = Scenario.parse(costs["scenario"][0])
    overrides = [f"workload.{key}={getattr(at, key)}" for key in ("batch_size", "prompt_len", "generation_len")]
    return Problem.from_tables(scores, costs, "kl", str(at)), overrides


def frontier_of(problem: Problem) -> dict:
    start = time.perf_counter()
    points = search.frontier(problem, {}, "speedup", 50)
    seconds = time.perf_counter() - start
    proven = sum(point.status == "optimal" for point in points)
    return {"seconds": seconds, "measured": f"{seconds:.1f} s, {proven} of 50 proven", "reached": seconds <= 20 and proven == 50}


def process(folder: Path, overrides: list[str], out: Path) -> dict:
    where = [f"data={folder}", f"out={out}", f"hydra.run.dir={out}"]
    command = [sys.executable, "-m", "stages.search", *where, f"constraints.speedup={SPEEDUP}"]
    imports = [sys.executable, "-c", "import pandas, pandera, ortools"]
    seconds, floor = [], []
    for _ in range(SEEDS):
        for argv, spent in (([*command, *overrides], seconds), (imports, floor)):
            start = time.perf_counter()
            subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
            spent.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    measured = f"{middle:.1f} s median of {SEEDS}; `{imports[2]}` alone {statistics.median(floor):.1f} s"
    return {"seconds": seconds, "floor_seconds": floor, "measured": measured, "reached": middle <= 3}


def race(problem: Problem) -> dict:
    entries = rivals.compete(problem, constraints_from({"speedup": SPEEDUP}, problem), rivals.Settings())
    gap = {entry.method: entry.gap for entry in entries if entry.architecture is not None}
    ranked = sorted((value, method) for method, value in gap.items() if method != "mip")
    words = [f"{method} +{value:.2%}" for value, method in ranked] + [f"{e.method} finds none" for e in entries if e.architecture is None]
    measured = ", ".join(words).replace("_", " ")
    return {"gaps": gap, "measured": measured, "reached": gap["rl"] <= 0.01}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, what = sample_library(Path(temporary))
        problem, overrides = sample(folder)
        results = {
            "80 layers × (6 + 9) subblocks, two constraints: proven optimum": ("5 s, 3 × faster than CBC", against_cbc(joint=False)),
            "80 layers × 54 joint blocks, two constraints: proven optimum": ("5 s, 3 × faster than CBC", against_cbc(joint=True)),
            "80 layers × 16 joint blocks, measured-like costs, 20 budgets of 50 to 75 %": ("1 s median", joint_blocks()),
            "126 layers × 63 joint blocks, two constraints": ("gap under 0.01 % in 30 s", largest()),
            "frontier of 50 points, sample library": ("20 s", frontier_of(problem)),
            "`python -m stages.search`, sample library, start to exit": ("3 s", process(folder, overrides, Path(temporary) / "out")),
            f"score above the MIP's, sample library, speedup {SPEEDUP}": ("rl within 1 %", race(problem)),
        }
    lines = ["| what | minimum | measured | |", "|---|---|---|---|"]
    for name, (floor, found) in results.items():
        lines.append(f"| {name} | {floor} | {found['measured']} | {'✓' if found['reached'] else '✗'} |")
    text = "\n".join(lines)
    versions = {name: version(name) for name in ("ortools", "pulp", "numpy", "pandas")}
    result = {
        "command": "python -m benchmarks.search", "machine": machine(), "versions": versions, "sample_library": what,
        "results": {name: {"minimum": floor, **found} for name, (floor, found) in results.items()}, "table": text,
    }  # fmt: skip
    save_result("search", result)
    page = f"{text}\n\nSample library: {what}. {result['machine']}; ortools {versions['ortools']}, CBC of pulp {versions['pulp']}."
    print(page)
    write_into("docs/search.md", "search", page)


if __name__ == "__main__":
    main()
