"""What GKD costs: time and memory of a step beside those of the plain Trainer with cross-entropy on the same child.

    python -m benchmarks.gkd                          # on a GPU: both geometries of the table in the docs
    python -m benchmarks.gkd --parents pico --seq-len 128 --batch-size 4

Same child, batch and precision (bfloat16 autocast on a GPU, float32 weights and optimizer) in one process; weights are random,
which neither time nor memory sees. Compiling and the first steps are not timed. What is to be met: a step of at most 1.6 times the
plain one and the parent's forward, memory of at most 1.1 times the plain one's peak and the parent. The floor is the products of
the parent's forward, the child's forward and twice that for its backward, at the rate of a large product measured here.
"""
import argparse
import contextlib
import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, trainer

from benchmarks.machine import matmul_flops_per_s, now, random_parent, write_results
from puzzle_core import gkd
from puzzle_core.children import make_child
from puzzle_core.parents import Parent, pick_device
from puzzle_core.shards import GIB, num_bytes
from puzzle_core.spec import Architecture, Variant
from puzzle_core.subblocks import build_subblock, resolve_space

SPACE = {"attention": ["kv50%", "no_op"], "ffn": ["w75%", "w50%"]}
WARMUP = 4  # steps that are not timed


class Clock(TrainerCallback):
    """Seconds a step and peak bytes of a training run, from its WARMUP-th step to its last."""

    def __init__(self, device: torch.device):
        self.device, self.step_s, self.peak_bytes = device, None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.start = now(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.step_s = (now(self.device) - self.start) / (state.max_steps - WARMUP)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """Every Trainer that is made inside is timed; nothing of what ran before is in the GPU's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    clock = Clock(device)
    trainer.DEFAULT_CALLBACKS.append(clock)
    try:
        yield clock
    finally:
        trainer.DEFAULT_CALLBACKS.remove(clock)


def random_child(parent: Parent, directory: Path) -> PreTrainedModel:
    """A float32 child of three kinds of layers in turn: the parent's; fewer heads and channels; no attention and half the channels."""
    kv, no_op, wide, narrow = (v for some in resolve_space(SPACE, parent.model.config, parent.family).values() for v in some[1:])
    kinds = [(Variant("parent"), Variant("parent")), (kv, wide), (no_op, narrow)]

    def weights_of(layer: int, subblock: str, variant: Variant) -> tuple[Path, str]:
        module, path = build_subblock(parent, layer, subblock, variant), directory / f"{layer}-{subblock}.safetensors"
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parent.model.config.initializer_range)
        save_file(module.state_dict(), path)
        return path, ""

    layers = tuple(kinds[layer % 3] for layer in range(len(parent.layers)))
    return make_child(parent, Architecture(layers), weights_of).float().requires_grad_(True)


