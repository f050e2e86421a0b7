"""How fast blockwise distillation is: against the naive loop, and against what the chip can multiply.

    python -m benchmarks.bld                      # on a GPU: both geometries of the table in the docs, about four minutes
    python -m benchmarks.bld --parents pico --seq-len 64 --batch-size 4
    python -m benchmarks.bld --parents llama-3.1-8b --whole-layers 32 --whole-steps 6 --layers-sampled 1 --no-naive --memory-gib 125 \
        --result bld_8b

The naive loop is what one writes first: a forward pass of the parent with hooks, then for each layer and variant its own
forward, backward and AdamW step. It is run for the first parent named. All train the same variants on the same tokens;
weights are random, which times do not see. A step's time is that of sampled layers times the number of layers; compiling
and the first steps are not in it. Each figure is printed, and docs/results/bld.json written, as soon as it is known.
With `--whole-steps` the run that memory is measured in is planned for 20,971,520 tokens, and cut short after that many steps of
each window: what fits a GPU is then what a real run takes, in a few minutes.
"""
import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.demo import ROOT
from benchmarks.machine import RandomTokens, bytes_per_s, emptied, matmul_flops_per_s, now, peak_gib, random_parent, write_results
from puzzle_core import bld
from puzzle_core.learners import is_trained, normalised_mse
from puzzle_core.parents import Parent, pick_device
from puzzle_core.plan import plan
from puzzle_core.shards import GIB
from puzzle_core.spec import SUBBLOCKS
from puzzle_core.subblocks import build_subblock, resolve_space
from puzzle_core.trace import ParentRun, first
from puzzle_core.windows import Captured, Window


def naive_step_s(parent: Parent, space: dict, settings: bld.Settings, repeats: int) -> float:
    """Seconds a step of the naive loop over all layers, computing in the parent's dtype with float32 weights."""
    device, corpus = parent.device, RandomTokens(parent.model.config.vocab_size)
    modules = {
        (layer, s, str(v)): build_subblock(parent, layer, s, v).float().requires_grad_(True)
        for layer in range(len(parent.layers)) for s in SUBBLOCKS for v in space[s] if is_trained(v, closed_form=True)
    }  # fmt: skip
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    optimizers = {key: torch.optim.AdamW(module.parameters(), lr=1e-4) for key, module in modules.items()}
    batches = corpus.batches("train", settings.seq_len * settings.batch_size, settings.seq_len, settings.batch_size, "naive")
    run, times = ParentRun(parent, {"some": batches}), []
    for _ in range(repeats + 1):
        start = now(device)
        hidden = run.enter(torch.as_tensor(batches[0], device=device), 0)
        for layer, calls in run.through(range(len(parent.layers)), hidden):
            for key in [key for key in modules if key[0] == layer]:
                module, call = modules[key], calls[key[1]]
                optimizers[key].zero_grad()
                with call.autocast():
                    out = first(module(*call.args, **call.kwargs))
                normalised_mse(out, call.output_BTD).backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizers[key].step()
        times.append(now(device) - start)
    return statistics.median(times[1:])


