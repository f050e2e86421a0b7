"""The search: from the scores and costs tables to the architecture of least score within the constraints.

    Options   o in O       one row of the scores table: a variant of a subblock of a layer
    Cells     c in C       the (layer, subblock) pairs; every option covers one of them
    Scores    s_o          quality lost where the option replaces the parent's subblock; the parent's is 0
    Shares    t_ko         what the option adds to total k: latency_ms, memory_mib, ...
    Outside   a_k          what embeddings, final norm and LM head add to total k, whatever is chosen
    Limits    u_k          the upper bound of total k
    Variables x_o in {0, 1}, 1 where the option is chosen

    Minimise  sum_o s_o x_o
    such that sum_{o covers c} x_o = 1               for every cell c
              a_k + sum_o t_ko x_o <= (1 + 1e-9) u_k for every constraint k

The slack is for float sums alone: a limit that equals a reachable total is reachable. What the solver returns is summed
again in float; if a total is above its limit, that solution is cut off and the program solved again. The form has room
for several scenarios (more totals), joint blocks (options that cover two cells) and pools of solutions (more cuts).
"""

import datetime
import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pandas as pd
from ortools.math_opt.python import mathopt

from puzzle_core.spec import OUTSIDE, PARENT, SUBBLOCKS, Architecture, Constraint, Scenario, Solution, Variant

SLACK = 1e-9  # relative, on every limit
BASE_METRICS = ("prefill_ms", "decode_ms", "param_bytes", "num_params", "kv_bytes_per_token")

# What a user may limit: the total that it bounds, and how. At most: total <= limit * unit. At least: total <= unit /
# limit. The unit is 1, the parent's total, or 1000 times the generated tokens, so that tokens per second bound ms.
CONSTRAINTS = {
    "latency_ms": ("latency_ms", "at most", "one"),
    "prefill_ms": ("prefill_ms", "at most", "one"),
    "decode_ms": ("decode_ms", "at most", "one"),
    "memory_mib": ("memory_mib", "at most", "one"),
    "num_params": ("num_params", "at most", "one"),
    "kv_mib": ("kv_mib", "at most", "one"),
    "throughput_tokens_per_s": ("latency_ms", "at least", "tokens"),
    "speedup": ("latency_ms", "at least", "parent"),
    "memory_fraction": ("memory_mib", "at most", "parent"),
    "params_fraction": ("num_params", "at most", "parent"),
    "kv_fraction": ("kv_mib", "at most", "parent"),
}


