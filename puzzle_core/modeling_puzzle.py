"""A transformers causal LM whose layers differ. Travels with every child checkpoint; needs only torch and transformers.

`config.per_layer_config` says how each layer deviates from the parent: changed sizes (`{"num_key_value_heads": 1}`,
`{"sliding_window": 1024}`), `skip` (the subblock is gone, its norms too) and `linear_subblocks` (one matrix in its
place). `config.puzzle` says where the parent's family keeps its layers and subblocks. Load it with
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`; every other way to load it is an error, see `_ChildConfig`.
"""
import copy
import functools
import inspect

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "puzzle_"  # before the parent's model type
STOCK_REFUSES = "this is a Puzzle child, whose layers differ: load it with AutoModelForCausalLM and trust_remote_code=True"
SUBBLOCKS = {"attention": "attention", "mlp": "ffn"}  # name in `skip` and `linear_subblocks`: name in `config.puzzle`


class CountingLayer(DynamicLayer):
    """A cache layer of width 0 that still counts its tokens; DynamicLayer takes an empty tensor for an empty cache."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0


def _keep_position(past_key_values, hidden_BTD: torch.Tensor, layer_idx: int) -> None:
    """Let the cache count these tokens without storing them: keys and values of width 0.

    transformers reads the position of the next token off layer 0's cache, and what a mask covers off that of the first layer
    of its kind, sliding or full, also where these have no attention. All such layers count, so that no slot of a cache is empty.
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

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        _keep_position(layer_past if past_key_values is None else past_key_values, hidden_states, self.layer_idx)
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class LinearAttention(nn.Linear):
    """One matrix in place of attention: every token attends to itself. No KV cache."""

    def __init__(self, hidden_size: int, bias: bool, layer_idx: int):
        super().__init__(hidden_size, hidden_size, bias=bias)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        _keep_position(layer_past if past_key_values is None else past_key_values, hidden_states, self.layer_idx)
        return super().forward(hidden_states), None


class NoOpFfn(nn.Module):
    """A feed-forward subblock that adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(()).expand_as(hidden_states)


class LinearFfn(nn.Linear):
    """One matrix in place of the feed-forward subblock."""


class GroupedAttention(nn.Module):
    """Attention with fewer key-value heads for families whose own module has as many as query heads.

    Made of `original`, the family's module for the same layer, whose names (`projections`: query, key, value, last; one
    name for the first three is one fused projection), biases, scale and dropout it keeps.
    """

    def __init__(self, original: nn.Module, config, num_kv_heads: int, projections: list[str], layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.projections, self.is_causal = config, layer_idx, projections, True
        self.head_dim, self.num_key_value_heads = original.head_dim, num_kv_heads
        self.num_key_value_groups = original.num_heads // num_kv_heads
        self.scaling = getattr(original, "scaling", 1.0)  # gpt_neo does not scale
        dropout = getattr(original, "attn_dropout", getattr(original, "dropout", 0.0))
        self.attention_dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        self.resid_dropout = getattr(original, "resid_dropout", nn.Identity())
        q, k, v, last = projections
        size = num_kv_heads * self.head_dim
        new = {q: self._like(getattr(original, q), original.num_heads * self.head_dim + 2 * size)} if q == k == v else {
            q: getattr(original, q), k: self._like(getattr(original, k), size), v: self._like(getattr(original, v), size),
        }  # fmt: skip
        for name, projection in {**new, last: getattr(original, last)}.items():
            self.add_module(name, projection)

    @staticmethod
    def _like(projection: nn.Module, num_outputs: int) -> nn.Module:
        if isinstance(projection, Conv1D):
            return Conv1D(num_outputs, projection.nx)
        return nn.Linear(projection.in_features, num_outputs, bias=projection.bias is not None)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, layer_past=None, **kwargs):
        cache = layer_past if past_key_values is None else past_key_values
        projected = torch.cat([getattr(self, name)(hidden_states) for name in dict.fromkeys(self.projections[:3])], dim=-1)
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        kv = self.num_key_value_heads
        query, key, value = heads.split([kv * self.num_key_value_groups, kv, kv], dim=1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # sdpa takes the additive masks of `eager` too, so it needs no second implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        output = getattr(self, self.projections[3])(output.flatten(2))
        return self.resid_dropout(output), weights


def use_own_mask(attention: nn.Module, window: int | None, index: int) -> None:
    """From now on `attention` is called with the mask of its own `window` and cache layer, whatever the model's mask is.

    transformers makes one mask of a kind for all layers; here windows differ from layer to layer, and so do cache lengths.
    A cache keeps no more of such a layer than its window.
    """
    attention.window, attention.padding_mask = window, None  # the [B, T] mask of the model, see _PerLayer

    def before(module, args, kwargs):
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        cache = next((kwargs[name] for name in ("past_key_values", "layer_past") if kwargs.get(name) is not None), None)
        if window and cache is not None:
            _slide(cache, index, window)
        make = create_sliding_window_causal_mask if window else create_causal_mask
        mask = make(module.config, hidden_BTD, module.padding_mask, cache, layer_idx=index)
        return args, {**kwargs, "attention_mask": mask}

    attention.register_forward_pre_hook(before, with_kwargs=True)


def _slide(cache, index: int, window: int) -> None:
    """Let the cache layer, dynamic or static, keep `window` tokens, if nothing is in it yet."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    slot = cache.layers[index]
    if slot.is_initialized:
        return
    if isinstance(slot, StaticLayer):
        if slot.max_cache_len > window:
            cache.layers[index] = StaticSlidingWindowLayer(slot.max_cache_len, window)
    elif getattr(slot, "sliding_window", None) != window:
        cache.layers[index] = DynamicSlidingWindowLayer(window)


