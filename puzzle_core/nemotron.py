"""nemotron-nas: the form in which NVIDIA publishes Puzzle's children, written for vLLM and TensorRT-LLM, and read.

Weights have Llama's names. config.json says in `block_configs` what each layer has: query heads per kv head, and an FFN
multiplier that engines turn into a width.
"""
import inspect
import math
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
            if file.is_file() and file.suffix not in (".safetensors", ".py", ".md") and file.name not in ("config.json", "evaluation.json"):
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
    ValueError for a layer that has no form here, and for what is not understood.
    """
    config, layers = _read(path)
    of_parent, sizes = {}, {"attention": ("num_key_value_heads", num_key_value_heads), "ffn": ("intermediate_size", intermediate_size)}
    for subblock, (key, given) in sizes.items():
        of_parent[subblock] = given or config.get(key) or max((of[subblock] for of in layers if isinstance(of[subblock], int)), default=0)
    return Architecture(
        tuple(
            tuple(_variant(f"{path}: layer {layer} {subblock}", subblock, found, of_parent[subblock]) for subblock, found in of.items())
            for layer, of in enumerate(layers)
        )
    )


def _variant(where: str, subblock: str, found: int | Variant, of_parent: int) -> Variant:
    if isinstance(found, Variant):
        return found
    kind = {"attention": "kv", "ffn": "w"}[subblock]
    if found > of_parent or (kind == "kv" and of_parent % found):
        raise UserError(f"{where} is {kind}{found}, which no variant of a parent with {kind}{of_parent} is")
    return PARENT if found == of_parent else Variant(kind, found)


def num_params(path: Path) -> int:
    """Parameters of the checkpoint that a config.json with `block_configs` describes; ValueError for what is not understood."""
    config, layers = _read(path)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if not config.get("head_dim") and hidden % heads:
        raise UserError(f"{path} lacks head_dim, and hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = config.get("head_dim") or hidden // heads
    total = hidden + _needed(config, "vocab_size", path) * hidden * (1 if _needed(config, "tie_word_embeddings", path) else 2)
    per_channel = {"attention": lambda kv_heads: 2 * head_dim * (heads + kv_heads), "ffn": lambda width: 3 * width}
    for layer in layers:
        for subblock, found in layer.items():
            if found != NO_OP:
                total += hidden + hidden * (hidden if found == LINEAR else per_channel[subblock](found))  # its norm, its matrices
    return total


# Keys of the whole that are read, and those that change no layer and no size. Any other may, so it is refused where it is set.
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim", "vocab_size", "num_hidden_layers")
_HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings", "pad_token_id",
    "pretraining_tp", "quantization_config", "return_dict", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
_WHOLE_KEYS = ("block_configs", "model_type", "hidden_act", "tie_word_embeddings", *_SIZES, *_HARMLESS)

# The same of a subblock of block_configs.
_SIZE_KEYS = {"attention": ("n_heads_in_group", "num_key_value_heads"), "ffn": ("ffn_mult", "intermediate_size")}
_READ_KEYS = ("no_op", "replace_with_linear", "weights_precision")  # the last one says nothing about the architecture
_MAX_SIZE = 2**31  # no size of a tensor is as large; what is has no float


def _read(path: Path) -> tuple[dict, list[dict[str, int | Variant]]]:
    """A config.json with `block_configs`, and each layer's subblocks: kv heads or width, or NO_OP or LINEAR.

    The form of NVIDIA's checkpoints (`n_heads_in_group`, `ffn_mult`) and that of its AnyModel (`num_key_value_heads`,
    `intermediate_size`), of bias-free Llama layers. ValueError that names the key which is missing or not understood.
    """
    config = read_json(path)
    if not isinstance(config, dict) or "block_configs" not in config:
        raise UserError(f"{path} has no block_configs; expected the config.json of a nemotron-nas checkpoint")
    if (model_type := config.get("model_type", TARGET)) not in (TARGET, *_FAMILIES):
        raise UserError(f"{path}: model_type is '{model_type}', whose layers are not known here; expected {TARGET}, {', '.join(_FAMILIES)}")
    biases = [key for key in config if key.endswith("_bias")]
    _require_flags(config, ("tie_word_embeddings", *biases), path)
    if on := [key for key in biases if config[key]]:
        raise UserError(f"{path} has {', '.join(on)}: only layers without biases are read")
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {key} is {value}; expected a finite number")
        if value and key not in _WHOLE_KEYS:
            raise UserError(f"{path} has {key}: {str(value)[:80]}, which is not understood: it may change what the layers are")
    blocks = config["block_configs"]
    if not isinstance(blocks, list) or not blocks:
        raise UserError(f"{path}: block_configs is {str(blocks)[:80]!r}; expected a list with an object for each layer")
    for key in _SIZES:
        if config.get(key) is not None and not _is_size(config[key]):
            raise UserError(f"{path}: {key} is {config[key]!r}; expected a whole number of at least 1")
    if config.get("num_hidden_layers", len(blocks)) != len(blocks):
        raise UserError(f"{path}: num_hidden_layers is {config['num_hidden_layers']}, but block_configs has {len(blocks)}")
    for key in ("hidden_size", "num_attention_heads"):
        _needed(config, key, path)
    return config, [_layer(config, block, f"{path}: layer {layer}") for layer, block in enumerate(blocks)]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MAX_SIZE


def _require_flags(of: dict, keys: tuple[str, ...], where: object) -> None:
    for key in keys:
        if not isinstance(of.get(key), bool | None):
            raise UserError(f"{where}: {key} is {of[key]!r}; expected true or false")


def _needed(config: dict, key: str, where: object) -> object:
    if config.get(key) is None:
        raise UserError(f"{where} lacks {key}")
    return config[key]


def _require_object(found: object, where: str) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{where} in block_configs is {str(found)[:80]!r}; expected an object")


def _refuse_odd(block: dict, known: tuple[str, ...], where: str) -> None:
    if odd := {key: value for key, value in block.items() if key not in known and value is not None and value is not False}:
        raise UserError(f"{where} has {odd}, which has no variant here")


def _layer(config: dict, block: dict, where: str) -> dict[str, int | Variant]:
    _require_object(block, where)
    _refuse_odd(block, tuple(_SIZE_KEYS), where)
    return {subblock: _subblock(config, subblock, _needed(block, subblock, where), f"{where} {subblock}") for subblock in _SIZE_KEYS}


def _subblock(config: dict, subblock: str, block: dict, where: str) -> int | Variant:
    _require_object(block, where)
    _require_flags(block, ("no_op", "replace_with_linear", "gated"), where)
    of_ffn = {"hidden_act": config.get("hidden_act", "silu"), "gated": True} if subblock == "ffn" else {}  # as the whole's: Llama's
    same = tuple(key for key, value in of_ffn.items() if block.get(key) == value)
    _refuse_odd(block, (*_SIZE_KEYS[subblock], *_READ_KEYS, *same), where)
    if of_ffn and block.get("gated") is False:
        raise UserError(f"{where} has {{'gated': False}}, which has no variant here")
    if block.get("no_op") and block.get("replace_with_linear"):
        raise UserError(f"{where} has both no_op and replace_with_linear")
    if block.get("no_op") or block.get("replace_with_linear"):
        return NO_OP if block.get("no_op") else LINEAR
    said = {key: block[key] for key in _SIZE_KEYS[subblock] if block.get(key) is not None}
    if not said:
        raise UserError(f"{where} lacks {' and '.join(_SIZE_KEYS[subblock])}: one of them says its size")
    sizes = {_size(config, key, value) for key, value in said.items()}
    if len(sizes) > 1 or None in sizes:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        raise UserError(f"{where} has {said}: no size where num_attention_heads is {heads} and hidden_size {hidden}, or two that differ")
    return sizes.pop()


def _size(config: dict, key: str, value: object) -> int | None:
    """The kv heads or the width that a key says; None where it cannot be."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if key == "ffn_mult":  # engines round up: of a width below one channel they would make 256
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return width_of(value, hidden) if number and 3 <= 2 * value * hidden < 3 * _MAX_SIZE else None
    if not _is_size(value):
        return None
    match key:
        case "intermediate_size":
            return value
        case "n_heads_in_group":
            return None if heads % value else heads // value
        case "num_key_value_heads":
            return None if heads % value else value
