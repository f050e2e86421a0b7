"""A transformers causal LM whose layers differ. Travels with every child checkpoint; needs only torch and transformers.

`config.per_layer_config` says how each layer deviates from the parent: changed sizes (`{"num_key_value_heads": 1}`),
`skip` (the subblock is gone, its norms too) and `linear_subblocks` (one matrix in its place). `config.puzzle` says
where the parent's family keeps its layers and subblocks. Load it with
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.
"""
import copy
import functools

import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

SUBBLOCKS = {"attention": "attention", "mlp": "ffn"}  # name in `skip` and `linear_subblocks`: name in `config.puzzle`


class CountingLayer(DynamicLayer):
    """A cache layer of width 0 that still counts its tokens; DynamicLayer takes an empty tensor for an empty cache."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0


def _keep_position(past_key_values, hidden_BTD: torch.Tensor, layer_idx: int) -> None:
    """Let the cache count these tokens without storing them: keys and values of width 0.

    transformers reads the position of the next token off layer 0's cache, also where layer 0 has no attention.
    """
    if past_key_values is not None:
        empty = hidden_BTD.new_empty(hidden_BTD.shape[0], 1, hidden_BTD.shape[1], 0)
        past_key_values.update(empty, empty, layer_idx)
        slot = past_key_values.layers[layer_idx]
        if type(slot) is DynamicLayer:  # not slot.__class__ = ...: torch.compile cannot trace that
            counting = CountingLayer()
            counting.update(slot.keys, slot.values)
            past_key_values.layers[layer_idx] = counting


class NoOpAttention(nn.Module):
    """Attention that adds nothing to the residual stream and keeps no KV cache."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        _keep_position(past_key_values, hidden_states, self.layer_idx)
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class LinearAttention(nn.Linear):
    """One matrix in place of attention: every token attends to itself. No KV cache."""

    def __init__(self, hidden_size: int, bias: bool, layer_idx: int):
        super().__init__(hidden_size, hidden_size, bias=bias)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        _keep_position(past_key_values, hidden_states, self.layer_idx)
        return super().forward(hidden_states), None


class NoOpFfn(nn.Module):
    """A feed-forward subblock that adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(()).expand_as(hidden_states)


class LinearFfn(nn.Linear):
    """One matrix in place of the feed-forward subblock."""


def build_layer(layer: nn.Module, config, changes: dict, index: int, puzzle: dict) -> nn.Module:
    """An untrained layer like `layer`, deviating from `config` as `changes` (an entry of per_layer_config) says."""
    config = copy.copy(config)
    for key, value in changes.items():
        if key not in ("skip", "linear_subblocks"):
            setattr(config, key, value)
    built = type(layer)(config, index)
    for name, subblock in SUBBLOCKS.items():
        where = puzzle[subblock]
        if name in changes.get("skip", ()):
            setattr(built, where["module"], NoOpAttention(index) if subblock == "attention" else NoOpFfn())
            for norm in where["norms"]:
                setattr(built, norm, nn.Identity())
        elif name in changes.get("linear_subblocks", ()):
            size, bias = config.hidden_size, where["bias"]
            linear = LinearAttention(size, bias, index) if subblock == "attention" else LinearFfn(size, size, bias)
            setattr(built, where["module"], linear)
    return built


class _PerLayer:
    """Mixed into a family's causal LM: builds each layer from its own entry of per_layer_config."""

    def __init__(self, config, *args, **kwargs):
        uniform = copy.deepcopy(config)
        uniform.per_layer_config = None
        super().__init__(uniform, *args, **kwargs)
        layers = self.get_submodule(config.puzzle["layers"])
        for index, changes in (config.to_dict().get("per_layer_config") or {}).items():
            layers[int(index)] = build_layer(layers[int(index)], uniform, changes, int(index), config.puzzle)
        config._attn_implementation = uniform._attn_implementation
        self.config = config

    def _get_static_cache_init_shape(self):
        """Layers without attention take no room in a static cache either."""
        shape = super()._get_static_cache_init_shape()
        if shape is None:
            return None
        layers = self.get_submodule(self.config.puzzle["layers"])
        num_heads, head_dim = (each if isinstance(each, list) else [each] * len(layers) for each in shape)
        attention = self.config.puzzle["attention"]["module"]
        empty = [isinstance(getattr(layer, attention), (NoOpAttention, LinearAttention)) for layer in layers]
        heads = [1 if e else n for e, n in zip(empty, num_heads, strict=True)]
        return heads, [0 if e else d for e, d in zip(empty, head_dim, strict=True)]


@functools.cache
def child_class(base: type) -> type:
    """The class of children of parents of class `base`, e.g. PuzzleLlamaForCausalLM of LlamaForCausalLM."""
    return type(f"Puzzle{base.__name__}", (_PerLayer, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """`auto_map` names PuzzleXForCausalLM; the class is made from transformers' XForCausalLM when it is asked for."""
    base = getattr(transformers, name.removeprefix("Puzzle"), None) if name.startswith("Puzzle") else None
    if base is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return child_class(base)
