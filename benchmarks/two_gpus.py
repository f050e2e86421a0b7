"""How BLD, scoring and GKD scale over GPUs, and whether several processes come to what one does.

    python -m benchmarks.two_gpus                                                   # 1 GPU, then 2, both geometries
    python -m benchmarks.two_gpus --parents pico --seq-len 64 --batch-size 4        # processes on a CPU, over gloo

Weights are random, so the increase of the LM loss is not scored: it is zero within noise. BLD and scoring of a large geometry take
its lowest `--layers` layers: a parent of that many. Everything is done twice in each number of processes and timed the second time,
so compiling is not in it; a time is that of the slowest process, from all ready to the table. GKD is timed over its last steps, the
same batch divided over the processes, in shards (FSDP2) where there are several GPUs; on one GPU a geometry that needs more than there
is is not run. NVLink multicast stays off. Each figure is printed, and docs/results/two_gpus.json written, as soon as it is known.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from benchmarks.demo import ROOT
from benchmarks.gkd import WARMUP, random_child, timed
from benchmarks.machine import RandomTokens, emptied, now, peak_gib, random_parent, write_results
from puzzle_core import bld, gkd, ranks, scoring, tables
from puzzle_core.files import write_json
from puzzle_core.launcher import is_launched
from puzzle_core.parents import Parent, pick_device
from puzzle_core.plan import BYTES_PER_TRAINED
from puzzle_core.shards import GIB, num_bytes
from puzzle_core.subblocks import resolve_layers

MINIMA = {"bld": 1.85, "score": 1.85, "gkd": 1.7}


def seconds(mine: ranks.Ranks, device: torch.device, work) -> tuple[float, object]:
    """Of `work()` in all processes, begun together; and what it returns."""
    mine.wait()
    start = now(device)
    result = work()
    mine.wait()
    return now(device) - start, result


def layers_of(options: argparse.Namespace) -> dict[str, int]:
    """Of each parent, how many layers BLD and scoring take; one number is for all."""
    names, numbers = options.parents.split(","), list(map(int, options.layers.split(",")))
    return dict(zip(names, numbers * len(names) if len(numbers) == 1 else numbers, strict=True))


def library_and_scores(name: str, options: argparse.Namespace, mine: ranks.Ranks, device: torch.device, folder: Path):
    """BLD of the paper's space, then scores of what it made: figures of each, and their tables in `folder`."""
    on_gpu, tokens = device.type == "cuda", options.seq_len * options.batch_size
    parent = random_parent(name, "bfloat16" if on_gpu else "float32", device, layers_of(options)[name])
    corpus, blocks = RandomTokens(parent.model.config.vocab_size), folder / "blocks"
    space = yaml.safe_load((ROOT / "conf/search_space/paper.yaml").read_text())
    settings = bld.Settings(
        options.seq_len, options.batch_size, 2 * tokens, options.steps * tokens, tokens, [0.001, 0.1], 1e-4, 0.1, 0.0, 1.0, compile=on_gpu
    )
    jobs = bld.jobs(parent, resolve_layers(space, parent.model.config, parent.family), settings, 0, corpus)
    for _ in range(2):
        mine.wait()
        if mine.first:
            shutil.rmtree(blocks, ignore_errors=True)
        emptied(device)
        took_s, (library, _) = seconds(mine, device, lambda: bld.train_library(parent, jobs, corpus, settings, 0, blocks, mine))
    yield "bld", library, {"seconds": took_s, "layers": len(parent.layers), "peak_gib": peak_gib(device)}
    if "score" not in options.parts.split(","):
        return
    metrics, at_once = ["kl", "cosine_distance"], 8 if on_gpu else 1
    how = scoring.Settings(2 * tokens, options.seq_len, options.batch_size, metrics, None, at_once, min(4096, tokens), None, on_gpu)
    none = pd.DataFrame(columns=list(tables.SCHEMAS["scores"].columns))
    for _ in range(2):
        emptied(device)
        took_s, (scores, _) = seconds(
            mine, device, lambda: scoring.score_library(parent, library, blocks, corpus, how, none, lambda rows: None, mine)
        )
    yield "score", scores, {"seconds": took_s, "layers": len(parent.layers), "peak_gib": peak_gib(device)}


