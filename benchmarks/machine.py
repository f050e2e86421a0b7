"""What every benchmark says of where it ran, and how it writes its results."""
import gc
import importlib.metadata
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.demo import save_result
from puzzle_core.parents import Parent, load_parent
from puzzle_core.serving import hardware_name
from puzzle_core.shards import GIB

GEOMETRIES = {  # random weights: right for speed, meaningless for quality
    "pico": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "llama-3.2-1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "llama-3.1-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "llama-3.1-70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip


def geometry(name: str) -> dict:
    """The config of a Llama of that geometry."""
    return {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True, **GEOMETRIES[name]}


def random_parent(name: str, dtype: str, device: torch.device, most_layers: int = 0) -> Parent:
    """A parent of that geometry, of `most_layers` if given; its weights are drawn on `device`: a CPU takes a minute for a billion."""
    config = geometry(name)
    config["num_hidden_layers"] = min(config["num_hidden_layers"], most_layers or config["num_hidden_layers"])
    with device:
        return load_parent("random", dtype=dtype, device=device, config=config)


class RandomTokens:
    """Stands in for a corpus: as many token batches as asked for."""

    fingerprint = "random"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def batches(self, split: str, num_tokens: int, seq_len: int, batch_size: int, seed: str) -> list[np.ndarray]:
        generator = np.random.default_rng(len(seed))
        return [generator.integers(1, self.vocab_size, (batch_size, seq_len)) for _ in range(-(-num_tokens // (seq_len * batch_size)))]


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def emptied(device: torch.device) -> None:
    """Nothing of what ran before is in the GPU's memory, or in its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most that was allocated since `emptied`; None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """The rate of a large square product, measured: what utilisation is a share of."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start = now(device)
        for _ in range(4):
            a @ b
        best = min(best, (now(device) - start) / 4)
    return 2 * size**3 / best


def bytes_per_s(device: torch.device) -> float:
    """The rate of a large copy, measured, reading and writing counted."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        best = min(best, now(device) - start)
    return 2 * source.numel() / best


def in_folder(folder: Path) -> list[str]:
    """Overrides with which a stage reads and writes all in `folder`."""
    return [f"data='{folder}'", f"out='{folder}'", f"hydra.run.dir='{folder}/hydra'"]


def write_results(name: str, figures: object, device: torch.device, result: str | None = None) -> Path:
    """docs/results/RESULT.json, or NAME.json, of benchmarks/NAME.py: machine, versions, command, figures."""
    content = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": hardware_name(device),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("torch", "transformers")}},
        "figures": figures,
    }
    return save_result(result or name, content)
