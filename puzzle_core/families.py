"""Where each model family keeps what we change: data, not code.

The defaults describe Llama; a family that lays its modules out the same way is one line of FAMILIES. `layouts` holds it against
the modules of each parent that is loaded.
Module names are relative to the causal LM (`layers`), to a layer (`module`, `more`, norms) or to a subblock.
"""
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from puzzle_core.errors import UserError
from puzzle_core.spec import ATTENTION, FFN, did_you_mean

IN_CONFIG = {ATTENTION: "attention", FFN: "mlp"}  # our subblocks as per_layer_config's `skip` names them
SIZED = {ATTENTION: ("kv", "window"), FFN: ("w", "e")}  # kinds of variants that have a size, by subblock


@dataclass(frozen=True)
class Attention:
    """Names inside the attention subblock; one name for `q`, `k` and `v` is one fused projection, in that order."""

    module: str = "self_attn"
    norms: tuple[str, ...] = ("input_layernorm",)  # belong to this subblock alone: gone where it is skipped
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    last: str = "o_proj"  # the projection back into the residual stream
    multi_head: bool = False  # the family's own module knows no key-value heads: GroupedAttention stands in for it

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    @property
    def first(self) -> str:
        """What a linear stand-in starts from."""
        return self.v


@dataclass(frozen=True)
class Ffn:
    """Names inside the FFN subblock; a name twice in `inner` is one fused projection."""

    module: str = "mlp"
    more: tuple[str, ...] = ()  # where the layer itself calls the parts in a row: those after `module`
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    inner: tuple[str, ...] = ("gate_proj", "up_proj")  # projections whose output channels are the FFN's channels
    last: str = "down_proj"
    router: str = ""  # a mixture of experts: the module whose first output are the logits of the experts

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, *self.more)

    @property
    def first(self) -> str:
        """What a linear stand-in starts from."""
        return self.inner[-1]


KV, W, WINDOW = {"kv": "num_key_value_heads"}, {"w": "intermediate_size"}, {"window": "sliding_window"}


@dataclass(frozen=True)
class Family:
    """One model family: where its layers are, and which config key holds each size that a variant can change."""

    layers: str = "model.layers"
    attention: Attention = field(default_factory=Attention)
    ffn: Ffn = field(default_factory=Ffn)
    size_keys: dict[str, str] = field(default_factory=lambda: KV | W)
    returns_tuple: bool = False  # a layer gives back (hidden states, attention weights), not hidden states alone
    post_norm_unless: str = ""  # config key; where it is false, the norms act on the residual stream and always stay
    requires: dict[str, object] = field(default_factory=dict)  # config values without which the layout is another one
    constants: tuple[str, ...] = ()  # patterns of tensors that old checkpoints hold and the class computes itself

    def subblock(self, name: str) -> Attention | Ffn:
        return {ATTENTION: self.attention, FFN: self.ffn}[name]

    def whole_size(self, kind: str, config: Any) -> int:
        """The parent's own size of `kind`, whose key may be missing or empty in its config."""
        defaults = {"kv": "num_attention_heads", "window": "max_position_embeddings"}
        own = getattr(config, self.size_keys[kind], None)
        return own or (4 * config.hidden_size if kind == "w" else getattr(config, defaults[kind]))

    def to_json(self) -> dict:
        """What a saved child carries in its config.json, for the modelling file that rebuilds it."""
        section = {"layers": self.layers, "window": self.size_keys.get("window")}
        for name in (ATTENTION, FFN):
            names = self.subblock(name)
            section[name] = {"modules": list(names.modules), "norms": list(names.norms)}
        if self.attention.multi_head:
            section[ATTENTION]["projections"] = [self.attention.q, self.attention.k, self.attention.v, self.attention.last]
        return section


EXPERTS = Ffn(inner=("experts.gate_up_proj", "experts.gate_up_proj"), last="experts.down_proj", router="gate")
GEMMA = Family(
    attention=Attention(norms=("input_layernorm", "post_attention_layernorm")),
    ffn=Ffn(norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    size_keys=KV | W | WINDOW,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(size_keys=KV | W | WINDOW),
    "qwen2": Family(size_keys=KV | W | WINDOW),
    "qwen3": Family(size_keys=KV | W | WINDOW),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": Family(attention=Attention(norms=("post_attention_layernorm",)), ffn=Ffn(norms=("post_feedforward_layernorm",))),
    "phi3": Family(
        attention=Attention(q="qkv_proj", k="qkv_proj", v="qkv_proj"),
        ffn=Ffn(inner=("gate_up_proj", "gate_up_proj")),
        size_keys=KV | W | WINDOW,
    ),
    "qwen3_moe": Family(
        ffn=EXPERTS,
        size_keys=KV | WINDOW | {"e": "num_experts"},
        requires={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "mixtral": Family(ffn=EXPERTS, size_keys=KV | WINDOW | {"e": "num_local_experts"}),
    "gpt2": Family(
        layers="transformer.h",
        attention=Attention("attn", ("ln_1",), q="c_attn", k="c_attn", v="c_attn", last="c_proj", multi_head=True),
        ffn=Ffn(norms=("ln_2",), inner=("c_fc",), last="c_proj"),
        size_keys=KV | {"w": "n_inner"},
        requires={"add_cross_attention": False},
    ),
    "gpt_neo": Family(
        layers="transformer.h",
        attention=Attention("attn.attention", ("ln_1",), last="out_proj", multi_head=True),
        ffn=Ffn(norms=("ln_2",), inner=("c_fc",), last="c_proj"),
        size_keys=KV | W | {"window": "window_size"},
        returns_tuple=True,
        constants=(r"\.attn\.attention\.(bias|masked_bias)$",),
    ),
    "opt": Family(
        layers="model.decoder.layers",
        attention=Attention(norms=("self_attn_layer_norm",), last="out_proj", multi_head=True),
        ffn=Ffn("fc1", ("activation_fn", "fc2"), ("final_layer_norm",), inner=("fc1",), last="fc2"),
        size_keys=KV | {"w": "ffn_dim"},
        post_norm_unless="do_layer_norm_before",
    ),
}


def family_of(model_type: str) -> Family:
    """The descriptor of a transformers `model_type`; ValueError naming the known ones otherwise."""
    if model_type not in FAMILIES:
        hint = did_you_mean(model_type, FAMILIES)
        raise UserError(
            f"unknown model family '{model_type}'.{hint} Known: {', '.join(sorted(FAMILIES))}. "
            "A family with Llama's layout is one line in puzzle_core/families.py."
        )
    return FAMILIES[model_type]


def family_for(config: Any) -> Family:
    """The descriptor of one parent or child, whose config may move things; ValueError for a layout that the family's does not cover."""
    family = family_of(config.model_type.removeprefix("puzzle_"))  # which modeling_puzzle puts before a child's
    for key, expected in family.requires.items():
        if (value := getattr(config, key)) != expected:
            raise UserError(f"{config.model_type} parents with {key}={value} are not supported, only with {key}={expected}: see FAMILIES")
    if family.post_norm_unless and not getattr(config, family.post_norm_unless):
        bare = {s: dataclasses.replace(family.subblock(s), norms=()) for s in (ATTENTION, FFN)}
        family = dataclasses.replace(family, **bare)
    return family