def window_of(config, index: int) -> int | None:
    """The sliding window of a layer of transformers' own."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if types is None or types[index] == "sliding_attention" else None


def get_subblock(layer: nn.Module, modules: list[str]) -> nn.Module:
    """The module of a subblock; where the layer calls several `modules` in a row, they as one."""
    parts = {name: layer.get_submodule(name) for name in modules}
    first, *rest = parts.values()
    if all(isinstance(part, nn.Identity) for part in rest):
        return first
    whole = nn.Sequential()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole.train(first.training)


def set_subblock(layer: nn.Module, modules: list[str], module: nn.Module) -> None:
    """Put `module`, or the parts of what `get_subblock` gave, in the place of a subblock."""
    parts = list(module) if isinstance(module, nn.Sequential) else [module, *(nn.Identity() for _ in modules[1:])]
    for name, part in zip(modules, parts, strict=True):
        layer.set_submodule(name, part)


def build_layer(layer: nn.Module, config, changes: dict, index: int, puzzle: dict) -> nn.Module:
    """An untrained layer like `layer`, deviating from `config` as `changes` (an entry of per_layer_config) says."""
    config = copy.copy(config)
    for key, value in changes.items():
        if key not in ("skip", "linear_subblocks"):
            setattr(config, key, value)
    windowed = puzzle["window"] in changes
    if windowed and getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * len(config.layer_types)
    built = type(layer)(config, index)
    for name, subblock in SUBBLOCKS.items():
        where = puzzle[subblock]
        if name in changes.get("skip", ()):
            set_subblock(built, where["modules"], NoOpAttention(index) if subblock == "attention" else NoOpFfn())
            for norm in where["norms"]:
                built.set_submodule(norm, nn.Identity())
        elif name in changes.get("linear_subblocks", ()):
            size, own = config.hidden_size, get_subblock(built, where["modules"])
            bias = any(parameter.endswith("bias") for parameter, _ in own.named_parameters())
            linear = LinearAttention(size, bias, index) if subblock == "attention" else LinearFfn(size, size, bias)
            set_subblock(built, where["modules"], linear)
        elif subblock == "attention" and (windowed or "num_key_value_heads" in changes):
            _change_attention(built, config, windowed, index, puzzle)
    return built


def _change_attention(layer: nn.Module, config, windowed: bool, index: int, puzzle: dict) -> None:
    """Attention with the window and the number of key-value heads of `config`, by the family's module if that can."""
    modules, projections = puzzle["attention"]["modules"], puzzle["attention"].get("projections")
    attention = get_subblock(layer, modules)
    if projections is None:
        if windowed:
            use_own_mask(attention, config.sliding_window, index)
        return
    windowed = windowed or getattr(attention, "attention_type", None) == "local"  # gpt_neo
    grouped = GroupedAttention(attention, config, getattr(config, "num_key_value_heads", attention.num_heads), projections, index)
    if windowed:
        config.sliding_window = getattr(config, puzzle["window"])
        use_own_mask(grouped, config.sliding_window, index)
    set_subblock(layer, modules, grouped)


