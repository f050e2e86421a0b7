"""Costs from differences: a model with a variant in its layers, timed turn by turn against the parent.

What a variant saves is the median of the turns' ratios, a layer's share of it, so that drift of the machine cancels; what no_op
saves is what the parent's subblock costs.

    saved(v) = (1 - median over turns of t_v / t_parent) * t_parent / layers with the variant
    cost(v)  = saved(no_op) - saved(v)             the parent saves 0
    outside  = t_parent - layers * (cost of the parent's attention + cost of its FFN)

A difference that noise pushes below 0 is written as 0, with its spread: half the interquartile range of the turns, of differences
the root of the sum of squares.
"""
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from puzzle_core.spec import NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Variant

TIMES = ("prefill_ms", "decode_ms")
BASE = [*((s, v) for s in SUBBLOCKS for v in (PARENT, NO_OP)), (OUTSIDE, PARENT)]  # what the others are measured against
Option = tuple[str, Variant]
Costs = dict[str, tuple[float, float]]  # metric: value and spread


@dataclass(frozen=True)
class Turns:
    """The parent's and another model's times, turn by turn."""

    parent: list[dict[str, float]]
    other: list[dict[str, float]]

    def saved(self, metric: str) -> tuple[float, float]:
        """What the other saves, as a share of the parent's time: the median of the turns, and half their interquartile range."""
        ratios = [other[metric] / parent[metric] for parent, other in zip(self.parent, self.other, strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        return 1 - float(middle), float(high - low) / 2


def in_turn(parent: Callable[[], dict[str, float]], other: Callable[[], dict[str, float]], repeats: int, warmup: int) -> Turns:
    """`repeats` times of each of the two, after `warmup` that do not count."""
    turns = Turns([], [])
    for turn in range(warmup + repeats):
        pair = [(parent, turns.parent), (other, turns.other)]
        for timed, times in pair if turn % 2 else pair[::-1]:  # there and back, so that drift within a turn cancels too
            time = timed()
            if turn >= warmup:
                times.append(time)
    return turns


def base_times(turns: Mapping[str, Turns], num_layers: int, num_changed: int) -> dict[Option, Costs]:
    """Times of the parent's subblocks, of none, and of what is outside, from the `turns` of no_op in each subblock.

    The models have `num_layers` layers, of which `num_changed` have the variant.
    """
    costs: dict[Option, Costs] = {option: {} for option in BASE}
    for metric in TIMES:
        total = statistics.median(turn[metric] for some in turns.values() for turn in some.parent)
        outside, spread = total, 0.0
        for subblock, some in turns.items():
            saved, saved_spread = (total / num_changed * share for share in some.saved(metric))
            costs[subblock, PARENT][metric] = max(0.0, saved), saved_spread
            costs[subblock, NO_OP][metric] = 0.0, saved_spread
            outside, spread = outside - num_layers * costs[subblock, PARENT][metric][0], math.hypot(spread, num_layers * saved_spread)
        costs[OUTSIDE, PARENT][metric] = max(0.0, outside), spread
    return costs


def times_of(turns: Turns, subblock: str, base: Mapping[Option, Costs], num_layers: int, num_changed: int) -> Costs:
    """Times of a variant of `subblock`, from its `turns` and the `base` rows."""
    costs = {}
    for metric in TIMES:
        total = base[OUTSIDE, PARENT][metric][0] + num_layers * sum(base[s, PARENT][metric][0] for s in SUBBLOCKS)
        saved, spread = (total / num_changed * share for share in turns.saved(metric))
        whole, whole_spread = base[subblock, PARENT][metric]
        costs[metric] = max(0.0, whole - saved), math.hypot(spread, whole_spread)
    return costs
