"""Subblocks: which variants a parent can have, and building, swapping, counting and loading one."""
import contextlib
import json
import re
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
from puzzle_core.errors import UserError
from puzzle_core.families import IN_CONFIG, SIZED, Family
from puzzle_core.parents import Parent
from puzzle_core.spec import BLOCK, LINEAR, NO_OP, PARENT, SUBBLOCKS, Joint, Variant, did_you_mean


def resolve_layers(space: dict, config: PreTrainedConfig, family: Family) -> list[dict[str, list[Variant | Joint]]]:
    """The variants that each layer may have of each subblock, the parent first; `w50%` and the like turned into sizes.

    `space` is a preset of conf/search_space/: lists of variants by subblock, and under `layers` ("0", "3-5", "1,7-9") the
    lists that some layers have instead. A list of `block` may be there too: joint variants of halves that the layer has.
    A share of the FFN width is rounded to a multiple of 32; a share of the kv heads to the next divisor below. A share
    that comes to the parent's own size is the parent.
    ValueError for a variant this parent cannot have, and for a layer it has not.
    """
    everywhere = {key: value for key, value in space.items() if key != "layers"}
    if lacking := set(SUBBLOCKS) - everywhere.keys():
        raise UserError(f"search_space lacks {', '.join(sorted(lacking))}: a list of variants, [] where every layer keeps the parent's")
    _check_subblocks("search_space", everywhere)
    lists = [{s: (f"search_space.{s}", some) for s, some in everywhere.items()} for _ in range(config.num_hidden_layers)]
    changed = set()
    for text, own in (space.get("layers") or {}).items():
        _check_subblocks(f"search_space.layers.{text}", own)
        for layer in _layers_named(str(text), len(lists)):
            for subblock, some in own.items():
                if (layer, subblock) in changed:
                    raise UserError(f"search_space.layers.{text}.{subblock}: layer {layer} has a list of its own already; give it one")
                changed.add((layer, subblock))
                lists[layer][subblock] = f"search_space.layers.{text}.{subblock}, layer {layer}", some
    resolved = [{s: _resolved(*of_layer[s], s, config, family) for s in SUBBLOCKS} for of_layer in lists]
    for of_layer, variants in zip(lists, resolved, strict=True):
        if of_layer.get(BLOCK, ("", []))[1]:
            variants[BLOCK] = _resolved_blocks(*of_layer[BLOCK], variants, config, family)
    return resolved


def resolve_space(space: dict, config: PreTrainedConfig, family: Family) -> dict[str, list[Variant]]:
    """The variants that any layer may have of each subblock, each once, the parent first; as `resolve_layers` reads `space`."""
    layers = resolve_layers(space, config, family)
    return {s: list(dict.fromkeys(variant for layer in layers for variant in layer[s])) for s in SUBBLOCKS}


def _check_subblocks(where: str, lists: dict) -> None:
    known = (*SUBBLOCKS, BLOCK)
    for key in lists.keys() - set(known):
        raise UserError(f"{where}: unknown subblock '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}.")


def _layers_named(text: str, num_layers: int) -> list[int]:
    """`1,7-9` as the layers 1, 7, 8, 9."""
    layers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        some = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not some or some[-1] >= num_layers:
            raise UserError(
                f"search_space.layers: '{text}' names no layers of this parent; expected for example 0 or 1,7-9, below {num_layers}"
            )
        layers += some
    return layers


def _resolved(where: str, texts: list[str], subblock: str, config: PreTrainedConfig, family: Family) -> list[Variant]:
    variants = [PARENT]
    kinds = [kind for kind in SIZED[subblock] if kind in family.size_keys] + ["linear", "no_op", "parent"]
    for text in map(str, texts):
        kind = text.rstrip("%.0123456789") if text.endswith("%") else Variant.parse(text).kind
        if kind not in kinds:
            raise UserError(
                f"{where}: '{text}' is not a variant of {subblock} in {config.model_type} parents; known kinds: {', '.join(kinds)}"
            )
        variant = _resolve(where, text, kind, config, family)
        if variant not in variants:
            variants.append(variant)
    return variants


def _resolved_blocks(where: str, texts: list[str], of_layer: dict, config: PreTrainedConfig, family: Family) -> list[Joint]:
    """Joint variants, each of halves that are in `of_layer`: a block's training starts from them."""
    blocks = [Joint(PARENT, PARENT)]
    for text in texts:
        parts = str(text).split("+")
        if len(parts) != len(SUBBLOCKS):
            raise UserError(f"{where}: '{text}' is not a joint variant; expected attention+ffn, for example kv1+w50%")
        own = [_resolved(where, [part], subblock, config, family)[-1] for part, subblock in zip(parts, SUBBLOCKS, strict=True)]
        for half, subblock in zip(own, SUBBLOCKS, strict=True):
            if half not in of_layer[subblock]:
                raise UserError(f"{where}: '{text}' needs {half} in the {subblock} list of the layer, whose weights it starts from")
        if (joint := Joint(*own)) not in blocks:
            blocks.append(joint)
    return blocks


