"""Children out: make a child of a parent and chosen variants, save it, load it, prove that it loads anywhere.

A child is a parent with rows applied: `per_layer_config` is the architecture in transformers' own form, and
`modeling_puzzle.py`, which travels with the checkpoint, is what turns it into modules, here as anywhere else.
"""
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from puzzle_core import modeling_puzzle
from puzzle_core.errors import UserError
from puzzle_core.families import Family
from puzzle_core.files import atomic, read_json
from puzzle_core.parents import Parent, load_whole
from puzzle_core.spec import BLOCK, NO_OP, PARENT, Architecture, Joint, Variant, halves
from puzzle_core.subblocks import build_subblock, changes, load_weights, puzzle_section, randomised, unset_weights


def per_layer_config(family: Family, architecture: Architecture) -> dict[int, dict]:
    """The architecture as transformers writes it: layer to changes, layers that stay as they are left out."""
    overrides: dict[int, dict] = {}
    for layer, subblock, variant in architecture.items():
        for key, value in changes(family, subblock, variant).items():
            entry = overrides.setdefault(layer, {})
            entry[key] = entry.get(key, []) + value if isinstance(value, list) else value
    return overrides


@torch.no_grad()
def make_child(
    parent: Parent, architecture: Architecture, weights_of: Callable[[int, str, Variant | Joint], tuple[Path, str]]
) -> PreTrainedModel:
    """The child: the parent's tensors, with the chosen variants' from the files (and fingerprints) that `weights_of` names."""
    overrides = per_layer_config(parent.family, architecture)
    base = modeling_puzzle.child_class(type(parent.model)) if overrides else type(parent.model)
    config = (base.config_class if overrides else type(parent.model.config)).from_dict(parent.model.config.to_dict())
    vars(config).pop("auto_map", None)  # what the parent's folder brought; the child's class writes its own
    if overrides:
        config.puzzle, config.linear_subblocks = puzzle_section(parent), []
        for kind, key in parent.family.size_keys.items():
            if not hasattr(config, key):  # a layer may only change what the whole config has
                setattr(config, key, parent.family.whole_size(kind, config))
        config.per_layer_config = overrides
    config._attn_implementation = parent.model.config._attn_implementation
    with unset_weights(parent):
        child = base(config)
    child.tie_weights()
    layers, filled = child.get_submodule(parent.family.layers), []
    for layer, subblock, variant in architecture.rows():
        own = {
            half: modeling_puzzle.get_subblock(layers[layer], parent.family.subblock(half).modules)
            for half, of_half in halves(subblock, variant)
            if of_half not in (PARENT, NO_OP)
        }
        if own:
            module = nn.ModuleDict(own) if subblock == BLOCK else own[subblock]
            load_weights(module, *weights_of(layer, subblock, variant))
            filled += module.state_dict(keep_vars=True).values()
    _fill_from(parent, child, filled)
    child.generation_config = parent.model.generation_config
    return child.eval()


def _fill_from(parent: Parent, child: PreTrainedModel, filled: list[Tensor]) -> None:
    """Copy to every tensor of the child that is not `filled`, by a variant, the parent's of its name; all are filled once."""
    variants, of_parent = {id(tensor) for tensor in filled}, parent.model.state_dict()
    assert len(variants) == len(filled), "two variants filled the same tensor of the child"
    for name, tensor in child.state_dict(keep_vars=True).items():
        if id(tensor) in variants:
            continue
        source = of_parent.get(name)
        assert source is not None, f"{name} of the child is neither the parent's nor any variant's"
        assert source.shape == tensor.shape and source.dtype == tensor.dtype, (
            f"{name} of the child is {tensor.dtype} {tuple(tensor.shape)}, the parent's {source.dtype} {tuple(source.shape)}, "
            "and no variant fills it"
        )
        tensor.copy_(source)


def random_weights(parent: Parent, folder: Path) -> Callable[[int, str, Variant | Joint], tuple[Path, str]]:
    """What `make_child` finds weights with where only time matters: files that are made in `folder` when asked for."""

    def find(layer: int, subblock: str, variant: Variant | Joint) -> tuple[Path, str]:
        path = folder / f"{subblock}-{variant}.safetensors"
        if not path.exists():
            save_file(randomised(build_subblock(parent, layer, subblock, variant)).state_dict(), path)
        return path, ""

    return find


def save_child(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a checkpoint that loads without this project, whole or not at all."""
    with atomic(path) as part:
        child.save_pretrained(part)
        tokenizer.save_pretrained(part)


def load_child(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The checkpoint by this project's own class: no code of the folder runs, and code that differs from ours is refused."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it, or `dvc pull {path}`")
    written, base = read_json(path / "config.json"), AutoModelForCausalLM
    if "per_layer_config" in written:
        travelled, ours = path / f"{modeling_puzzle.__name__.rpartition('.')[2]}.py", Path(modeling_puzzle.__file__)
        if not travelled.is_file() or travelled.read_bytes() != ours.read_bytes():
            raise UserError(f"{travelled} is not the modelling file of this version, by which its child would load: make the child again")
        base = getattr(modeling_puzzle, written["architectures"][0])
    return load_whole(path, base, dtype=dtype).eval().to(device)


_RELOAD = """
import importlib.util, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("puzzle_core") is None, "this process can import the project"
checkpoint, batch, device, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype).eval().to(device)
expected = load_file(batch, device=device)
with torch.no_grad():
    print((model(input_ids=expected["input_ids"]).logits - expected["logits"]).abs().max().item())
"""


@torch.no_grad()
def verify_reload(child: PreTrainedModel, path: Path, input_ids: Tensor | np.ndarray) -> None:
    """Load the checkpoint in a process that cannot import this project; RuntimeError, our fault, unless its logits are the child's."""
    input_ids = torch.as_tensor(input_ids, device=child.device)
    with tempfile.TemporaryDirectory() as directory:
        batch = Path(directory) / "batch.safetensors"
        save_file({"input_ids": input_ids, "logits": child(input_ids=input_ids, use_cache=False).logits}, batch)
        command = [sys.executable, "-I", "-c", _RELOAD, path.resolve(), batch, child.device, str(child.dtype).removeprefix("torch.")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=directory)
    if done.returncode or not float(done.stdout.split()[-1]) <= 1e-3:  # so that NaN fails too
        raise RuntimeError(f"{path} does not load as the child it was saved from: {done.stdout}{done.stderr[-2000:]}")
