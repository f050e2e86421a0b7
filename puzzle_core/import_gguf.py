"""A GGUF file as a model, the way back from `export_gguf`: a key or tensor that the model does not come from is refused by name.

transformers reads such files too, and drops what it does not know without a word: rope factors and scaling, windows, biases,
layers beyond the count. What llama.cpp takes for a key that is absent is written out here, as transformers' defaults are others.
"""
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle_core.errors import UserError

ROTATES_PAIRS = {"llama": True, "qwen2": False, "qwen3": False}  # architectures read: whether rotary channels are neighbours, not halves
_FACTORS = "rope_freqs.weight"
# What no output depends on: names and origins, how the file was quantised, and ids that only stop a generation or mark a span.
_TOLD = ("GGUF.", "general.", "quantize.", "mradermacher.", "tokenizer.chat_template", "tokenizer.ggml.fim_")
_OF_TOKENIZER = {f"tokenizer.ggml.{key}" for key in (
    "model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_space_prefix", "bos_token_id",
    "eos_token_id", "unknown_token_id", "padding_token_id", "seperator_token_id", "cls_token_id", "mask_token_id",
    "eot_token_id", "eom_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id",
)}  # fmt: skip
_ELSE = "Use the original checkpoint as the parent: conf/parent/hub.yaml or directory.yaml."


@dataclass
class _Metadata:
    """The keys of a file, and those that have been taken into account."""

    file: Path
    fields: dict[str, gguf.ReaderField]
    taken: set[str] = field(default_factory=set)

    def take(self, key: str, *default: object) -> object:
        """A value that holds for all layers; UserError if the file has one for each, or none and there is no default."""
        self.taken.add(key)
        if key not in self.fields:
            if not default:
                raise UserError(f"{self.file} has no {key}, without which there is no model. {_ELSE}")
            return default[0]
        value = self.fields[key].contents()
        if isinstance(value, list):
            raise UserError(f"{self.file}: its layers differ ({key} is {_few(value)}). Use a parent whose layers are alike.")
        return value

    def equal(self, key: str, expected: object, why: str) -> None:
        """UserError if the file has another value; what it lacks is what is expected."""
        if (value := self.take(key, expected)) != expected:
            raise UserError(f"{self.file}: {key} is {value}, read is only {expected} ({why}). {_ELSE}")

    def refuse_rest(self) -> None:
        rest = [key for key in self.fields if key not in self.taken | _OF_TOKENIZER and not key.startswith(_TOLD)]
        if rest:
            found = ", ".join(f"{key} = {_few(self.fields[key].contents())}" for key in rest)
            raise UserError(f"{self.file} says {found}: nothing here takes that into account, the model may be another one. {_ELSE}")


def _few(values: object, most: int = 4) -> str:
    if not isinstance(values, list | tuple):
        return str(values)[:80]
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


