"""A checkpoint as a GGUF file for llama.cpp: the family's own architecture where all layers are alike, else `deci`.

llama.cpp's loaders of stock architectures take every layer's sizes from layer 0; `deci` (made for Nemotron-51B) reads head
counts and FFN widths layer by layer, 0 heads where attention is skipped. It has no form for a layer with attention and no FFN:
its graph leaves such a layer before the residual is added, attention and all. There an FFN of a few zero channels is written.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from puzzle_core.errors import UserError
from puzzle_core.export import SavedChild
from puzzle_core.files import atomic
from puzzle_core.import_gguf import llama3_factors
from puzzle_core.tokens_gguf import add_tokenizer

TARGET = "gguf"
DTYPES = {"float16": (torch.float16, gguf.LlamaFileType.MOSTLY_F16), "float32": (torch.float32, gguf.LlamaFileType.ALL_F32)}
ZERO_CHANNELS = 32  # of the FFN that stands where none is; a quantised row has blocks of 32
DECI = gguf.MODEL_ARCH.DECI


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp knows a family of parents."""

    architecture: gguf.MODEL_ARCH
    rotates_pairs: bool  # rotary embedding of neighbouring channels; transformers rotates halves, so q and k are reordered
    in_deci: bool  # whether deci's graph can stand in where layers differ
    lacks_factors: bool = False  # of the rotary frequencies, which llama and deci have
    splits_hidden: bool = False  # whether heads have hidden size / heads channels, and no other number


FAMILIES = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True, in_deci=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True, in_deci=True),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2, rotates_pairs=False, in_deci=True, lacks_factors=True, splits_hidden=True),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3, rotates_pairs=False, in_deci=False, lacks_factors=True),
}


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write(child: SavedChild, path: Path, dtype: str) -> None:
    """Write `child` as one GGUF file in float16 or float32, whole or not at all.

    ValueError that names what llama.cpp has no form for, before anything is written.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; expected {' or '.join(DTYPES)}")
    child.refuse_for(TARGET, _reasons(child))
    architecture = FAMILIES[child.config.model_type].architecture if child.is_uniform else DECI
    weights, file_type = DTYPES[dtype]
    entries = _entries(child, architecture, weights)
    with atomic(path) as part:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
        _add_sizes(writer, child)
        writer.add_file_type(file_type)
        add_tokenizer(writer, child.path, child.config.vocab_size)
        for entry in entries:
            of_numpy = np.dtype(str(entry.dtype).removeprefix("torch."))
            writer.add_tensor_info(entry.name, entry.shape, of_numpy, int(np.prod(entry.shape)) * of_numpy.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_checked(entry).numpy())
        writer.close()


def _reasons(child: SavedChild) -> list[str]:
    """What of the parent itself, whatever its child's architecture, has no form in llama.cpp."""
    config, reasons = child.config, []
    family = FAMILIES.get(config.model_type)
    if family is None:
        return [f"family {config.model_type} (known: {', '.join(FAMILIES)})"]
    if not child.is_uniform and not family.in_deci:
        reasons.append(f"family {config.model_type} with layers that differ (deci, which llama.cpp has for such, lacks its q and k norms)")
    if child.is_uniform and family.lacks_factors and config.rope_parameters["rope_type"] == "llama3":
        reasons.append(f"rope_type llama3 in family {config.model_type} (its graph takes no factors)")
    if child.is_uniform and family.splits_hidden and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        reasons.append(f"head_dim {_head_dim(config)} in family {config.model_type} (its heads split hidden_size {config.hidden_size})")
    return reasons + child.refused_config(_ROPE)


def _add_sizes(writer: gguf.GGUFWriter, child: SavedChild) -> None:
    config, layers = child.config, range(child.num_layers)
    per_layer = (lambda values: values[0]) if child.is_uniform else list
    writer.add_name(child.path.name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(child.num_layers)
    writer.add_feed_forward_length(per_layer([_width(child, layer) for layer in layers]))
    writer.add_head_count(per_layer([config.num_attention_heads if child.kv_heads(layer) else 0 for layer in layers]))
    writer.add_head_count_kv(per_layer([child.kv_heads(layer) for layer in layers]))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _width(child: SavedChild, layer: int) -> int:
    """FFN channels in the file: zero ones stand in where deci's graph would otherwise lose the attention or the last layer."""
    needs_ffn = child.kv_heads(layer) > 0 or layer == child.num_layers - 1
    return child.width(layer) or (ZERO_CHANNELS if needs_ffn else 0)


def _entries(child: SavedChild, architecture: gguf.MODEL_ARCH, weights: torch.dtype) -> list[_Entry]:
    """Every tensor of the file, in the checkpoint's order; matrices in `weights`, vectors in float32 as llama.cpp wants them."""
    names = gguf.get_tensor_name_map(architecture, child.num_layers)
    pairs = architecture == DECI or FAMILIES[child.config.model_type].rotates_pairs
    entries = []
    for name in child.files:
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise UserError(f"{child.path}: tensor {name} has no name in GGUF's {gguf.MODEL_ARCH_NAMES[architecture]}")
        shape = tuple(child.shape(name))
        make = partial(child.tensor, name)
        if pairs and (".q_proj." in name or ".k_proj." in name):
            make = partial(_rotary_pairs, make, shape[0] // _head_dim(child.config))
        entries.append(_Entry(renamed, shape, weights if len(shape) > 1 else torch.float32, make))
    return entries + _zero_ffns(child, weights) + _rope_factors(child)


def _rotary_pairs(make: Callable[[], Tensor], num_heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to (pairs): the order in which llama.cpp rotates them."""
    return make().unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _zero_ffns(child: SavedChild, weights: torch.dtype) -> list[_Entry]:
    hidden, entries = child.config.hidden_size, []
    for layer in range(child.num_layers):
        if width := _width(child, layer) - child.width(layer):
            shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
            entries += [_Entry(f"blk.{layer}.ffn_{n}.weight", shape, weights, partial(torch.zeros, shape)) for n, shape in shapes.items()]
            entries.append(_Entry(f"blk.{layer}.ffn_norm.weight", (hidden,), torch.float32, partial(torch.ones, hidden)))
    return entries


_ROPE = ("default", "linear", "llama3")


def _rope_factors(child: SavedChild) -> list[_Entry]:
    """Llama 3's scaling as the factor by which each frequency is divided."""
    rope = child.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return []
    factors = llama3_factors(rope, _head_dim(child.config))
    return [_Entry("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)]


def _checked(entry: _Entry) -> Tensor:
    tensor = entry.make().to(entry.dtype).contiguous()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{entry.name} has values that {entry.dtype} cannot hold; export with dtype=float32")
    return tensor
