"""How fast blockwise distillation is: against the naive loop, and against what the chip can multiply.

    python -m benchmarks.bld --parent smollm2-135m --space conf/search_space/paper.yaml
    python -m benchmarks.bld --parent llama-3.2-1b --no-naive

The naive loop is what one writes first: a forward pass of the parent with hooks, then for each layer and variant its own
forward, backward and AdamW step. Both train the same variants on the same tokens; weights are random, which times do not see.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn
from tqdm import tqdm

from benchmarks.demo import ROOT
from benchmarks.machine import matmul_flops_per_s, now, random_parent, write_results
from puzzle_core import bld
from puzzle_core.learners import is_trained, normalised_mse
from puzzle_core.parents import Parent, pick_device
from puzzle_core.plan import plan
from puzzle_core.spec import SUBBLOCKS
from puzzle_core.subblocks import build_subblock, resolve_space
from puzzle_core.trace import ParentRun
from puzzle_core.windows import Captured, Window


class RandomTokens:
    """Stands in for a corpus: as many token batches as asked for."""

    fingerprint = "random"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def batches(self, split: str, num_tokens: int, seq_len: int, batch_size: int, seed: str) -> list[np.ndarray]:
        generator = np.random.default_rng(len(seed))
        return [generator.integers(1, self.vocab_size, (batch_size, seq_len)) for _ in range(-(-num_tokens // (seq_len * batch_size)))]


def naive_step_s(parent: Parent, space: dict, batches: list, dtype: torch.dtype, repeats: int) -> float:
    """Seconds a step of the naive loop over all layers, computing in `dtype` with float32 weights."""
    device = parent.device
    modules = {
        (layer, s, str(v)): build_subblock(parent, layer, s, v).float().requires_grad_(True)
        for layer in range(len(parent.layers)) for s in SUBBLOCKS for v in space[s] if is_trained(v, closed_form=True)
    }  # fmt: skip
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    optimizers = {key: torch.optim.AdamW(module.parameters(), lr=1e-4) for key, module in modules.items()}
    run = ParentRun(parent, {"some": batches[:1]})
    times = []
    for index in range(repeats + 1):
        start = now(device)
        hidden = run.enter(torch.as_tensor(batches[index % len(batches)], device=device), 0)
        for layer, calls in run.through(range(len(parent.layers)), hidden):
            for (n, subblock, _), module in modules.items():
                if n != layer:
                    continue
                optimizer = optimizers[n, subblock, _]
                optimizer.zero_grad()
                call = calls[subblock]
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    out = module(*call.args, **call.kwargs)
                loss = normalised_mse(out[0] if isinstance(out, tuple) else out, call.output_BTD)
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
        times.append(now(device) - start)
    return float(np.median(times[1:]))


def peak_gib() -> float:
    """Most GPU memory in use since the last call."""
    if not torch.cuda.is_available():
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def our_steps(parent: Parent, space: dict, settings: bld.Settings, repeats: int) -> dict[str, float]:
    """Seconds a step over all layers, and seconds to initialise and refit them, from the first, middle and last layer."""
    corpus = RandomTokens(parent.model.config.vocab_size)
    jobs = bld.jobs(parent, [space] * len(parent.layers), settings, 0, corpus)
    budgets = {"calibration": settings.calibration_tokens, "val": settings.val_tokens, "train": settings.train_tokens}
    batches = {use: corpus.batches(use, tokens, settings.seq_len, settings.batch_size, use) for use, tokens in budgets.items()}
    num_layers, steps, closed = len(parent.layers), [], []
    with tempfile.TemporaryDirectory() as directory:
        for layer in sorted({0, num_layers // 2, num_layers - 1}):
            run = ParentRun(parent, batches)
            peak_gib()
            start = now(parent.device)
            window = Window(run, range(layer, layer + 1), [j for j in jobs if j.layer == layer], settings, repeats, Path(directory))
            closed.append(now(parent.device) - start)
            closed_gib = peak_gib()
            window.optimizer = window.make_optimizer()
            step = Captured(window.step) if parent.device.type == "cuda" else window.step
            hidden = run.hidden["train"][0]
            for _ in range(6):
                step(hidden)
            times = []
            for _ in range(repeats):
                start = now(parent.device)
                step(hidden)
                times.append(now(parent.device) - start)
            steps.append(float(np.median(times)))
            peaks = {"closed_form_gib": closed_gib, "step_gib": peak_gib()}
            del window, step, run
    return {"step_s": float(np.mean(steps)) * num_layers, "closed_form_s": float(np.mean(closed)) * num_layers, **peaks}


def whole_run(parent: Parent, space: dict, settings: bld.Settings) -> dict:
    """All of `train_library` on a short budget: its time and its peak memory beside what the plan said."""
    corpus = RandomTokens(parent.model.config.vocab_size)
    jobs = bld.jobs(parent, [space] * len(parent.layers), settings, 0, corpus)
    budgets = {"calibration": settings.calibration_tokens, "train": settings.train_tokens, "val": settings.val_tokens}
    wanted = [(job.layer, job.subblock, job.variant) for job in jobs]
    planned = plan(parent, wanted, budgets, settings.seq_len, settings.batch_size, settings.memory_gib)
    peak_gib()
    with tempfile.TemporaryDirectory() as directory:
        start = now(parent.device)
        bld.train_library(parent, jobs, corpus, settings, 0, Path(directory) / "blocks")
        seconds = now(parent.device) - start
    return {"windows": len(planned.windows), "seconds": seconds, "planned_gib": planned.peak_bytes / 2**30, "peak_gib": peak_gib()}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--parent", default="pico")
    arguments.add_argument("--space", default=str(ROOT / "conf/search_space/paper.yaml"))
    arguments.add_argument("--seq-len", type=int, default=1024)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--no-naive", action="store_true")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--memory-gib", type=float)
    options = arguments.parse_args()
    device, tokens = pick_device(), options.seq_len * options.batch_size
    rows, rate = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        if options.no_naive and dtype == torch.float32:
            continue
        name = str(dtype).removeprefix("torch.")
        rate[name] = matmul_flops_per_s(device, dtype)
        parent = random_parent(options.parent, name, device)
        space = resolve_space(yaml.safe_load(Path(options.space).read_text()), parent.model.config, parent.family)
        settings = bld.Settings(
            options.seq_len, options.batch_size, 8 * tokens, 20 * tokens, 2 * tokens, [0.001, 0.1], 1e-4, 0.1, 0.0, 1.0,
            compile=options.compile, memory_gib=options.memory_gib,
        )  # fmt: skip
        jobs = bld.jobs(parent, [space] * len(parent.layers), settings, 0, RandomTokens(2))
        wanted = [(job.layer, job.subblock, job.variant) for job in jobs]
        a_step = plan(parent, wanted, {"calibration": 0, "train": tokens, "val": 0}, options.seq_len, options.batch_size, None)
        flops = a_step.training_flops + a_step.parent_flops
        ours = our_steps(parent, space, settings, options.repeats)
        batches = RandomTokens(parent.model.config.vocab_size).batches("train", 2 * tokens, options.seq_len, options.batch_size, "naive")
        naive = None if options.no_naive else naive_step_s(parent, space, batches, dtype, options.repeats)
        rows.append({
            "dtype": name, **ours, "floor_s": flops / rate[name], "tokens_per_s": tokens / ours["step_s"],
            "utilisation": flops / rate[name] / ours["step_s"], "naive_step_s": naive, "times_naive": naive and naive / ours["step_s"],
        })  # fmt: skip
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:,.4g}"), flush=True)
        if dtype == torch.bfloat16:
            memory = whole_run(parent, space, settings)
        del parent
    print({**memory, "matmul_tflops": {k: v / 1e12 for k, v in rate.items()}})
    variants = {s: [str(v) for v in some] for s, some in space.items()}
    asked = {**vars(options), "tokens_per_step": tokens, "variants": variants}
    figures = {"asked": asked, "steps": rows, "whole_run": memory, "matmul_flops_per_s": rate}
    tqdm.write(f"written: {write_results('bld', figures, device)}")


if __name__ == "__main__":
    main()