def kernels(step, hidden_BTD: torch.Tensor) -> list[dict]:
    """Where the time of two steps goes: the kernels that take most, in milliseconds a step."""
    activities = [ProfilerActivity.CUDA if hidden_BTD.is_cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for _ in range(2):
            step(hidden_BTD)
        now(hidden_BTD.device)
    time_of = {e.key: (e.self_device_time_total if hidden_BTD.is_cuda else e.self_cpu_time_total) / 2000 for e in trace.key_averages()}
    count_of, total = {e.key: e.count / 2 for e in trace.key_averages()}, sum(time_of.values())
    most = sorted(time_of, key=time_of.get, reverse=True)[:25]
    return [{"ms": time_of[key], "share": time_of[key] / total, "calls": count_of[key], "kernel": key[:110]} for key in most]


def our_steps(parent: Parent, space: dict, settings: bld.Settings, num_sampled: int, repeats: int, profiled: bool) -> dict:
    """Seconds a step over all layers, and seconds to initialise and refit them, from layers sampled evenly."""
    corpus, device, num_layers = RandomTokens(parent.model.config.vocab_size), parent.device, len(parent.layers)
    jobs, steps, closed, seen = bld.jobs(parent, [space] * len(parent.layers), settings, 0, corpus), [], [], {}
    budgets = {**settings.budgets, "train": settings.seq_len * settings.batch_size}
    batches = {use: corpus.batches(use, tokens, settings.seq_len, settings.batch_size, use) for use, tokens in budgets.items()}
    begun = now(device)
    with tempfile.TemporaryDirectory() as directory:
        for layer in sorted({index * num_layers // num_sampled for index in range(num_sampled)}):
            emptied(device)
            run, start = ParentRun(parent, batches), now(device)
            window = Window(run, range(layer, layer + 1), [j for j in jobs if j.layer == layer], settings, repeats, Path(directory))
            closed.append(now(device) - start)
            window.optimizer = window.make_optimizer()
            step = Captured(window.step) if device.type == "cuda" else window.step
            hidden, times = run.hidden["train"][0], []
            for _ in range(6 if device.type == "cuda" else 1):  # compiles, captures
                step(hidden)
            for _ in range(repeats):
                start = now(device)
                step(hidden)
                times.append(now(device) - start)
            steps.append(statistics.median(times))
            if profiled and not seen:
                seen = {"kernels_of_a_layer": kernels(step, hidden)}
            del window, step, run
    emptied(device)
    took = {"step_s": statistics.mean(steps) * num_layers, "closed_form_s": statistics.mean(closed) * num_layers}
    return {**took, "measuring_s": now(device) - begun, **seen}


class CutShort(RandomTokens):
    """No more than `most` batches, however many are asked for."""

    def __init__(self, vocab_size: int, most: int):
        super().__init__(vocab_size)
        self.most = most

    def batches(self, split: str, num_tokens: int, seq_len: int, batch_size: int, seed: str) -> list[np.ndarray]:
        return super().batches(split, min(num_tokens, self.most * seq_len * batch_size), seq_len, batch_size, seed)


def whole_run(parent: Parent, space: dict, settings: bld.Settings, num_layers: int, num_steps: int | None) -> dict:
    """All of `train_library` for the lowest layers: its time and its peak memory beside what the plan says.

    On the short budget of `settings`, or the first `num_steps` of a real one.
    """
    corpus, device = RandomTokens(parent.model.config.vocab_size), parent.device
    if num_steps:
        corpus, settings = CutShort(corpus.vocab_size, num_steps), replace(settings, train_tokens=20_971_520)
    jobs = [job for job in bld.jobs(parent, [space] * len(parent.layers), settings, 0, corpus) if job.layer < num_layers]
    expected = plan(parent, bld.wanted_of(jobs), settings)
    emptied(device)
    with tempfile.TemporaryDirectory() as directory:
        start = now(device)
        bld.train_library(parent, jobs, corpus, settings, 0, Path(directory) / "blocks")
        seconds = now(device) - start
    figures = {"layers": num_layers, "windows": len(expected.windows), "seconds": seconds, "planned_gib": expected.peak_bytes / GIB}
    peak = peak_gib(device)
    return {**figures, "peak_gib": peak, "peak_over_plan": peak and peak * GIB / expected.peak_bytes}


def main(arguments: list[str] | None = None) -> dict:
    device = pick_device()
    on_gpu, begun = device.type == "cuda", time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", default="smollm2-135m,llama-3.2-1b" if on_gpu else "pico", help="geometries of benchmarks/machine.py")
    parser.add_argument("--space", default="conf/search_space/paper.yaml")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers-sampled", type=int, default=2)
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True, help="time the naive loop too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of a step")
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--whole-layers", type=int, help="that are trained to the end, for the peak of memory; default: as many as sampled")
    parser.add_argument("--whole-steps", type=int, help="of a real budget, of each window; default: a short budget, to its end")
    parser.add_argument("--result", default="bld", help="name of the file in docs/results/")
    options = parser.parse_args(arguments)
    tokens = options.seq_len * options.batch_size
    dtypes = ("bfloat16", "float32") if on_gpu else ("float32",)
    rate = {dtype: matmul_flops_per_s(device, getattr(torch, dtype)) for dtype in dtypes}
    bandwidth = bytes_per_s(device)
    results = {"asked": vars(options), "tokens_per_step": tokens, "matmul_flops_per_s": rate, "bytes_per_s": bandwidth, "parents": {}}

    def say(name: str, what: str, figures: dict) -> None:
        """Print what was measured, and write all that is known so far."""
        results["parents"].setdefault(name, {})[what] = figures
        print(f"{time.perf_counter() - begun:6.1f} s  {name}, {what}:", end=" ")
        print(", ".join(f"{key} {value:,.4g}" for key, value in figures.items() if isinstance(value, (int, float))), flush=True)
        for kernel in figures.get("kernels_of_a_layer", []):
            print("          {ms:8.3f} ms {share:5.1%} {calls:5.0f} x  {kernel}".format(**kernel), flush=True)
        write_results("bld", results, device, options.result)

    def ours(name: str, parent: Parent, space: dict, settings: bld.Settings) -> float:
        """Measure our step, uncompiled or compiled; seconds."""
        dtype = str(parent.model.dtype).removeprefix("torch.")
        jobs = bld.jobs(parent, [space] * len(parent.layers), settings, 0, RandomTokens(2))
        a_step = plan(parent, bld.wanted_of(jobs), replace(settings, train_tokens=tokens))
        flops, profiled = a_step.training_flops + a_step.parent_flops, options.profile and settings.compile == options.compile
        took = our_steps(parent, space, settings, options.layers_sampled, options.repeats, profiled)
        step_s, floor_s = took["step_s"], flops / rate[dtype]
        floors = {"floor_s": floor_s, "floor_bytes_s": a_step.moved_bytes / bandwidth, "flops": flops}
        say(name, f"{dtype}{', compiled' * settings.compile}", {
            **took, "tokens_per_s": tokens / step_s, "utilisation": floor_s / step_s, "parent_share": a_step.parent_flops / flops, **floors,
        })  # fmt: skip
        return step_s

    rates = ", ".join(f"{dtype} {value / 1e12:,.4g} TFLOP/s" for dtype, value in rate.items())
    print(f"products {rates}, copies {bandwidth / 1e9:,.4g} GB/s, measured here", flush=True)
    for index, name in enumerate(options.parents.split(",")):
        step_s = {}
        with_naive = options.naive and index == 0
        for dtype in dtypes if with_naive else dtypes[:1]:
            parent = random_parent(name, dtype, device)
            space = resolve_space(yaml.safe_load((ROOT / options.space).read_text()), parent.model.config, parent.family)
            settings = bld.Settings(
                options.seq_len, options.batch_size, 8 * tokens, 20 * tokens, 2 * tokens, [0.001, 0.1], 1e-4, 0.1, 0.0, 1.0,
                compile=options.compile, memory_gib=options.memory_gib,
            )  # fmt: skip
            if dtype == dtypes[0]:
                step_s[dtype] = ours(name, parent, space, settings)
                if with_naive and options.compile:
                    ours(name, parent, space, replace(settings, compile=False))
                num_layers = min(options.whole_layers or options.layers_sampled, len(parent.layers))
                say(name, "memory", whole_run(parent, space, settings, num_layers, options.whole_steps))
            if with_naive:
                naive = naive_step_s(parent, space, settings, options.repeats)
                times = {f"{ours_in}_is_times_faster": naive / seconds for ours_in, seconds in step_s.items()}
                say(name, f"naive loop, {dtype}", {"step_s": naive, **times})
            del parent
            emptied(device)
    print(f"written: docs/results/{options.result}.json")
    return results


if __name__ == "__main__":
    main()