def _padding_alone(attention_mask=None, **kwargs):
    """In place of the masks that `generate` makes in advance for compiled decoding: the layers make their own."""
    return attention_mask


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
        attentions = [get_subblock(layer, config.puzzle["attention"]["modules"]) for layer in layers]
        if any(hasattr(attention, "window") for attention in attentions):
            self._use_own_masks(attentions, uniform)

    def _use_own_masks(self, attentions: list[nn.Module], config) -> None:
        """Where one layer makes its own mask, all do, since the model's is sized for some other layer's cache."""
        for index, attention in enumerate(attentions):
            if not hasattr(attention, "window") and not isinstance(attention, (NoOpAttention, LinearAttention)):
                use_own_mask(attention, window_of(config, index), index)
        names = list(inspect.signature(self.base_model.forward).parameters)

        def before(module, args, kwargs):
            mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
            for attention in module.modules():  # and not `attentions`: the model may be a copy
                if hasattr(attention, "padding_mask"):
                    attention.padding_mask = mask

        self.base_model.register_forward_pre_hook(before, with_kwargs=True)
        self.create_masks_for_generate = _padding_alone

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        self._tell_layers("_attn_implementation_internal")

    def set_experts_implementation(self, *args, **kwargs):
        super().set_experts_implementation(*args, **kwargs)
        self._tell_layers("_experts_implementation_internal")

    def _tell_layers(self, key: str) -> None:
        """Layers that deviate have configs of their own, which transformers does not look for."""
        for module in self.get_submodule(self.config.puzzle["layers"]).modules():
            if hasattr(module, "config"):
                setattr(module.config, key, getattr(self.base_model.config, key))

    def _get_static_cache_init_shape(self):
        """Layers without attention take no room in a static cache either."""
        shape = super()._get_static_cache_init_shape()
        if shape is None:
            return None
        layers = self.get_submodule(self.config.puzzle["layers"])
        num_heads, head_dim = (each if isinstance(each, list) else [each] * len(layers) for each in shape)
        modules = self.config.puzzle["attention"]["modules"]
        empty = [isinstance(get_subblock(layer, modules), (NoOpAttention, LinearAttention)) for layer in layers]
        heads = [1 if e else n for e, n in zip(empty, num_heads, strict=True)]
        return heads, [0 if e else d for e, d in zip(empty, head_dim, strict=True)]


class _ChildConfig:
    """Mixed into a family's config: what makes every class but ours refuse the checkpoint.

    Auto classes do not know the model type, so without `trust_remote_code` they stop. The parent's class called directly only
    warns of another model type and of missing weights; but it takes the name of the weights' file from `transformers_weights`,
    and raises a ValueError with what stands there. Tokenizers load, because a bare config does if it has `num_hidden_layers`.
    """

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        ours = {key: value for key, value in config_dict.items() if key not in ("model_type", "transformers_weights")}
        return super().from_dict(ours, **kwargs)  # the model type is the class's, also of a config made from the parent's

    def to_dict(self):
        return {**super().to_dict(), "num_hidden_layers": self.num_hidden_layers, "transformers_weights": STOCK_REFUSES}


@functools.cache
def child_config_class(base: type) -> type:
    """The config of children of parents with config class `base`, e.g. PuzzleLlamaConfig of LlamaConfig."""
    model_type = MODEL_TYPE + base.model_type
    if (mapping := get_checkpoint_conversion_mapping(base.model_type)) is not None:  # files have experts apart, models fused
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    names = {"__module__": __name__, "model_type": model_type, "_auto_class": "AutoConfig"}
    return type(f"Puzzle{base.__name__}", (_ChildConfig, base), names)


@functools.cache
def child_class(base: type) -> type:
    """The class of children of parents of class `base`, e.g. PuzzleLlamaForCausalLM of LlamaForCausalLM."""
    names = {"__module__": __name__, "config_class": child_config_class(base.config_class), "_auto_class": "AutoModelForCausalLM"}
    return type(f"Puzzle{base.__name__}", (_PerLayer, base), names)


def __getattr__(name: str) -> type:
    """`auto_map` names PuzzleXForCausalLM and PuzzleXConfig; each is made from transformers' X when it is asked for."""
    base = getattr(transformers, name.removeprefix("Puzzle"), None) if name.startswith("Puzzle") else None
    if base is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return child_config_class(base) if issubclass(base, PreTrainedConfig) else child_class(base)
