"""Other ways to choose an architecture from the same tables within the same constraints, to hold against the MIP.

    rl              REINFORCE over a softmax per layer and subblock: what neural architecture search is known for
    greedy          from the parent, again and again the replacement that saves most per score lost, until all limits hold
    uniform         the same attention and FFN variant in every layer: the best such pair
    max_parameters  as many parameters as fit, scores unseen
    depth           whole layers dropped, the rest as in the parent: the set of the least sum of the same scores
    random          an optimum of random scores, so that it fits

Scores are measured one subblock at a time, which is unfair to dropping layers. MEASURED has three ways that go by what whole children lose,
which a function that they are given measures:

    depth-alone     the set of the least sum of what each layer loses when it alone is dropped
    depth-run       a run of neighbouring layers: of the shortest from each start, the one whose child loses least
    depth-iterative one layer after the other, each the one without which the child loses least then
"""
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_core import mip
from puzzle_core.problem import Problem
from puzzle_core.search import number, program_of, solve, whole_number
from puzzle_core.spec import BLOCK, NO_OP, PARENT, SUBBLOCKS, Architecture, Constraint, Joint

Loss = Callable[[list[Architecture]], list[float]]  # of each architecture's child, measured


@dataclass(frozen=True)
class Settings:
    """How the rivals are run: `rivals` in conf/config.yaml."""

    seed: int = 0
    rl_steps: int = 3000
    rl_samples: int = 256  # architectures a step
    rl_lr: float = 0.05
    rl_entropy: float = 0.02  # weight of the entropy bonus at the start; falls to 0
    time_limit_s: float = 60.0  # for each of those that solve a program

    def __post_init__(self):
        for name, most in (("rl_steps", 10**6), ("rl_samples", 10**5)):
            whole_number(f"rivals.{name}", getattr(self, name), 1, most)
        number("rivals.time_limit_s", self.time_limit_s, 1e-3, 1e7)


@dataclass(frozen=True)
class Entry:
    """What one method chose, and how long it took; no architecture where it found none that fits."""

    method: str
    seconds: float
    architecture: Architecture | None
    score: float
    totals: dict[str, float]
    gap: float  # of its score over the MIP's, relative

    def to_json(self) -> dict:
        found = self.architecture is not None
        return {
            "method": self.method,
            "seconds": round(self.seconds, 3),
            "score": self.score if found else None,
            "gap": self.gap if found else None,
            **self.totals,
            "architecture": self.architecture.to_json() if found else None,
        }


def compete(problem: Problem, constraints: Sequence[Constraint], settings: Settings) -> list[Entry]:
    """The MIP's answer, then every rival's; InfeasibleError or TimeoutError if the MIP finds none."""
    best = solve(problem, constraints, settings.time_limit_s)
    entries = [Entry("mip", best.seconds, best.architecture, best.score, best.totals, 0.0)]
    program = program_of(problem, problem.score_O, constraints)
    for place, (method, choose) in enumerate(RIVALS.items()):
        start = time.perf_counter()
        rows = choose(problem, program, settings, np.random.default_rng([settings.seed, place]))
        seconds = time.perf_counter() - start
        if rows is None:
            entries.append(Entry(method, seconds, None, math.nan, {}, math.nan))
            continue
        rows = [int(row) for row in rows]
        assert program.fits(np.array(rows)), method
        score = problem.score(rows)
        gap = (score - best.score) / abs(best.score) if best.score else math.inf * (score > 0) if score else 0.0
        entries.append(Entry(method, seconds, problem.architecture_of(rows), score, problem.totals(rows), gap))
    return entries


def table(entries: Sequence[Entry], columns: Sequence[str]) -> str:
    """The entries as text: score, gap to the MIP, the totals `columns`."""
    lines = [f"{'method':15} {'score':>11} {'over MIP':>9} " + " ".join(f"{column:>14}" for column in columns) + f" {'seconds':>8}"]
    for entry in sorted(entries, key=lambda entry: entry.score if entry.architecture else math.inf):
        if entry.architecture is None:
            lines.append(f"{entry.method:15} {'nothing that fits':>21}")
            continue
        totals = " ".join(f"{entry.totals[column]:>14,.6g}" for column in columns)
        lines.append(f"{entry.method:15} {entry.score:>11.5g} {entry.gap:>9.2%} {totals} {entry.seconds:>8.2f}")
    return "\n".join(lines)