def healing(name: str, options: argparse.Namespace, mine: ranks.Ranks, device: torch.device) -> dict:
    """GKD of a child of the whole geometry: seconds a step, the slowest process'; or what it would need."""
    parent: Parent = random_parent(name, "bfloat16" if device.type == "cuda" else "float32", device)
    if mine.world_size == 1 and device.type == "cuda":
        least, there = num_bytes(parent.model) * (1 + BYTES_PER_TRAINED / 2 * 0.75), torch.cuda.mem_get_info(device)[1]
        if least > there:  # a child of three quarters of the parent's parameters, its optimizer and the parent
            return {"needs_gib": least / GIB, "gpu_gib": there / GIB}
    with tempfile.TemporaryDirectory() as directory:
        child = random_child(parent, Path(directory))
    emptied(device)
    num_steps = WARMUP + options.gkd_steps
    sequences = np.random.default_rng(0).integers(1, parent.model.config.vocab_size, (options.gkd_batch_size * num_steps, options.seq_len))
    settings = gkd.Settings(
        options.seq_len, options.gkd_batch_size, sequences.size, 1e-5, 0.1, 0.0, 1.0, 1.0, 1.0, None,
        log_every_steps=100, gradient_checkpointing=name == "llama-3.1-8b", shard=mine.world_size > 1 and device.type == "cuda",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, timed(device) as clock:
        gkd.distill(parent.model, child, list(sequences), settings, 0, Path(directory), ranks=mine)
    return {"seconds": max(mine.gather([clock.step_s])), "peak_gib": clock.peak_bytes and clock.peak_bytes / GIB}


def worker(options: argparse.Namespace) -> None:
    """One of the processes: rank 0 writes each figure and table into `options.folder`."""
    with ranks.joined() as mine:
        device = mine.device(pick_device())
        if device.type == "cpu":
            torch.set_num_threads(1)

        def say(part: str, table: pd.DataFrame | None, figures: dict) -> None:
            if mine.first:
                path = f"{options.folder}/{name}-{part}-{mine.world_size}"  # no with_suffix: names have dots
                if table is not None:
                    table.to_parquet(f"{path}.parquet")
                write_json(f"{path}.json", figures)
                print(f"{name}, {part}, {mine.world_size} processes: {figures}", flush=True)

        for name in options.parents.split(","):
            if {"bld", "score"} & set(options.parts.split(",")):
                folder = Path(options.folder) / f"{name}-{mine.world_size}"
                for part, table, figures in library_and_scores(name, options, mine, device, folder):
                    say(part, table, figures)
            if "gkd" in options.parts.split(","):
                emptied(device)
                say("gkd", None, healing(name, options, mine, device))
            emptied(device)


def difference(part: str, one: pd.DataFrame, several: pd.DataFrame) -> dict:
    """Where the table of several processes differs most from that of one: the row, both values, and the share of the one's."""
    columns = {"bld": ["loss_before", "loss_after"], "score": ["value"]}[part]
    keys = [column for column in ("layer", "subblock", "variant", "metric") if column in one]
    keys += [column for column in ("init", "outcome") if column in one]
    assert one[keys].equals(several[keys]), f"the rows of {part} differ"
    share = ((one[columns] - several[columns]).abs() / one[columns].abs().clip(lower=1e-6)).max(axis=1)
    if not share.any():
        return {"share": 0.0}
    row = share.idxmax()
    values = {"one": one.loc[row, columns].tolist(), "several": several.loc[row, columns].tolist()}
    return {"share": float(share[row]), **one.loc[row, keys].astype(str).to_dict(), **values}


def main(arguments: list[str] | None = None) -> dict:
    on_gpu, begun = pick_device().type == "cuda", time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", default="llama-3.2-1b,llama-3.1-8b" if on_gpu else "pico", help="geometries of benchmarks/machine.py")
    parser.add_argument("--parts", default="bld,score,gkd", help="score makes the library that it scores: bld with it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step of BLD and a batch of scoring")
    parser.add_argument("--steps", type=int, default=12, help="of BLD")
    parser.add_argument("--layers", default="8", help="of each parent in BLD and scoring, or of all; 0: all")
    parser.add_argument("--gkd-batch-size", type=int, default=8, help="sequences a step, of all processes")
    parser.add_argument("--gkd-steps", type=int, default=6, help="that are timed")
    parser.add_argument("--result", default="two_gpus", help="the file in docs/results/")
    parser.add_argument("--folder", help="where processes leave what they found; made by the first")
    options = parser.parse_args(arguments)
    if is_launched():
        return worker(options)
    results: dict = {"asked": vars(options), "figures": {}}
    asked = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items() if key != "folder"]
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, options.processes):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
            command = [*torchrun, "-m", "benchmarks.two_gpus", *asked, f"--folder={folder}"]
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "NCCL_NVLS_ENABLE": "0"})
            running = True
            try:
                while running:
                    running = process.poll() is None
                    if read_all(Path(folder), results["figures"], world_size, begun):
                        write_results("two_gpus", results, pick_device(), options.result)
                    time.sleep(0.5)
            finally:
                process.terminate()  # torchrun, which ends its workers within half a minute
                process.wait(timeout=60)
            if process.returncode:
                raise SystemExit(f"{world_size} processes failed; what was measured before is in docs/results/{options.result}.json")
    print(f"written: docs/results/{options.result}.json")
    return results


def read_all(folder: Path, figures: dict, world_size: int, begun: float) -> bool:
    """Take in what the processes have left since; whether there was anything."""
    new = [path for path in sorted(folder.glob(f"*-{world_size}.json")) if path.stem not in figures]
    for path in new:
        name, part, _ = path.stem.rsplit("-", 2)
        figures[path.stem] = found = json.loads(path.read_text())
        alone = figures.get(f"{name}-{part}-1", {})
        if world_size > 1 and "seconds" in alone:
            found |= {"times_one": alone["seconds"] / found["seconds"], "minimum": MINIMA[part]}
            if part != "gkd":
                both = (pd.read_parquet(folder / f"{name}-{part}-{number}.parquet") for number in (1, world_size))
                found["largest_difference"] = difference(part, *both)
        print(f"{time.perf_counter() - begun:6.1f} s  {path.stem}: {found}", flush=True)
    return bool(new)


if __name__ == "__main__":
    main()
