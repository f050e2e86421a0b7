"""Subblocks: which variants a parent can have, and building, swapping, counting and loading one."""
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from puzzle_core import modeling_puzzle
from puzzle_core.families import Family
from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, FFN, LINEAR, NO_OP, PARENT, SUBBLOCKS, Variant

_IN_CONFIG = {ATTENTION: "attention", FFN: "mlp"}  # our subblocks as per_layer_config's `skip` names them


def resolve_space(space: dict[str, list[str]], config: PreTrainedConfig, family: Family) -> dict[str, list[Variant]]:
    """The variants of each subblock, `w50%` and the like turned into sizes of this parent, the parent itself first.

    A share of the FFN width is rounded to a multiple of 32; a share of the kv heads to the next divisor below. A share
    that comes to the parent's own size is the parent.
    ValueError for a variant this parent cannot have.
    """
    resolved = {}
    for subblock in SUBBLOCKS:
        resolved[subblock] = [PARENT]
        for text in space[subblock]:
            variant = _resolve(str(text), config, family)
            allowed = {ATTENTION: ("kv", "linear", "no_op", "parent"), FFN: ("w", "linear", "no_op", "parent")}[subblock]
            if variant.kind not in allowed:
                raise ValueError(f"search_space.{subblock}: '{text}' is not a variant of {subblock}; known kinds: {', '.join(allowed)}")
            if variant not in resolved[subblock]:
                resolved[subblock].append(variant)
    return resolved


def _resolve(text: str, config: PreTrainedConfig, family: Family) -> Variant:
    share = None
    if text.endswith("%"):
        kind = text.rstrip("%.0123456789")
        share = float(text[len(kind) : -1]) / 100
    else:
        variant = Variant.parse(text)
        kind = variant.kind
    if kind not in family.size_keys:
        return Variant.parse(text)
    whole = getattr(config, family.size_keys[kind])
    divisors = [n for n in range(1, whole) if whole % n == 0]
    if share is not None:
        if whole == 1 or (kind == "w" and max(32, round(share * whole / 32) * 32) >= whole):
            return PARENT
        size = max([n for n in divisors if n <= share * whole] or [1]) if kind == "kv" else max(32, round(share * whole / 32) * 32)
        variant = Variant(kind, size)
    if not variant.size or variant.size >= whole or (kind == "kv" and variant.size not in divisors):
        expected = f"one of {divisors}" if kind == "kv" else f"between 1 and {whole - 1}"
        raise ValueError(f"variant '{text}' does not fit this parent, whose {family.size_keys[kind]} is {whole}; expected {expected}")
    return variant


def changes(family: Family, subblock: str, variant: Variant) -> dict:
    """What `variant` changes in its layer's config: an entry of per_layer_config."""
    if variant == PARENT:
        return {}
    if variant in (NO_OP, LINEAR):
        return {"skip" if variant == NO_OP else "linear_subblocks": [_IN_CONFIG[subblock]]}
    return {family.size_keys[variant.kind]: variant.size}


def puzzle_section(parent: Parent) -> dict:
    """config.json's `puzzle`: what the modelling file must know of the family."""
    section = parent.family.to_json()
    for subblock in SUBBLOCKS:
        names, module = parent.family.subblock(subblock), parent.module(0, subblock)
        section[subblock]["bias"] = any(getattr(module, name).bias is not None for name in (names.first, names.last))
    return section


@contextlib.contextmanager
def unset_weights(parent: Parent) -> Iterator[None]:
    """Modules made here have the parent's dtype and device; buffers such as rotary frequencies keep their own dtype."""
    with no_init_weights(), local_torch_dtype(parent.model.dtype), torch.device(parent.device):
        yield


def build_subblock(parent: Parent, layer: int, subblock: str, variant: Variant) -> nn.Module:
    """The bare module of `variant`, its weights not yet set, in the parent's dtype and on its device."""
    with unset_weights(parent):
        built = modeling_puzzle.build_layer(
            parent.layers[layer], parent.model.config, changes(parent.family, subblock, variant), layer, puzzle_section(parent)
        )
    return getattr(built, parent.family.subblock(subblock).module).eval()


@contextlib.contextmanager
def swapped(parent: Parent, layer: int, subblock: str, module: nn.Module) -> Iterator[None]:
    """Put `module` in the parent's place for a while; where it does nothing, the subblock's norms rest too."""
    block, names = parent.layers[layer], parent.family.subblock(subblock)
    kept = {name: getattr(block, name) for name in (names.module, *names.norms)}
    setattr(block, names.module, module)
    if isinstance(module, (modeling_puzzle.NoOpAttention, modeling_puzzle.NoOpFfn)):
        for name in names.norms:
            setattr(block, name, nn.Identity())
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(block, name, original)


def num_params(parent: Parent, layer: int, subblock: str, module: nn.Module) -> int:
    """Parameters of a subblock with `module` in it, its norms included."""
    with swapped(parent, layer, subblock, module):
        return sum(p.numel() for part in (module, *parent.norms(layer, subblock)) for p in part.parameters())


def variant_row(path: Path) -> dict:
    """The library row that a variant's file carries; {} if there is no whole file there."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("row", "{}"))
    except (OSError, safetensors.SafetensorError):
        return {}


def load_weights(module: nn.Module, path: Path, fingerprint: str) -> None:
    """Fill `module` from one variant's file.

    ValueError that names the file if it is damaged, does not fit, or has not the library row's `fingerprint` ("" is not
    checked: rows from elsewhere).
    """
    try:
        module.load_state_dict(load_file(path))
        if fingerprint and variant_row(path).get("fingerprint") != fingerprint:
            raise RuntimeError("it was trained under other settings than library.parquet says")
    except (safetensors.SafetensorError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not the weights of this variant ({error}). Delete it and run `dvc repro bld`.") from error