def reinforce(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    """The best fitting architecture that REINFORCE ever samples.

    Loss of a sample: its score, and by how much it breaks each limit times that limit's price; the baseline is the mean of
    the step's samples. A price rises while most samples break its limit, and falls while most keep it. The optimizer is Adam.
    """
    # a joint option stands in its layer's first cell alone; where a layer has no other, its second cell is never used
    cells = [rows if cell % 2 == 0 else rows[program.half_O[rows] == mip.SECOND] for cell, rows in enumerate(program.cells)]
    option_CM = np.full((len(cells), max(map(len, cells))), -1)
    for cell, rows in enumerate(cells):
        option_CM[cell, : len(rows)] = rows
    logit_CM = np.where(option_CM >= 0, 0.0, -1e9)
    moment_CM, square_CM = np.zeros_like(logit_CM), np.zeros_like(logit_CM)
    weight_O = program.weight_O / (np.abs(program.weight_O).mean() or 1.0)
    size_K = np.abs(program.share_KO).max(axis=1, initial=0.0) + 1e-300
    price_K, least, best = np.ones(len(size_K)), math.inf, None
    for step in range(1, settings.rl_steps + 1):
        pick_SC, option_SC, used_SC = _sample(option_CM, logit_CM, program.half_O == mip.BOTH, settings.rl_samples, random)
        weight_S = (weight_O[option_SC] * used_SC).sum(axis=1)
        over_SK = (program.share_KO[:, option_SC] * used_SC).sum(axis=2).T - program.room_K
        fitting = np.flatnonzero((over_SK <= 0).all(axis=1))
        if len(fitting) and weight_S[champion := fitting[weight_S[fitting].argmin()]] < least:
            rows = option_SC[champion][used_SC[champion]]
            least, best = (weight_S[champion], rows) if program.fits(rows) else (least, best)
        loss_S = weight_S + np.maximum(over_SK / size_K, 0) @ price_K
        price_K = np.maximum(0.1, price_K * (1 + 0.02 * np.sign((over_SK > 0).mean(axis=0) - 0.5)))
        entropy_weight = settings.rl_entropy * (1 - step / settings.rl_steps)
        gradient_CM = _policy_gradient(logit_CM, pick_SC, used_SC, loss_S, entropy_weight)
        moment_CM = 0.9 * moment_CM + 0.1 * gradient_CM
        square_CM = 0.99 * square_CM + 0.01 * gradient_CM**2
        update_CM = (moment_CM / (1 - 0.9**step)) / (np.sqrt(square_CM / (1 - 0.99**step)) + 1e-8)
        logit_CM = logit_CM - settings.rl_lr * np.where(option_CM >= 0, update_CM, 0.0)
    return best


def _sample(
    option_CM: np.ndarray, logit_CM: np.ndarray, joint_O: np.ndarray, num_samples: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Architectures drawn from the policy: the pick in each cell, its option, and whether it counts."""
    gumbel = -np.log(-np.log(random.uniform(1e-12, 1, (num_samples, *logit_CM.shape))))
    pick_SC = (logit_CM + gumbel).argmax(axis=2)
    option_SC = option_CM[np.arange(len(option_CM)), pick_SC]
    used_SC = np.ones(option_SC.shape, bool)
    used_SC[:, 1::2] = ~joint_O[option_SC[:, ::2]]  # a joint option in the first cell fills both
    return pick_SC, option_SC, used_SC


def _policy_gradient(
    logit_CM: np.ndarray, pick_SC: np.ndarray, used_SC: np.ndarray, loss_S: np.ndarray, entropy_weight: float
) -> np.ndarray:
    """Of the expected loss, standardised within the step, less the entropy bonus."""
    share_CM = np.exp(logit_CM - logit_CM.max(axis=1, keepdims=True))
    share_CM /= share_CM.sum(axis=1, keepdims=True)
    advantage_SC = ((loss_S - loss_S.mean()) / (loss_S.std() + 1e-12))[:, None] * used_SC / len(loss_S)
    gradient_CM = -share_CM * advantage_SC.sum(axis=0)[:, None]
    np.add.at(gradient_CM, (np.arange(len(logit_CM))[None], pick_SC), advantage_SC)
    log_CM = np.log(share_CM + 1e-300)
    entropy_C1 = -(share_CM * log_CM).sum(axis=1, keepdims=True)
    return gradient_CM + entropy_weight * share_CM * (log_CM + entropy_C1)


def greedy(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    """Replacements one at a time, each the one that brings the broken limits nearest per score lost; None if it gets stuck."""
    rows = np.array(problem.parent_rows)
    size_K = np.abs(program.room_K) + 1e-300
    while not program.fits(rows):
        local = program.relative_to(rows)
        joint_layers = program.layer_O[rows[program.half_O[rows] == mip.BOTH]]
        whole_O = (program.half_O == mip.BOTH) | ~np.isin(program.layer_O, joint_layers)  # leaves no half of a layer empty
        over_K = -local.room_K / size_K
        left_KO = np.maximum(0.0, over_K[:, None] + local.share_KO / size_K[:, None])
        gain_O = np.where(whole_O, np.maximum(0.0, over_K).sum() - left_KO.sum(axis=0), 0.0)
        if gain_O.max() <= 0:
            return None
        worth_O = np.where(gain_O > 0, gain_O / np.maximum(local.weight_O, 1e-12 * np.abs(program.weight_O).max()), -1.0)
        option = int(worth_O.argmax())
        replaced = (program.layer_O[rows] == program.layer_O[option]) & (
            (program.half_O[rows] == program.half_O[option]) | (program.half_O[option] == mip.BOTH)
        )
        rows = np.append(rows[~replaced], option)
    return rows


def uniform(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    """The best fitting pair of variants, or joint variant, that every layer has."""
    everywhere = {}
    for layer, subblock, variant in problem.options:
        everywhere.setdefault((subblock, variant), set()).add(layer)
    whole = [key for key, layers in everywhere.items() if len(layers) == problem.num_layers]
    attention, ffn = ([v for s, v in whole if s == subblock] for subblock in ("attention", "ffn"))
    all_layers = tuple(range(problem.num_layers))
    choices = [Architecture.uniform(problem.num_layers, a, f) for a in attention for f in ffn]
    choices += [Architecture(((v.attention, v.ffn),) * problem.num_layers, all_layers) for s, v in whole if s == BLOCK]
    rows = [np.array(problem.rows_of(choice)) for choice in choices]
    return min((r for r in rows if program.fits(r)), key=program.weight, default=None)


def max_parameters(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    return _lightest(program, -problem.shares("num_params")[0], settings)


def random_scores(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    return _lightest(program, random.uniform(size=len(problem.options)), settings)


def random_architectures(problem: Problem, constraints: Sequence[Constraint], num: int, settings: Settings) -> list[Architecture]:
    """`num` that fit, from as few replacements as the limits need to a variant drawn for every subblock.

    Each is the optimum of random scores, those of some of the parent's subblocks 0; how many of them is drawn first.
    InfeasibleError or TimeoutError if none fits.
    """
    whole_number("random", num, 0)
    solve(problem, constraints, settings.time_limit_s)  # says why, if nothing fits
    program, parent = program_of(problem, problem.score_O, constraints), np.array(problem.parent_rows)
    found = []
    for draw in range(num):
        random = np.random.default_rng([settings.seed, len(RIVALS), draw])
        weight_O = random.uniform(size=len(problem.options))
        weight_O[parent[random.uniform(size=len(parent)) < random.uniform()]] = 0.0
        found.append(_lightest(program, weight_O, settings))
    return [problem.architecture_of(rows.tolist()) for rows in found if rows is not None]


def depth(problem: Problem, program: mip.Program, settings: Settings, random: np.random.Generator) -> np.ndarray | None:
    """Each layer is the parent's or nothing: a program of two options a layer, each the sum of its rows."""
    whole = _whole_layers(problem)
    return _lightest_set(whole, {key: program.weight_O[rows].sum() for key, rows in whole.items()}, program, settings)


def depth_alone(problem: Problem, program: mip.Program, settings: Settings, loss_of: Loss) -> np.ndarray | None:
    whole = _whole_layers(problem)
    alone = [layer for layer, dropped in whole if dropped]
    losses = loss_of([without(problem, [layer]) for layer in alone]) if alone else []
    weights = dict.fromkeys(whole, 0.0) | {(layer, True): loss for layer, loss in zip(alone, losses, strict=True)}
    return _lightest_set(whole, weights, program, settings)


def depth_run(problem: Problem, program: mip.Program, settings: Settings, loss_of: Loss) -> np.ndarray | None:
    droppable, shortest = {layer for layer, dropped in _whole_layers(problem) if dropped}, {}
    for first in range(problem.num_layers):
        for run in (range(first, end) for end in range(first, problem.num_layers + 1)):
            if first not in shortest and droppable.issuperset(run) and program.fits(_without(problem, run)):
                shortest[first] = run
    if not shortest:
        return None
    runs = list(shortest.values())
    losses = loss_of([without(problem, run) for run in runs])
    return _without(problem, runs[losses.index(min(losses))])


def depth_iterative(problem: Problem, program: mip.Program, settings: Settings, loss_of: Loss) -> np.ndarray | None:
    dropped, left = [], [layer for layer, gone in _whole_layers(problem) if gone]
    while not program.fits(_without(problem, dropped)):
        if not left:
            return None
        losses = loss_of([without(problem, [*dropped, layer]) for layer in left])
        dropped.append(left.pop(losses.index(min(losses))))
    return _without(problem, dropped)


def without(problem: Problem, dropped: Collection[int]) -> Architecture:
    """The parent without the layers `dropped`."""
    return problem.architecture_of(_without(problem, dropped).tolist())


def _without(problem: Problem, dropped: Collection[int]) -> np.ndarray:
    whole = _whole_layers(problem)
    return np.concatenate([whole[layer, layer in dropped] for layer in range(problem.num_layers)])


def _whole_layers(problem: Problem) -> dict[tuple[int, bool], list[int]]:
    """By layer and whether it is dropped, the options that say so; no entry where the tables cannot."""
    row_of, whole = {option: row for row, option in enumerate(problem.options)}, {}
    for layer in range(problem.num_layers):
        for dropped, variant in ((False, PARENT), (True, NO_OP)):
            halves = [(layer, subblock, variant) for subblock in SUBBLOCKS]
            for options in (halves, [(layer, BLOCK, Joint(variant, variant))]):
                if row_of.keys() >= set(options):
                    whole.setdefault((layer, dropped), [row_of[option] for option in options])
    return whole


def _lightest_set(
    whole: dict[tuple[int, bool], list[int]], weights: dict[tuple[int, bool], float], program: mip.Program, settings: Settings
) -> np.ndarray | None:
    """One entry of `whole` for each layer, of the least sum of `weights`."""
    layer_O, weight_O = np.array([layer for layer, _ in whole]), np.array([weights[key] for key in whole])
    share_KO = np.array([program.share_KO[:, rows].sum(axis=1) for rows in whole.values()]).T
    tied = mip.Program(layer_O, np.full(len(whole), mip.BOTH), weight_O, share_KO.reshape(-1, len(whole)), program.room_K)
    chosen, options = _lightest(tied, weight_O, settings), list(whole.values())
    return None if chosen is None else np.concatenate([options[index] for index in chosen])


def _lightest(program: mip.Program, weight_O: np.ndarray, settings: Settings) -> np.ndarray | None:
    program = mip.Program(program.layer_O, program.half_O, weight_O, program.share_KO, program.room_K)
    try:
        found = mip.minimise(program, time.perf_counter() + settings.time_limit_s)
    except mip.OutOfTimeError:
        return None
    return found.rows if found else None


RIVALS = {
    "rl": reinforce,
    "greedy": greedy,
    "uniform": uniform,
    "max_parameters": max_parameters,
    "depth": depth,
    "random": random_scores,
}
MEASURED = {"depth-alone": depth_alone, "depth-run": depth_run, "depth-iterative": depth_iterative}


def measured(method: str, problem: Problem, constraints: Sequence[Constraint], settings: Settings, loss_of: Loss) -> Architecture | None:
    """What a method of MEASURED chooses; None where it finds nothing that fits."""
    rows = MEASURED[method](problem, program_of(problem, problem.score_O, constraints), settings, loss_of)
    return None if rows is None else problem.architecture_of(rows.tolist())
