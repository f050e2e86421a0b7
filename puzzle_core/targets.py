"""What each export target can express: rules that the search and the exporters share, so that one never chooses what the
other must refuse. No torch here.
"""
from dataclasses import dataclass

import pandas as pd

from puzzle_core.errors import UserError
from puzzle_core.spec import ATTENTION, FFN, NO_OP, Variant, did_you_mean, halves, parse_variant


@dataclass(frozen=True)
class Target:
    """A format that a serving engine reads, and which variants have a form in it."""

    engines: str
    kinds: dict[str, tuple[str, ...]]  # subblock: the kinds of its variants that have a form
    width_multiple: int  # FFN widths are multiples of this


_HEADS_AND_WIDTHS = {ATTENTION: ("parent", "kv", "no_op"), FFN: ("parent", "w", "no_op")}
TARGETS: dict[str, Target] = {
    "gguf": Target("llama.cpp", _HEADS_AND_WIDTHS, width_multiple=1),
    "nemotron-nas": Target("vLLM and TensorRT-LLM", _HEADS_AND_WIDTHS, width_multiple=256),
}


def target_named(name: str) -> Target:
    if name not in TARGETS:
        hint = did_you_mean(name, TARGETS)
        raise UserError(f"unknown export target '{name}'.{hint} Known: {', '.join(TARGETS)}.")
    return TARGETS[name]


def why_not(name: str, layer: int, subblock: str, variant: Variant) -> str | None:
    """Why target `name` has no form for this choice; None if it has one."""
    target = target_named(name)
    if variant.kind not in target.kinds[subblock]:
        return f"{name} has no form for it"
    if (layer, subblock, variant) == (0, ATTENTION, NO_OP):
        return f"{target.engines} need attention in layer 0: the engine takes its head size, or starts its residual, there"
    if variant.kind == "w" and variant.size % target.width_multiple:
        return f"{target.engines} round FFN widths up to a multiple of {target.width_multiple}"
    return None


def expressible(scores: pd.DataFrame, name: str | None) -> pd.DataFrame:
    """The rows of a scores table that target `name` can express; all of them where there is no target (None)."""
    if name is None:
        return scores
    target_named(name)
    rows = [(row.layer, row.subblock, parse_variant(row.subblock, row.variant)) for row in scores.itertuples()]
    fits = [all(why_not(name, layer, *half) is None for half in halves(subblock, variant)) for layer, subblock, variant in rows]
    return scores[fits]
