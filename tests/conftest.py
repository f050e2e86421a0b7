"""Shared by the tests: pico parents of each family, and workspaces in which stages and DVC really run."""
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forkserver
import pytest
import torch

from puzzle_core import surgery
from puzzle_core.families import FAMILIES, Family
from puzzle_core.parents import Parent, load_parent
from puzzle_core.spec import Architecture, Variant
from puzzle_core.subblocks import build_subblock

ROOT = Path(__file__).resolve().parents[1]
PICO = ["parent=pico", "search_space=pico", "bld=pico", "score=pico", "workload=pico", "gkd=pico", "hardware=cpu"]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.org",
}  # fmt: skip
EXCERPT = {"source": "files", "path": str(ROOT / "data/corpus/excerpt.parquet"), "development_fraction": 0.1, "test_fraction": 0.1}
PICO_CONFIG = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}  # fmt: skip


def pytest_configure(config):
    torch.set_num_threads(1)


# What a family needs beside or in place of PICO_CONFIG to have everything that is special about it.
SMALL_WINDOW = {"sliding_window": 12, "num_hidden_layers": 3}
PICO_FAMILIES = {
    "mistral": SMALL_WINDOW,
    "qwen2": {"num_hidden_layers": 3},
    "qwen3": {**SMALL_WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 24},
    "gemma2": {**SMALL_WINDOW, "head_dim": 24, "query_pre_attn_scalar": 24},
    "gemma3_text": {**SMALL_WINDOW, "head_dim": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 32, "num_hidden_layers": 3},
    "gpt2": {"n_inner": 160, "num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"num_hidden_layers": 3, "num_layers": 3, "attention_types": [[["local", "global", "local"], 1]], "window_size": 8},
    "opt": {"num_hidden_layers": 3, "ffn_dim": 160, "pad_token_id": 0},
}


def pico_parent(model_type: str = "llama", **changes) -> Parent:
    """A random parent whose biases and norms, where its family has them, are not the constants that transformers starts with."""
    config = {"model_type": model_type, **PICO_CONFIG, **PICO_FAMILIES.get(model_type, {}), **changes}
    if FAMILIES.get(model_type, Family()).attention.multi_head:  # neither key means anything there
        del config["num_key_value_heads"], config["head_dim"]
    parent = load_parent("random", config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parent.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5, generator=generator)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return parent


@pytest.fixture(scope="session")
def pico() -> Parent:
    return pico_parent()


def variants(parent: Parent, directory: Path):
    """A `weights_of` for make_child that initialises each variant on demand."""
    from safetensors.torch import save_file

    def weights_of(layer: int, subblock: str, variant: Variant) -> tuple[Path, str]:
        module = build_subblock(parent, layer, subblock, variant)
        size = next(parent.family.whole_size(kind, parent.model.config) for kind in ("w", "e") if kind in parent.family.size_keys)
        importance = torch.rand(size, generator=torch.Generator().manual_seed(layer))
        names = parent.family.subblock(subblock)
        surgery.initialise(parent.module(layer, subblock), module, names, variant, surgery.Basis(importance))
        path = directory / f"{layer}-{subblock}-{variant}.safetensors"
        save_file(module.state_dict(), path)
        return path, ""

    return weights_of


def architecture(*layers: str) -> Architecture:
    """`architecture("kv1 w80", "no_op linear")`: attention and FFN of each layer."""
    return Architecture(tuple(tuple(map(Variant.parse, layer.split())) for layer in layers))


@functools.cache
def quick_starts() -> None:
    """From now on `python -m stages.NAME` and `dvc` in ENVIRONMENT start as forks; see forkserver.py."""
    ENVIRONMENT["PATH"] = f"{forkserver.start()}:{ENVIRONMENT['PATH']}"


def run(command: list, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a workspace; AssertionError with its output if it fails and `check` is set."""
    quick_starts()
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def stage(name: str, *overrides: str, cwd: Path = ROOT, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    return run(["python", "-m", f"stages.{name}", *PICO, *overrides], cwd, check, **environment)


def started(name: str, overrides: list[str], reached: Callable[[], object], stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    """A stage that has just come to where `reached()` is true; fails if it ends before, or does not get there."""
    command = [sys.executable, "-m", f"stages.{name}", *PICO, *overrides]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr, text=True)
    deadline = time.monotonic() + 120
    try:
        while not reached():
            assert process.poll() is None, f"{name} ended before it got there"
            assert time.monotonic() < deadline, f"{name} never got there"
            time.sleep(0.01)
    except BaseException:
        process.terminate()
        raise
    return process


def copy_of_the_project(target: Path) -> Path:
    """The project as git sees it (uncommitted changes too), as a repository of its own with the pico presets in use."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith(("data/metrics/", "data/plots/")) and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    params = (target / "params.yaml").read_text()
    for old, new in {
        "parent: smollm2-135m": "parent: pico", "search_space: demo": "search_space: pico", "bld: demo": "bld: pico",
        "score: demo": "score: pico", "workload: demo": "workload: pico", "gkd: demo": "gkd: pico", "hardware: auto": "hardware: cpu",
        "speedup: 1.3 ": "speedup: null ", "params_fraction: null": "params_fraction: 0.8", "repeats: 7": "repeats: 1",
    }.items():  # fmt: skip
        assert old in params, old
        params = params.replace(old, new)
    (target / "params.yaml").write_text(params)
    run(["git", "init", "-q", "-b", "main"], target)
    run(["git", "add", "-A"], target)
    run(["git", "commit", "-qm", "start"], target)
    return target
