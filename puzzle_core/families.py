"""Where each model family keeps what we change: data, not code.

The defaults describe Llama; a family that lays its modules out the same way is one line of FAMILIES.
Module names are relative to the causal LM (`layers`), to a layer (`attention`, `ffn`, norms) or to a subblock.
"""
import difflib
from dataclasses import dataclass, field

from puzzle_core.spec import ATTENTION, FFN


@dataclass(frozen=True)
class Attention:
    """Names inside the attention subblock."""

    module: str = "self_attn"
    norms: tuple[str, ...] = ("input_layernorm",)  # belong to this subblock alone: gone where it is skipped
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    first: str = "v_proj"  # what a linear stand-in starts from
    last: str = "o_proj"  # the projection back into the residual stream


@dataclass(frozen=True)
class Ffn:
    """Names inside the FFN subblock."""

    module: str = "mlp"
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    inner: tuple[str, ...] = ("gate_proj", "up_proj")  # projections whose output channels are the FFN's channels
    first: str = "up_proj"  # the one of `inner` that a linear stand-in starts from
    last: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """One model family: where its layers are, and which config key holds each size that a variant can change."""

    layers: str = "model.layers"
    attention: Attention = field(default_factory=Attention)
    ffn: Ffn = field(default_factory=Ffn)
    size_keys: dict[str, str] = field(
        default_factory=lambda: {"kv": "num_key_value_heads", "w": "intermediate_size"}
    )

    def subblock(self, name: str) -> Attention | Ffn:
        return {ATTENTION: self.attention, FFN: self.ffn}[name]

    def to_json(self) -> dict:
        """What a saved child carries in its config.json, for the modelling file that rebuilds it."""
        return {
            "layers": self.layers,
            **{s: {"module": self.subblock(s).module, "norms": list(self.subblock(s).norms)} for s in (ATTENTION, FFN)},
        }


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


def family_of(model_type: str) -> Family:
    """The descriptor of a transformers `model_type`; ValueError naming the known ones otherwise."""
    if model_type not in FAMILIES:
        close = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"unknown model family '{model_type}'.{hint} Known: {', '.join(sorted(FAMILIES))}. "
            "A family with Llama's layout is one line in puzzle_core/families.py."
        )
    return FAMILIES[model_type]
