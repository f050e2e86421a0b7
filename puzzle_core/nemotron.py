"""nemotron-nas: the form in which NVIDIA publishes Puzzle's children, written for vLLM and TensorRT-LLM, and read.

Weights have Llama's names. config.json says in `block_configs` what each layer has: query heads per kv head, and an FFN
multiplier that engines turn into a width.
"""
import inspect
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from puzzle_core import configuration_decilm
from puzzle_core.errors import UserError
from puzzle_core.export import SavedChild
from puzzle_core.files import atomic, read_json, write_json
from puzzle_core.spec import LINEAR, NO_OP, PARENT, Architecture, Variant

TARGET = "nemotron-nas"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FAMILIES = ("llama", "mistral")
_ROPE = ("default", "linear", "llama3")
_UNUSED = {
    "num_sink_tokens": None, "sparsify": None, "unshifted_sink": False, "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}  # fmt: skip
_SAME_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width that every engine makes of a multiplier: two thirds of it times hidden, up to a multiple of 256."""
    return -(int(2 * ffn_mult * hidden_size / 3) // -256) * 256


def write(child: SavedChild, path: Path, dtype: str) -> None:
    """Write `child` as a folder for vLLM and TensorRT-LLM, whole or not at all.

    ValueError that names what they have no form for, before anything is written.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; expected {' or '.join(DTYPES)}")
    child.refuse_for(TARGET, _reasons(child))
    with atomic(path) as part:
        part.mkdir()
        for file in sorted(set(child.files.values())):
            tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(file).items()}
            if lost := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
                raise UserError(f"{', '.join(lost)}: values that {dtype} cannot hold; export with dtype=bfloat16 or float32")
            save_file(tensors, part / file.name, metadata={"format": "pt"})
        for file in child.path.iterdir():  # tokenizer, chat template, generation config, the index of the shards
            if file.is_file() and file.suffix not in (".safetensors", ".py", ".md") and file.name != "config.json":
                shutil.copy(file, part)
        (part / "configuration_decilm.py").write_text(inspect.getsource(configuration_decilm))
        write_json(part / "config.json", _config(child, dtype))


def _reasons(child: SavedChild) -> list[str]:
    """What of the parent itself has no form: engines build bias-free Llama layers of widths that are multiples of 256."""
    config, reasons = child.config, []
    if config.model_type not in _FAMILIES:
        return [f"family {config.model_type} (known: {', '.join(_FAMILIES)})"]
    if biases := [name for name in child.files if name.endswith(".bias")]:
        reasons.append(f"biases ({biases[0]} and {len(biases) - 1} more)")
    reasons += child.refused_config(_ROPE)
    of_parent = [layer for layer in range(child.num_layers) if child.architecture.layers[layer][1] == PARENT]
    if config.intermediate_size % 256 and of_parent:
        layers = ", ".join(map(str, of_parent))
        reasons.append(f"layer {layers} ffn parent (its width is {config.intermediate_size}, engines round up to a multiple of 256)")
    return reasons


def _config(child: SavedChild, dtype: str) -> dict:
    config = child.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        **{key: getattr(config, key, None) for key in _SAME_KEYS},
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": dtype,
        "block_configs": [_block(child, layer) for layer in range(child.num_layers)],
    }


def _block(child: SavedChild, layer: int) -> dict:
    kv_heads, width = child.kv_heads(layer), child.width(layer)
    group = child.config.num_attention_heads // kv_heads if kv_heads else None
    mult = 3 * width / (2 * child.config.hidden_size) if width else None
    return {
        "attention": {"n_heads_in_group": group, "no_op": not kv_heads, "replace_with_linear": False, **_UNUSED},
        "ffn": {"ffn_mult": mult, "no_op": not width, "replace_with_linear": False, "sparsify": None},
    }


def read_architecture(path: Path, num_key_value_heads: int | None = None, intermediate_size: int | None = None) -> Architecture:
    """The architecture in a published config.json with `block_configs`, given the sizes of its parent.

    Without them, those of the whole in the file are the parent's (this project writes them), else the largest of any layer
    (NVIDIA leaves them null).
    ValueError for a layer that has no form here.
    """
    config = read_json(path)
    if "block_configs" not in config:
        raise UserError(f"{path} has no block_configs; expected the config.json of a nemotron-nas checkpoint")
    sizes = [(_kv_heads(config, block), _width(config, block)) for block in config["block_configs"]]
    of_parent = (
        num_key_value_heads or config.get("num_key_value_heads") or max(kv_heads or 0 for kv_heads, _ in sizes),
        intermediate_size or config.get("intermediate_size") or max(width or 0 for _, width in sizes),
    )
    layers = []
    for layer, (block, found) in enumerate(zip(config["block_configs"], sizes, strict=True)):
        kinds = zip(("attention", "ffn"), ("kv", "w"), found, of_parent, strict=True)
        layers.append(tuple(_variant(path, layer, subblock, block[subblock], *rest) for subblock, *rest in kinds))
    return Architecture(tuple(layers))


def _variant(path: Path, layer: int, subblock: str, block: dict, kind: str, size: int | None, of_parent: int) -> Variant:
    if block.get("no_op"):
        return NO_OP
    if block.get("replace_with_linear"):
        return LINEAR
    if odd := {key: block[key] for key in ("sparsify", "window_length", "num_sink_tokens", "moe", "mamba") if block.get(key)}:
        raise UserError(f"{path}: layer {layer} {subblock} has {odd}, which has no variant here")
    if not size or size > of_parent or (kind == "kv" and of_parent % size):
        raise UserError(f"{path}: layer {layer} {subblock} is {kind}{size}, which no variant of a parent with {kind}{of_parent} is")
    return PARENT if size == of_parent else Variant(kind, size)


def _kv_heads(config: dict, block: dict) -> int | None:
    group = block["attention"].get("n_heads_in_group")
    return config["num_attention_heads"] // group if group else None


def _width(config: dict, block: dict) -> int | None:
    """A width said outright stands above the multiplier."""
    mult = block["ffn"].get("ffn_mult")
    return block["ffn"].get("intermediate_size") or (width_of(mult, config["hidden_size"]) if mult else None)


def num_params(path: Path) -> int:
    """Parameters of the checkpoint that a config.json with `block_configs` describes."""
    config = read_json(path)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    total = hidden + config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    for block in config["block_configs"]:
        kv_heads, width = _kv_heads(config, block), _width(config, block)
        for part, size in (("attention", 2 * head_dim * (heads + (kv_heads or 0))), ("ffn", 3 * (width or 0))):
            if not block[part].get("no_op"):
                total += hidden + hidden * (hidden if block[part].get("replace_with_linear") else size)  # its norm, its matrices
    return total