def plain_steps(child: PreTrainedModel, sequences: np.ndarray, batch_size: int) -> None:
    """The plain Trainer: cross-entropy of the next token."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.as_tensor(sequences)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=1e-5,
            bf16=child.device.type == "cuda",
            use_cpu=child.device.type == "cpu",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
        Trainer(model=child, args=arguments, train_dataset=rows).train()


def gkd_steps(parent: Parent, child: PreTrainedModel, sequences: np.ndarray, options: argparse.Namespace, batch_size: int, **how) -> None:
    settings = gkd.Settings(
        options.seq_len, batch_size, sequences.size, 1e-5, 0.1, 0.0, 1.0, 1.0, 1.0, None,
        log_every_steps=10, head_tokens=options.head_tokens, **how,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        gkd.distill(parent.model, child, list(sequences), settings, 0, Path(folder))


@torch.no_grad()
def parent_forward_s(parent: Parent, ids_BT: torch.Tensor, repeats: int = 5) -> float:
    """Seconds of the parent's forward with its logits, a chunk of the head's tokens at a time."""
    times = []
    for _ in range(repeats + 1):
        start = now(parent.device)
        for hidden_ND in parent.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1).split(4096):
            parent.model.get_output_embeddings()(hidden_ND)
        times.append(now(parent.device) - start)
    return statistics.median(times[1:])


def forward_flops(model: PreTrainedModel, seq_len: int) -> float:
    """Of a token: 2 a weight of each matrix, the head's too, and causal attention's two products."""
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    attended = sum(part.q_proj.out_features for part in model.modules() if hasattr(part, "q_proj"))
    return 2.0 * weights + 2.0 * seq_len * attended


def measure(name: str, options: argparse.Namespace, device: torch.device, rate: float) -> Iterator[dict]:
    """Figures of one geometry, a row for each way to train, as they become known."""
    dtype, batch_size = "bfloat16" if device.type == "cuda" else "float32", options.batch_size or {"smollm2-135m": 16}.get(name, 8)
    parent = random_parent(name, dtype, device)
    with tempfile.TemporaryDirectory() as directory:
        child = random_child(parent, Path(directory))
    tokens = batch_size * options.seq_len
    generator = np.random.default_rng(0)
    sequences = generator.integers(1, parent.model.config.vocab_size, (batch_size * (WARMUP + options.steps), options.seq_len))
    flops = forward_flops(parent.model, options.seq_len) + 3 * forward_flops(child, options.seq_len)
    forward_s = parent_forward_s(parent, torch.as_tensor(sequences[:batch_size], device=device))
    with timed(device) as plain:
        plain_steps(child, sequences, batch_size)
    shared = {"parent": name, "batch": f"{batch_size}x{options.seq_len}", "floor_s": tokens * flops / rate, "parent_forward_s": forward_s}
    # The parent waits in memory while the plain Trainer runs, so it is in that peak already.
    yield {**shared, "way": "plain Trainer", **_row(plain, tokens)}
    limit_s = 1.6 * plain.step_s + forward_s
    ways = {"gkd": {}, "gkd, layers checkpointed": {"gradient_checkpointing": True}, "gkd, compiled": {"compile": True}}
    for way, how in ways.items():
        if how.get("compile") and not options.compile:
            continue
        with timed(device) as clock:
            gkd_steps(parent, child, sequences, options, batch_size, **how)
        row = {**shared, "way": way, **_row(clock, tokens), "step_of_limit": clock.step_s / limit_s}
        row["utilisation"] = shared["floor_s"] / clock.step_s
        if clock.peak_bytes is not None:
            row |= {"memory_of_plain_and_parent": clock.peak_bytes / plain.peak_bytes, "parent_gib": num_bytes(parent.model) / GIB}
        yield row


def _row(clock: Clock, tokens: int) -> dict:
    peak = None if clock.peak_bytes is None else clock.peak_bytes / GIB
    return {"step_s": clock.step_s, "tokens_per_s": tokens / clock.step_s, "peak_gib": peak}


def main(arguments: list[str] | None = None) -> list[dict]:
    device = pick_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", default="smollm2-135m,llama-3.2-1b" if on_gpu else "pico", help="of benchmarks/machine.py")
    parser.add_argument("--seq-len", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--batch-size", type=int, help="sequences a step; default: 16 of smollm2-135m, else 8")
    parser.add_argument("--steps", type=int, default=12, help="that are timed")
    parser.add_argument("--head-tokens", type=int, default=4096)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    options = parser.parse_args(arguments)
    rate = matmul_flops_per_s(device, torch.bfloat16 if on_gpu else torch.float32)
    asked = {key: value for key, value in vars(options).items() if value is not None}
    rows: list[dict] = []
    for name in options.parents.split(","):
        for row in measure(name, options, device, rate):
            rows.append(row)
            print(", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            written = write_results("gkd", {"asked": asked, "matmul_flops_per_s": rate, "ways": rows}, device)
    print(pd.DataFrame(rows).T.to_string(float_format=lambda value: f"{value:,.4g}"))
    print(f"products {rate / 1e12:,.4g} TFLOP/s, measured here; written: {written}")
    return rows


if __name__ == "__main__":
    main()