class InfeasibleError(ValueError):
    """No architecture meets the constraints; the message says how far each one can be reached."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Every option with its score and its share of each total: aligned arrays, sorted by cell."""

    scenario: Scenario
    metric: str
    num_layers: int
    options: tuple[tuple[int, str, Variant], ...]  # (layer, subblock, variant)
    cell_O: np.ndarray  # the cell that the option covers: len(SUBBLOCKS) * layer + index of its subblock
    score_O: np.ndarray
    share_O: dict[str, np.ndarray]  # total -> the option's share of it
    outside: dict[str, float]  # total -> the share of what is outside the blocks

    @classmethod
    def from_tables(cls, scores: pd.DataFrame, costs: pd.DataFrame, metric: str, scenario: str) -> "Problem":
        """Join one metric's scores and one scenario's costs; ValueError that names every row they lack."""
        for table, column, wanted in (("scores", scores["metric"], metric), ("costs", costs["scenario"], scenario)):
            if wanted not in (there := sorted(set(column))):
                raise ValueError(f"no {column.name} '{wanted}' in the {table} table, which has: {', '.join(there)}")
        scores = scores[scores["metric"] == metric]
        cell = len(SUBBLOCKS) * scores["layer"] + scores["subblock"].map(SUBBLOCKS.index)
        scores = scores.assign(cell=cell).sort_values(["cell", "variant"])
        costs = costs[costs["scenario"] == scenario]
        base = costs.pivot(index=["subblock", "variant"], columns="metric", values="value")
        keys = [*zip(scores["subblock"], scores["variant"], strict=True), (OUTSIDE, str(PARENT))]
        base = base.reindex(pd.MultiIndex.from_tuples(keys), columns=BASE_METRICS)
        _check_complete(scores, base, scenario)
        shares = _linear_totals(base, Scenario.parse(scenario))
        return cls(
            scenario=Scenario.parse(scenario),
            metric=metric,
            num_layers=int(scores["layer"].max()) + 1,
            options=tuple((row.layer, row.subblock, Variant.parse(row.variant)) for row in scores.itertuples()),
            cell_O=scores["cell"].to_numpy(),
            score_O=scores["value"].to_numpy(),
            share_O={total: share[:-1] for total, share in shares.items()},
            outside={total: float(share[-1]) for total, share in shares.items()},
        )

    @property
    def parent_totals(self) -> dict[str, float]:
        return totals(self, Architecture.uniform(self.num_layers))

    def total(self, name: str, rows: list[int]) -> float:
        return self.outside[name] + math.fsum(self.share_O[name][rows])

    def cell_minima(self, weight_O: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(weight_O, np.flatnonzero(np.diff(self.cell_O, prepend=-1)))


def _check_complete(scores: pd.DataFrame, base: pd.DataFrame, scenario: str) -> None:
    cells = [(layer, subblock) for layer in range(max(scores["layer"]) + 1) for subblock in SUBBLOCKS]
    parents = set(scores.loc[scores["variant"] == str(PARENT), "cell"])
    if lacking := ["layer {} {} parent".format(*key) for cell, key in enumerate(cells) if cell not in parents]:
        raise ValueError(f"scores table has no {', '.join(lacking)}, but has layer {cells[-1][0]}. Rerun score.")
    rows = base[base.isna().any(axis=1)].iterrows()
    if lacking := {f"{' '.join(key)} ({', '.join(row.index[row.isna()])})": None for key, row in rows}:
        raise ValueError(
            f"costs table has no row in scenario {scenario} for {', '.join(lacking)}; expected every scored variant, "
            f"and 'outside parent' for what is in no block. Rerun profile-hardware."
        )


def _linear_totals(base: pd.DataFrame, scenario: Scenario) -> dict[str, np.ndarray]:
    """What each row of base metrics adds to each total: ms of the whole batch, MiB at the end of generation, counts."""
    prefill_ms, decode_ms, param_bytes, num_params, kv_bytes_per_token = base[list(BASE_METRICS)].to_numpy(float).T
    kv_bytes = scenario.batch_size * scenario.sequence_len * kv_bytes_per_token
    return {
        "latency_ms": prefill_ms + scenario.generation_len * decode_ms,
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        "memory_mib": (param_bytes + kv_bytes) / 2**20,
        "num_params": num_params,
        "kv_mib": kv_bytes / 2**20,
    }


def totals(problem: Problem, architecture: Architecture) -> dict[str, float]:
    """The predicted totals of `architecture` and its throughput_tokens_per_s; ValueError if the tables lack a row."""
    row_of = {option: row for row, option in enumerate(problem.options)}
    lacking = ["layer {} {} {}".format(*option) for option in architecture.items() if option not in row_of]
    if lacking or len(architecture.layers) != problem.num_layers:
        raise ValueError(
            f"the tables have {problem.num_layers} layers, the architecture {len(architecture.layers)}, and no row for "
            f"{', '.join(lacking) or 'the others'}. Rerun bld, score and profile-hardware with what is missing."
        )
    rows = [row_of[option] for option in architecture.items()]
    linear = {total: problem.total(total, rows) for total in problem.share_O}
    num_tokens, seconds = problem.scenario.batch_size * problem.scenario.generation_len, linear["latency_ms"] / 1000
    return {**linear, "throughput_tokens_per_s": num_tokens / seconds if seconds else math.inf}


def constraints_from(limits: Mapping[str, float | None], problem: Problem) -> tuple[Constraint, ...]:
    """The user's limits as upper bounds on totals; None is no limit. ValueError for an unknown name or a bad limit."""
    constraints = []
    for name, limit in limits.items():
        if name not in CONSTRAINTS:
            hint = "".join(f"did you mean '{close}'? " for close in difflib.get_close_matches(name, CONSTRAINTS, n=1))
            raise ValueError(f"unknown constraint '{name}': {hint}There are {', '.join(CONSTRAINTS)}.")
        if limit is None:
            continue
        if isinstance(limit, bool) or not isinstance(limit, Real) or not 0 < limit < math.inf:
            raise ValueError(f"constraint {name} is {limit!r}; expected a positive number, or null for no limit")
        total, sense, unit = CONSTRAINTS[name]
        milli_tokens = 1000.0 * problem.scenario.batch_size * problem.scenario.generation_len
        unit = {"one": 1.0, "parent": problem.parent_totals[total], "tokens": milli_tokens}[unit]
        constraints.append(Constraint(name, float(limit), total, unit * limit if sense == "at most" else unit / limit))
    return tuple(constraints)


def solve(problem: Problem, constraints: tuple[Constraint, ...], time_limit_s: float = 60.0) -> Solution:
    """The architecture of least score within `constraints` and its proof; InfeasibleError or TimeoutError if none."""
    start = time.perf_counter()
    found = _minimise(problem, problem.score_O, constraints, time_limit_s)
    if found is None:
        raise InfeasibleError(_why_infeasible(problem, constraints, time_limit_s))
    rows, bound, proven = found
    variants = [problem.options[row][2] for row in rows]  # in order of cells: attention, FFN, attention, ...
    architecture = Architecture(tuple(zip(variants[::2], variants[1::2], strict=True)))
    score = math.fsum(problem.score_O[rows])
    return Solution(
        architecture=architecture,
        scenario=problem.scenario,
        metric=problem.metric,
        score=score,
        bound=min(bound, score),
        status="optimal" if proven else "feasible",
        seconds=time.perf_counter() - start,
        totals=totals(problem, architecture),
        parent_totals=problem.parent_totals,
        constraints=tuple(constraints),
    )


def _minimise(
    problem: Problem, weight_O: np.ndarray, constraints: tuple[Constraint, ...], time_limit_s: float
) -> tuple[list[int], float, bool] | None:
    """The rows of least weight within `constraints`, a bound on it, and whether it is proven; None if infeasible."""
    deadline = time.perf_counter() + time_limit_s
    floor_C = problem.cell_minima(weight_O)
    excess_O = weight_O - floor_C[problem.cell_O]  # in units of `scale`: neither unit nor sign of the weights matters
    scale, best, reason = excess_O.max() or 1.0, None, None
    model, x_O = _model(problem, constraints)
    parameters = mathopt.SolveParameters(relative_gap_tolerance=0.0, absolute_gap_tolerance=0.0, threads=1)
    parameters.gscip.real_params["numerics/feastol"] = SLACK  # SCIP's 1e-6 would pass totals 1e-6 above their limits
    while (left_s := deadline - time.perf_counter()) > 0:
        model.minimize(_weighted(excess_O / scale, x_O))
        parameters.time_limit = datetime.timedelta(seconds=left_s)
        result = mathopt.solve(model, mathopt.SolverType.GSCIP, params=parameters)
        reason = result.termination.reason.name
        if reason not in ("OPTIMAL", "FEASIBLE"):
            break
        rows = [row for row, value in enumerate(result.variable_values(x_O)) if value > 0.5]
        if broken := [c for c in constraints if problem.total(c.total, rows) > c.upper * (1 + SLACK)]:
            _cut_off(problem, model, x_O, rows, broken)
            continue
        spent = math.fsum(excess_O[rows])
        if best and spent > scale * (1 + SLACK):
            break
        bound = scale * max(0.0, result.termination.objective_bounds.dual_bound)
        best = rows, math.fsum(floor_C) + bound, reason == "OPTIMAL"
        if reason == "FEASIBLE" or spent == 0 or spent > 0.1 * scale:
            return best
        # One huge weight drowns the rest in the solver's tolerance. No better choice has an option that alone outweighs
        # this one: without those, and in units of this one, solve again.
        best, scale = (rows, math.fsum(floor_C), False), spent
        for row in np.flatnonzero(excess_O > spent):
            x_O[row].upper_bound = 0.0
    if best or reason in ("INFEASIBLE", "INFEASIBLE_OR_UNBOUNDED"):
        return best
    raise TimeoutError(
        f"no architecture for {_named(constraints)} in scenario {problem.scenario} found, or ruled out, within "
        f"{time_limit_s:g} s (solver: {reason or 'not started'}). Raise search.time_limit_s or relax a constraint."
    )


def _model(problem: Problem, constraints: tuple[Constraint, ...]) -> tuple[mathopt.Model, list[mathopt.Variable]]:
    model = mathopt.Model()
    x_O = [model.add_binary_variable() for _ in problem.options]
    for cell in range(problem.num_layers * len(SUBBLOCKS)):  # one option per cell
        model.add_linear_constraint(mathopt.fast_sum(x_O[row] for row in np.flatnonzero(problem.cell_O == cell)) == 1)
    for c in constraints:  # each total within its limit, in units of the limit
        unit, room = c.upper or 1.0, c.upper - problem.outside[c.total]
        model.add_linear_constraint(_weighted(problem.share_O[c.total] / unit, x_O) <= room / unit + SLACK / 2)
    return model, x_O


def _weighted(weight_O: np.ndarray, x_O: list[mathopt.Variable]) -> mathopt.LinearBase:
    return mathopt.fast_sum(weight * x for weight, x in zip(weight_O.tolist(), x_O, strict=True))


def _cut_off(
    problem: Problem, model: mathopt.Model, x_O: list[mathopt.Variable], rows: list[int], broken: list[Constraint]
) -> None:
    """Exclude `rows`, which break limits by less than the solver sees, and whatever breaks them alike.

    Costs repeat from layer to layer, so every permutation of `rows` would come back in turn. Each limit is written
    again as a change from `rows`: its right side is near 0, the solver's tolerance absolute, so scaling up sharpens it.
    """
    model.add_linear_constraint(mathopt.fast_sum(x_O[row] for row in rows) <= len(rows) - 1)
    for c in broken:
        share_O, sharp = problem.share_O[c.total], 1e4 / (c.upper or 1.0)
        room = c.upper * (1 + SLACK / 2) - problem.total(c.total, rows)
        model.add_linear_constraint(_weighted(sharp * (share_O - share_O[rows][problem.cell_O]), x_O) <= sharp * room)


def _why_infeasible(problem: Problem, constraints: tuple[Constraint, ...], time_limit_s: float) -> str:
    """How far each constraint can be reached: alone and, if every one is within reach alone, while the others hold."""
    least = {c: problem.outside[c.total] + problem.cell_minima(problem.share_O[c.total]).sum() for c in constraints}
    hopeless = tuple(c for c in constraints if least[c] > c.upper * (1 + SLACK))
    start, end = ("\n  {}: ", "\n") if len(constraints) > 1 else (" ", ". ")
    message = f"no architecture fits {_named(hopeless or constraints)} in scenario {problem.scenario}:"
    for c in constraints:
        extreme = "largest" if CONSTRAINTS[c.name][1] == "at least" else "smallest"
        message += f"{start.format(_named([c]))}{extreme} reachable is {_as_limit(c, least[c])}"
        if not hopeless:
            others = tuple(other for other in constraints if other is not c)
            try:
                found = _minimise(problem, problem.share_O[c.total], others, time_limit_s / len(constraints))
                reached = _as_limit(c, problem.total(c.total, found[0])) if found else "none, they conflict themselves"
            except TimeoutError:
                reached = "unknown within the time limit"
            message += f" alone; while the others hold, {reached}"
        message += f" ({c.total} {_digits(least[c])}, limit {_digits(c.upper)})"
    return f"{message}{end}Relax the constraint or add cheaper variants to conf/search_space/."


def _named(constraints: Sequence[Constraint]) -> str:
    return " with ".join(f"{c.name} {c.limit}" for c in constraints) or "no constraint"


def _as_limit(constraint: Constraint, total: float) -> str:
    """The limit that an architecture of `total` just meets, rounded to the reachable side: it can be typed in."""
    if CONSTRAINTS[constraint.name][1] == "at least":
        return _digits(constraint.upper * constraint.limit / total, math.floor) if total else "without end"
    return _digits(total * constraint.limit / constraint.upper, math.ceil) if constraint.upper else "none"


def _digits(value: float, rounded: Callable[[float], int] = round) -> str:
    """Five digits or all the integer ones, without an exponent."""
    decimals = max(0, 4 - math.floor(math.log10(value))) if value else 0
    return np.format_float_positional(rounded(value * 10**decimals) / 10**decimals, trim="-")