def model_of(file: Path) -> PreTrainedModel:
    """The model in the file, float32, to be saved: what is not saved of a model is on the meta device.

    UserError that names whatever in the file does not fit the model.
    """
    try:
        reader = gguf.GGUFReader(file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except OSError:
        raise
    except Exception as error:  # of a file cut off or written over, whatever comes first
        raise UserError(f"{file} is no whole GGUF file ({type(error).__name__}: {error}): fetch it again") from error
    config = _config(_Metadata(file, reader.fields), tensors)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architecture = reader.fields["general.architecture"].contents()
    expected = _names(model, architecture)
    weights = {name: tensor for name, tensor in tensors.items() if architecture != "llama" or name != _FACTORS}
    _refuse_tensors(file, {name: tuple(model.state_dict()[ours].shape) for name, ours in expected.items()}, weights)
    state = {}
    for name, ours in expected.items():
        state[ours] = _values(file, tensors[name])
        if ROTATES_PAIRS[architecture] and (".attn_q." in name or ".attn_k." in name):
            state[ours] = _rotary_halves(state[ours], config.head_dim)
    model.load_state_dict(state, strict=False, assign=True)  # all but what is tied: seen to above
    model.tie_weights()
    return model


def _names(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """What each tensor of the model is called in the file, to its own name."""
    (which,) = [enum for enum, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(which, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    return {names.get_name(ours, try_suffixes=(".weight", ".bias")): ours for ours in model.state_dict() if ours not in tied}


def _refuse_tensors(file: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, gguf.ReaderTensor]) -> None:
    found = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    faults = {
        "lacks": [name for name in expected if name not in found],
        "has, beside what its metadata describes,": [name for name in found if name not in expected],
        "has in another shape than its metadata says": [
            f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
        ],
    }
    refuse_tensors(file, faults, f"A model made of it would be another one. {_ELSE}")


def refuse_tensors(place: object, faults: dict[str, list[str]], remedy: str) -> None:
    """UserError that names what is wrong (`lacks`, `has ...`) with which tensors, the first few of each."""
    if told := "; ".join(f"{what} {_few(names)}" for what, names in faults.items() if names):
        raise UserError(f"{place} {told}. {remedy}")


def _values(file: Path, tensor: gguf.ReaderTensor) -> Tensor:
    try:
        return torch.from_numpy(np.copy(gguf.dequantize(tensor.data, tensor.tensor_type)))
    except NotImplementedError as error:
        raise UserError(f"{file}: {tensor.name} is quantised as {tensor.tensor_type.name}, which the package gguf cannot undo") from error


def _rotary_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from pairs to (first halves, second halves), as transformers rotates them; a bias too."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _config(metadata: _Metadata, tensors: dict[str, gguf.ReaderTensor]) -> PreTrainedConfig:
    """transformers' config of the model that llama.cpp computes."""
    file, take = metadata.file, metadata.take
    arch = take("general.architecture")
    if arch == "deci":
        raise UserError(f"{file} is a child already: its layers differ (architecture deci). Use a parent whose layers are alike.")
    if arch not in ROTATES_PAIRS:
        raise UserError(f"{file} is of GGUF's architecture '{arch}'; read are {', '.join(ROTATES_PAIRS)}. {_ELSE}")
    metadata.equal("general.type", "model", "an adapter or a projector is no model")
    metadata.equal("split.count", 1, "join the parts with llama-gguf-split --merge")
    take("split.no", 0), take("split.tensors.count", 0)
    metadata.equal("tokenizer.ggml.add_sep_token", False, "separators are not added")
    for key, neutral in {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1}.items():
        metadata.equal(f"{arch}.{key}", neutral, "these layers have no other form here")
    hidden, heads = take(f"{arch}.embedding_length"), take(f"{arch}.attention.head_count")
    head_dim = take(f"{arch}.attention.key_length", hidden // heads)
    metadata.equal(f"{arch}.attention.value_length", head_dim, "as long as keys are")
    metadata.equal(f"{arch}.rope.dimension_count", head_dim, "all channels of a head are rotated")
    num_tokens = len(metadata.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in metadata.fields else None
    vocab_size = take(f"{arch}.vocab_size", *([num_tokens] if num_tokens else []))
    if num_tokens not in (None, vocab_size):
        raise UserError(f"{file}: {arch}.vocab_size is {vocab_size}, and tokenizer.ggml.tokens has {num_tokens} tokens. {_ELSE}")
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": take(f"{arch}.feed_forward_length"),
        "num_hidden_layers": take(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": take(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": take(f"{arch}.context_length"),
        "rms_norm_eps": take(f"{arch}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{f"{name}_token_id": take(f"tokenizer.ggml.{key}_token_id", None) for name, key in _SPECIAL.items()},
        **_attention(metadata, arch, tensors),
    }
    values["rope_parameters"] = _rope(metadata, arch, tensors.get(_FACTORS) if arch == "llama" else None, head_dim)
    metadata.refuse_rest()
    return CONFIG_MAPPING[values.pop("model_type")](**values)


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _attention(metadata: _Metadata, arch: str, tensors: Iterable[str]) -> dict:
    """The model type, its window and its biases. llama.cpp's `llama` is Mistral too, whose layers all have the window."""
    key, context = f"{arch}.attention.sliding_window", metadata.take(f"{arch}.context_length")
    window = metadata.take(key, None) or None
    if arch != "llama":
        if window and window < context:
            raise UserError(f"{metadata.file}: {key} is {window}, but not which of its layers have that window. {_ELSE}")
        biases = {"attention_bias": "blk.0.attn_q.bias" in tensors} if arch == "qwen3" else {}
        return {"model_type": arch, "use_sliding_window": False, **biases}
    if window:
        return {"model_type": "mistral", "sliding_window": window}
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return {"model_type": "llama", **biases}


# ------------------------------------------------------------------------------------------ rotary embedding


def _rope(metadata: _Metadata, arch: str, factors: gguf.ReaderTensor | None, head_dim: int) -> dict:
    """rope_parameters: default, linear (also where only a factor is given), or Llama 3's from the tensor of factors."""
    file, take = metadata.file, metadata.take
    theta = take(f"{arch}.rope.freq_base", 10000.0)
    kind = take(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UserError(f"{file}: {arch}.rope.scaling.type is {kind}; read are none, linear and Llama 3's factors. {_ELSE}")
    original = take(f"{arch}.rope.scaling.original_context_length", None)
    take(f"{arch}.rope.scaling.finetuned", None)
    factor = take(f"{arch}.rope.scaling.factor", take(f"{arch}.rope.scale_linear", None)) or 1.0
    factor = 1.0 if kind == "none" else factor
    plain = {"rope_type": "default", "rope_theta": theta}
    if factors is None:
        return plain if factor == 1 else {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if factor != 1:
        raise UserError(f"{file} has {_FACTORS} beside {arch}.rope.scaling.factor {factor}, which transformers cannot express. {_ELSE}")
    values = _values(file, factors).flatten()
    if len(values) != head_dim // 2:
        raise UserError(f"{file}: {_FACTORS} has {len(values)} factors, expected {head_dim // 2}. {_ELSE}")
    if torch.all(values == 1):
        return plain
    if torch.all(values == values[0]):
        return {"rope_type": "linear", "rope_theta": theta, "factor": values[0].item()}
    for found in llama3_parameters(values, theta, original or 8192):
        if torch.allclose(llama3_factors(found, head_dim), values, rtol=1e-5, atol=0):
            return found
    raise UserError(f"{file}: {_FACTORS} is {_few(values.tolist())}, which are not Llama 3's for any parameters. {_ELSE}")


def frequencies(theta: float, head_dim: int) -> Tensor:
    """[head_dim / 2], in radians a token, highest first."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def llama3_factors(rope: dict, head_dim: int) -> Tensor:
    """[head_dim / 2], what Llama 3's scaling divides each frequency by: `rope_freqs.weight`."""
    config = CONFIG_MAPPING["llama"](head_dim=head_dim, rope_parameters=rope, max_position_embeddings=2**31)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return frequencies(rope["rope_theta"], head_dim) / scaled


def llama3_parameters(factors: Tensor, theta: float, original: int) -> Iterable[dict]:
    """Parameters from which Llama 3's scaling makes `factors`, if any do: the roundest first, to be tried in turn.

    1 / factor = (1 - s) / whole + s, and s is linear in the frequency between the two at which it is 0 and 1. Only those two count:
    each of original length, low and high factor may be scaled with the others.
    """
    if not torch.all(torch.isfinite(factors) & (factors >= 1)):
        return
    per_token = (frequencies(theta, len(factors) * 2) / (2 * torch.pi)).double()
    whole = factors.max().item()
    s = (1 / factors.double() - 1 / whole) / (1 - 1 / whole)
    points = list(zip(per_token.tolist(), s.tolist(), strict=True))
    between = [(x, y) for x, y in points if 1e-6 < y < 1 - 1e-6]
    below = max(x for x, y in points if y <= 1e-6)
    above = min((x for x, y in points if y >= 1 - 1e-6), default=None)
    if len(between) > 1:
        slope, at_0 = np.polyfit(*zip(*between, strict=True), deg=1).tolist()
        zero = -at_0 / slope if slope > 0 else 0.0
    elif between:  # the flattest line that leaves those around at 0 and 1
        ((x, y),) = between
        slope = max([y / (x - below)] + ([(1 - y) / (above - x)] if above else []))
        zero = x - y / slope
    elif above:
        slope, zero = 1 / (above - below), below
    else:
        return
    if slope <= 0 or zero <= 0:
        return
    one = zero + 1 / slope
    high, length = one / zero, max(1, round(1 / zero))
    for three in ((1.0, max(2.0, float(round(high))), length), (1.0, high, length), (zero * original, one * original, original)):
        keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        yield {"rope_type": "llama3", "rope_theta": theta, "factor": whole, **dict(zip(keys, three, strict=True))}
