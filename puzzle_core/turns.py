"""Costs from differences: what a variant saves in the parent, and what it saves where the other subblock does nothing.

A turn times four models: the parent; with a variant in its layers; with no_op in the other subblock of these layers; with
both. Costs that add up are a plane; what a machine does is not quite one (what is small stays in its caches). The mean of both
differences, a Shapley value, is exact at the parent and at the model without blocks, and off by half as much between them.

    saved(v)     = median over turns of (t_parent - t_v + t_alone - t_v_alone) / (2 * t_parent) * t_parent / layers with the variant
    cost(parent) = saved(no_op)
    cost(v)      = cost(parent) - saved(v)
    outside      = t_parent - sum over layers of (saved(no_op) of attention + of the FFN)

Where the parent's layers differ, each group of layers that are alike is changed and measured apart.

A turn's ratios are taken in that turn, so that drift of the machine cancels. A difference that noise pushes below 0 is written
as 0, with its spread: half the interquartile range of the turns, of differences the root of the sum of squares.
"""
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from puzzle_core.errors import UserError
from puzzle_core.spec import NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Variant

TIMES = ("prefill_ms", "decode_ms")
Layers = tuple[int, ...]  # layers that are alike; () of what is outside the blocks
Option = tuple[Layers, str, Variant]
Costs = dict[str, tuple[float, float]]  # metric: value and spread
Turn = tuple[dict[str, float], ...]  # times of the parent, with the variant, with no_op in the other subblock, with both


def check_counts(preset: object, **least: int) -> None:
    """ValueError where a number of a preset of conf/hardware/ is below the least that makes sense."""
    for name, number in least.items():
        if getattr(preset, name) < number:
            raise UserError(f"hardware.{name} is {getattr(preset, name)}; expected at least {number}")


def num_turns(repeats: int, variant: Variant) -> int:
    """Twice as many of no_op: all others are measured against it."""
    return repeats * (2 if variant == NO_OP else 1)


def in_turn(timed: Sequence[Callable[[], dict[str, float]]], repeats: int, warmup: int) -> list[Turn]:
    """The times of each, `repeats` times over, after `warmup` turns that do not count."""
    turns = []
    for turn in range(warmup + repeats):
        times = {number: timed[number]() for number in list(range(len(timed)))[:: -1 if turn % 2 else 1]}  # drift within a turn cancels too
        turns += [tuple(times[number] for number in range(len(timed)))] * (turn >= warmup)
    return turns


def _median(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the interquartile range."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(middle), float(high - low) / 2


def saved(turns: Sequence[Turn], metric: str) -> tuple[float, float]:
    """What the variant saves, as a share of the parent's time, and its spread; 0 of a request that has no such step."""
    times = [[model[metric] for model in turn] for turn in turns]
    if not any(map(any, times)):
        return 0.0, 0.0
    return _median([(parent - changed + alone - changed_alone) / (2 * parent) for parent, changed, alone, changed_alone in times])


def base_options(groups: Sequence[Layers]) -> list[Option]:
    """What the others are measured against: the parent and no_op in each group of layers, and what is outside."""
    return [*((layers, s, v) for layers in groups for s in SUBBLOCKS for v in (PARENT, NO_OP)), ((), OUTSIDE, PARENT)]


def base_times(turns_of: Mapping[Layers, Sequence[Turn]], num_changed: Mapping[Layers, int] | None = None) -> dict[Option, Costs]:
    """Times of the parent's subblocks, of none, and of what is outside, from turns of no_op in the attention of each group of layers.

    `num_changed` is in how many layers the timed models differ, where it is not in all of a group.
    """
    costs: dict[Option, Costs] = {option: {} for option in base_options(list(turns_of))}
    for metric in TIMES:
        total = statistics.median(turn[0][metric] for turns in turns_of.values() for turn in turns)
        outside, of_outside = total, 0.0
        for layers, turns in turns_of.items():
            of_other = [(parent, alone, changed, both) for parent, changed, alone, both in turns]
            for subblock, some in zip(SUBBLOCKS, (turns, of_other), strict=True):
                value, spread = (total / (num_changed or {}).get(layers, len(layers)) * share for share in saved(some, metric))
                costs[layers, subblock, PARENT][metric] = max(0.0, value), spread
                costs[layers, subblock, NO_OP][metric] = 0.0, spread
                outside, of_outside = outside - len(layers) * max(0.0, value), math.hypot(of_outside, len(layers) * spread)
        costs[(), OUTSIDE, PARENT][metric] = max(0.0, outside), of_outside
    return costs


def times_of(turns: Sequence[Turn], layers: Layers, subblock: str, base: Mapping[Option, Costs], num_changed: int | None = None) -> Costs:
    """Times of a variant of `subblock` in `layers`, from its `turns` and the `base` rows; `num_changed` as for those."""
    costs = {}
    for metric in TIMES:
        parents = {option: found[metric][0] for option, found in base.items() if option[-1] == PARENT}
        total = math.fsum((len(option[0]) or 1) * value for option, value in parents.items())
        value, spread = (total / (num_changed or len(layers)) * share for share in saved(turns, metric))
        whole, whole_spread = base[layers, subblock, PARENT][metric]
        costs[metric] = max(0.0, whole - value), math.hypot(spread, whole_spread)
    return costs
