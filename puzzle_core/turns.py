"""Costs from differences: a model with a variant in its layers, timed turn by turn against the parent.

What a variant saves is the median of the turns' ratios, a layer's share of it, so that drift of the machine cancels. What no_op in
both subblocks saves is what the parent's block costs, and what each saves alone says how that divides.

    saved(v)     = (1 - median over turns of t_v / t_parent) * t_parent / layers with the variant
    cost(parent) = saved(no_op in both) * saved(no_op) / (saved(no_op in attention) + saved(no_op in FFN))
    cost(v)      = cost(parent) - saved(v)
    outside      = t_parent - layers * saved(no_op in both)

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


def check_counts(preset: object, **least: int) -> None:
    """ValueError where a number of a preset of conf/hardware/ is below the least that makes sense."""
    for name, number in least.items():
        if getattr(preset, name) < number:
            raise ValueError(f"hardware.{name} is {getattr(preset, name)}; expected at least {number}")


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
    """Times of the parent's subblocks, of none, and of what is outside.

    `turns` are of no_op in each subblock, and under `outside` of no_op in both, what is left of which is outside. The models have
    `num_layers` layers, of which `num_changed` are changed.
    """
    costs: dict[Option, Costs] = {option: {} for option in BASE}
    for metric in TIMES:
        total = statistics.median(turn[metric] for some in turns.values() for turn in some.parent)
        saved, spread = {}, {}
        for key, some in turns.items():
            share, of_share = some.saved(metric)
            saved[key], spread[key] = max(0.0, share) * total / num_changed, of_share * total / num_changed
        apart = sum(saved[s] for s in SUBBLOCKS)
        for s in SUBBLOCKS:
            share = saved[s] / apart if apart else 1 / len(SUBBLOCKS)
            costs[s, PARENT][metric] = saved[OUTSIDE] * share, spread[s]
            costs[s, NO_OP][metric] = 0.0, spread[s]
        costs[OUTSIDE, PARENT][metric] = max(0.0, total - num_layers * saved[OUTSIDE]), num_layers * spread[OUTSIDE]
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