def _resolve(where: str, text: str, kind: str, config: PreTrainedConfig, family: Family) -> Variant:
    if kind not in family.size_keys:
        return Variant.parse(text)
    whole = family.whole_size(kind, config)
    # A window of 1 would leave each token itself alone; fewer experts than a token is sent to cannot be.
    least = {"window": 2, "e": getattr(config, "num_experts_per_tok", 1)}.get(kind, 1)
    sizes = [n for n in range(least, whole) if kind != "kv" or whole % n == 0]
    if text.endswith("%"):
        size = float(text[len(kind) : -1]) / 100 * whole
        if kind == "kv":
            size = max([n for n in sizes if n <= size] or [1])
        elif kind == "w":
            size = max(32, round(size / 32) * 32)
        variant = Variant(kind, max(least, round(size)))
        if variant.size >= whole:
            return PARENT
    else:
        variant = Variant.parse(text)
    if variant.size not in sizes:
        expected = f"one of {sizes}" if kind == "kv" else f"between {least} and {whole - 1}"
        raise UserError(f"{where}: '{text}' does not fit this parent, whose {family.size_keys[kind]} is {whole}; expected {expected}")
    return variant


def changes(family: Family, subblock: str, variant: Variant) -> dict:
    """What `variant` changes in its layer's config: an entry of per_layer_config."""
    if variant == PARENT:
        return {}
    if variant in (NO_OP, LINEAR):
        return {"skip" if variant == NO_OP else "linear_subblocks": [IN_CONFIG[subblock]]}
    return {family.size_keys[variant.kind]: variant.size}


def puzzle_section(parent: Parent) -> dict:
    """config.json's `puzzle`: what the modelling file must know of the family."""
    return parent.family.to_json()


@contextlib.contextmanager
def unset_weights(parent: Parent) -> Iterator[None]:
    """Modules made here have the parent's dtype and device; buffers such as rotary frequencies keep their own dtype."""
    with no_init_weights(), local_torch_dtype(parent.model.dtype), torch.device(parent.device):
        yield


def build_subblock(parent: Parent, layer: int, subblock: str, variant: Variant | Joint) -> nn.Module:
    """The bare module of `variant`, its weights not yet set, in the parent's dtype and on its device.

    Of a `block` a ModuleDict of its halves, without those that are the parent's.
    """
    if isinstance(variant, Joint):
        return nn.ModuleDict({half: build_subblock(parent, layer, half, own) for half, own in variant.halves if own != PARENT})
    with unset_weights(parent):
        built = modeling_puzzle.build_layer(
            parent.layers[layer], parent.model.config, changes(parent.family, subblock, variant), layer, puzzle_section(parent)
        )
    return modeling_puzzle.get_subblock(built, parent.family.subblock(subblock).modules).eval()


def randomised(module: nn.Module) -> nn.Module:
    """Weights of ordinary size, for timing: what is multiplied must not be special, zeros and denormals are faster or slower."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


@contextlib.contextmanager
def swapped(parent: Parent, layer: int, subblock: str, module: nn.Module) -> Iterator[None]:
    """Put `module` in the parent's place for a while; where it does nothing, the subblock's norms rest too.

    Of a `block`: each of the halves that it has.
    """
    if subblock == BLOCK:
        with contextlib.ExitStack() as stack:
            for half, own in module.items():
                stack.enter_context(swapped(parent, layer, half, own))
            yield
        return
    block, names = parent.layers[layer], parent.family.subblock(subblock)
    kept = {name: block.get_submodule(name) for name in (*names.modules, *names.norms)}
    modeling_puzzle.set_subblock(block, names.modules, module)
    if isinstance(module, (modeling_puzzle.NoOpAttention, modeling_puzzle.NoOpFfn)):
        for name in names.norms:
            block.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, original in kept.items():
            block.set_submodule(name, original)


def num_params(parent: Parent, layer: int, subblock: str, module: nn.Module) -> int:
    """Parameters of a subblock or block with `module` in it, its norms included."""
    if subblock == BLOCK:
        return sum(num_params(parent, layer, s, module[s] if s in module else parent.module(layer, s)) for s in SUBBLOCKS)
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
        raise UserError(f"{path}: not the weights of this variant ({error}). Delete it and run `dvc repro bld`.") from error
