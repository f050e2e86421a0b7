"""The search: from a problem and constraints to the architecture of least score, or of least of any total, and its proof.

    Minimise  sum_o s_o x_o                              the scores, or the shares t_ko of a total k
    such that one option for every layer and subblock    a joint option is both of its layer's
              a_k + sum_o t_ko x_o <= u_k                for every upper limit, in its scenario
              a_k + sum_o t_ko x_o >= l_k                for every lower limit
              sum_o e_yo x_o <= 2 layers - d             in a pool: d choices differ from every earlier solution y

e_yo is in how many subblocks, of its one or two, option o has the variant that y has there, whichever rows y is made of.
How the program is solved and proven is in mip.py. Batch sizes are tried one by one, and the best objective wins.
"""
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from puzzle_core import mip, tables
from puzzle_core.constraints import SLACK, as_limit, constraints_from, digits, extreme, holds, lookup, named, reached, scenario_of, unit_of
from puzzle_core.errors import UserError
from puzzle_core.problem import SCORE, Problem
from puzzle_core.spec import BLOCK, Architecture, Constraint, Scenario, Solution, halves
from puzzle_core.targets import expressible

DRAWS = 16  # of weights, for each other solution of a pool that is wanted
MANY = 10_000  # solutions, choices or points: more than anyone looks at


def whole_number(key: str, value: object, least: int, most: int = MANY) -> None:
    """UserError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{key} is {value!r}; expected a whole number from {least} to {most:,}")


def number(key: str, value: object, least: float, most: float) -> None:
    """UserError unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{key} is {value!r}; expected a number from {least:g} to {most:g}")


class InfeasibleError(UserError):
    """No architecture meets the constraints; the message says how far each one can be reached."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the search besides the constraints: `search` in params.yaml."""

    metric: str | Mapping[str, float] = "kl"  # which score; several are summed with their weights
    objective: str = SCORE  # what is made least: the score or a total; throughput and speedup are made most
    batch_sizes: Sequence[int] | None = None  # tried in place of the workload's
    pool_size: int = 1  # solutions
    pool_distance: int = 1  # choices of a variant in which any two of them differ
    pool_weights: float = 1.0  # more: the others are best where each kind of variant counts up to so many times more or less
    time_limit_s: float = 60.0  # for everything together
    export_target: str | None = None  # only what this format can express (`targets`)

    def __post_init__(self):
        for name in ("pool_size", "pool_distance"):
            whole_number(f"search.{name}", getattr(self, name), 1)
        if not isinstance(self.batch_sizes, Sequence | None) or isinstance(self.batch_sizes, str):
            raise UserError(f"search.batch_sizes is {self.batch_sizes!r}; expected a list of whole numbers, or null")
        for size in self.batch_sizes or ():
            whole_number("one of search.batch_sizes", size, 1, 10**9)
        number("search.pool_weights", self.pool_weights, 1, 1e6)
        number("search.time_limit_s", self.time_limit_s, 1e-3, 1e7)
        if self.pool_weights > 1 and self.objective != SCORE:
            raise UserError(f"search.pool_weights weighs scores, and search.objective is {self.objective}: set pool_weights to 1")


def posed(data: Path, settings: Settings, scenario: Scenario) -> Problem:
    """The problem that the tables in `data` pose, less what `settings.export_target` has no form for."""
    scores, costs = (tables.read(name, data / f"{name}.parquet") for name in ("scores", "costs"))
    if both := sorted(set(scores["metric"]) & set(costs["metric"])):
        raise UserError(f"{', '.join(both)} is a metric of both scores and costs in {data}/: call one of the two something else")
    return Problem.from_tables(expressible(scores, settings.export_target), costs, settings.metric, str(scenario))


def search(problem: Problem, limits: Mapping[str, object], settings: Settings) -> list[Solution]:
    """The best architecture over the allowed batch sizes, then the pool's others; InfeasibleError, TimeoutError."""
    deadline = time.perf_counter() + settings.time_limit_s
    at = problem.scenario
    sizes = list(dict.fromkeys(settings.batch_sizes or [at.batch_size]))
    problems = [problem if size == at.batch_size else problem.at(Scenario(size, at.prompt_len, at.generation_len)) for size in sizes]
    best, refused, bounds = None, [], []
    for index, candidate in enumerate(problems):
        left_s = max(0.0, deadline - time.perf_counter()) / (len(problems) - index)
        constraints = constraints_from(limits, candidate)
        # totals of different batch sizes compare as the user named them: latency per request, throughput per token
        unit = unit_of(settings.objective, candidate, candidate.scenario)
        try:
            found = solve(candidate, constraints, left_s, settings.objective)
        except InfeasibleError as error:
            refused.append(error)
            continue
        except TimeoutError as error:
            refused.append(error)
            bounds.append(_least(candidate, settings.objective) / unit)
            continue
        bounds.append(found.bound / unit)
        if best is None or found.value / unit < best[0]:
            best = found.value / unit, unit, candidate, constraints, found
    if best is None:
        kind = TimeoutError if any(isinstance(error, TimeoutError) for error in refused) else InfeasibleError
        raise kind("\n".join(map(str, refused)))
    merit, unit, problem, constraints, first = best
    if min(bounds) < merit:  # another batch size may have something better: it was given up before that was ruled out
        first = replace(first, bound=min(first.bound, unit * min(bounds)), status="feasible")
    return list(_pool(problem, constraints, first, settings, deadline))


def _least(problem: Problem, objective: str) -> float:
    """The least that `objective` can be without any limit."""
    total = lookup(objective, problem)[0]
    weight_O, _ = problem.shares(total)
    return problem.total(total, program_of(problem, weight_O, ()).cheapest(weight_O).tolist())


def solve(
    problem: Problem,
    constraints: Sequence[Constraint],
    time_limit_s: float = 60.0,
    objective: str = SCORE,
    start: Sequence[int] | None = None,
    unlike: Sequence[Solution] = (),
    distance: int = 1,
    factor_O: np.ndarray | None = None,
) -> Solution:
    """The architecture of least `objective` within `constraints`, `distance` choices from each of `unlike`, and its proof.

    With `factor_O` each option counts so many times in what is made least, in no constraint; the proof is then of that sum.
    `start` are the rows of an architecture to begin from. InfeasibleError or TimeoutError if there is no solution.
    """
    begin = time.perf_counter()
    deadline = begin + time_limit_s
    total = lookup(objective, problem)[0]
    weight_O, outside = problem.shares(total)
    program = program_of(problem, weight_O if factor_O is None else weight_O * factor_O, constraints, unlike, distance)
    try:
        found = mip.minimise(program, deadline, None if start is None else np.array(start))
    except mip.OutOfTimeError as error:
        raise TimeoutError(
            f"no architecture for {named(constraints)} in scenario {problem.scenario} found, or ruled out, within "
            f"{time_limit_s:g} s. Raise search.time_limit_s or relax a constraint."
        ) from error
    if found is None:
        if unlike:
            raise InfeasibleError(f"no architecture for {named(constraints)} differs in {distance} choices from {len(unlike)} others")
        raise InfeasibleError(_why_infeasible(problem, constraints, deadline))
    rows = _in_halves(problem, program, found.rows.tolist())
    solution = Solution(
        architecture=problem.architecture_of(rows),
        scenario=problem.scenario,
        metric=problem.metric,
        score=problem.score(rows),
        bound=math.nextafter(outside + found.bound, -math.inf),
        status="optimal" if found.proven else "feasible",
        seconds=time.perf_counter() - begin,
        totals=problem.totals(rows),
        parent_totals=problem.parent_totals,
        constraints=tuple(constraints),
        objective=total,
        source=problem.source,
        hardware=problem.hardware,
    )
    return replace(solution, bound=solution.value if found.proven else min(solution.bound, solution.value))


def _in_halves(problem: Problem, program: mip.Program, rows: list[int]) -> list[int]:
    """`rows` with the halves of every joint block that is no better than they are, as the parent's block is not."""
    for row in [row for row in rows if problem.options[row][1] == BLOCK]:
        layer, _, block = problem.options[row]
        halves = [problem.row_of(layer, *half) for half in block.halves]
        if None not in halves:
            split = [*(other for other in rows if other != row), *halves]
            if program.fits(np.array(split)) and not program.lighter(np.array(rows), np.array(split)):
                rows = split
    return rows


def program_of(
    problem: Problem, weight_O: np.ndarray, constraints: Sequence[Constraint], unlike: Sequence[Solution] = (), distance: int = 1
) -> mip.Program:
    share_KO, room_K = [], []
    for c in constraints:
        share_O, outside = problem.shares(c.total, scenario_of(c, problem))
        sign = 1 if c.lower is None else -1
        share_KO.append(sign * share_O)
        room_K.append(sign * (c.bound - outside) + SLACK * abs(c.bound))
    for solution in unlike:
        same = [[solution.architecture[n, s] == v for s, v in halves(subblock, variant)] for n, subblock, variant in problem.options]
        share_KO.append(np.array([float(sum(agreeing)) for agreeing in same]))
        room_K.append(2.0 * problem.num_layers - distance)
    shares = np.array(share_KO).reshape(len(room_K), len(weight_O))
    return mip.Program(problem.layer_O, problem.half_O, weight_O, shares, np.array(room_K))


def _pool(problem: Problem, constraints: Sequence[Constraint], first: Solution, settings: Settings, deadline: float) -> list[Solution]:
    """`first` and others that differ enough, the next best or the best by other weights; fewer where there are no more, or no more time.

    Best first: an unproven `first` may be beaten by what was to come after it, which then has no more proof than `first` had.
    """
    others = (_by_other_weights if settings.pool_weights > 1 else _next_best)(problem, constraints, first, settings, deadline)
    pool = sorted((first, *others), key=lambda solution: solution.value)
    if pool[0] is not first:
        pool[0] = replace(pool[0], bound=min(first.bound, pool[0].value), status="feasible")
    return pool


def _next_best(
    problem: Problem, constraints: Sequence[Constraint], first: Solution, settings: Settings, deadline: float
) -> list[Solution]:
    """Each the best that differs enough from `first` and from those before it, which is what its bound and status are about."""
    pool = [first]
    while len(pool) < settings.pool_size and (left_s := deadline - time.perf_counter()) > 0:
        try:
            pool.append(solve(problem, constraints, left_s, settings.objective, unlike=pool, distance=settings.pool_distance))
        except (InfeasibleError, TimeoutError):
            break
    return pool[1:]


def _by_other_weights(
    problem: Problem, constraints: Sequence[Constraint], first: Solution, settings: Settings, deadline: float
) -> list[Solution]:
    """What is best where the scores of each kind of variant count more or less, by factors drawn alike in logarithm.

    A score is what is lost before GKD, and of some kinds GKD mends more than of others: of which, children must show. What differs
    too little from an earlier one is passed over, until 16 draws for each solution that is wanted are made.
    """
    others, draws = [], np.random.default_rng(0)
    kinds_O = np.array([f"{subblock} {variant.kind}" for _, subblock, variant in problem.options])
    kinds, index_O = np.unique(kinds_O, return_inverse=True)
    for _ in range(DRAWS * (settings.pool_size - 1)):
        left_s = deadline - time.perf_counter()
        if len(others) == settings.pool_size - 1 or left_s <= 0:
            break
        factors = settings.pool_weights ** draws.uniform(-1, 1, len(kinds))
        try:
            found = solve(problem, constraints, left_s, factor_O=factors[index_O])
        except TimeoutError:
            break
        if all(_differing(found.architecture, other.architecture) >= settings.pool_distance for other in (first, *others)):
            others.append(replace(found, bound=min(first.bound, found.score), status="feasible"))  # the first's bound is of all
    return others


def _differing(one: Architecture, other: Architecture) -> int:
    """In how many choices of a variant two architectures differ."""
    return sum(a != b for mine, others in zip(one.layers, other.layers, strict=True) for a, b in zip(mine, others, strict=True))


def frontier(
    problem: Problem,
    limits: Mapping[str, object],
    name: str,
    points: int = 50,
    loosest: float | None = None,
    tightest: float | None = None,
    time_limit_s: float = 60.0,
) -> list[Solution]:
    """The best score at `points` limits of the constraint `name`, evenly spaced; the other `limits` hold at each.

    From `loosest` (where it stops to bind) to `tightest` (what can be reached; where an architecture takes no time, the best finite
    speed-up or throughput). Each solution starts from the one before, and has an equal share of what is left of `time_limit_s`, which
    is for everything together.
    """
    deadline = time.perf_counter() + time_limit_s

    def share_s(num_left: int) -> float:
        return max(0.0, deadline - time.perf_counter()) / num_left

    whole_number("frontier.points", points, 2)
    for key, limit in (("loosest", loosest), ("tightest", tightest)):
        if limit is not None:
            number(f"frontier.{key}", limit, 0, math.inf)
    others = constraints_from({key: limit for key, limit in limits.items() if key != name}, problem)
    total, sense, _ = lookup(name, problem)
    unit = unit_of(name, problem, problem.scenario)
    loose = solve(problem, others, share_s(points + 2))
    tight = solve(problem, others, share_s(points + 1), objective=name)

    def valued(found: Solution) -> float:
        return found.score if total == SCORE else found.totals[total]

    def limit_at(found: Solution, given: float | None) -> float:
        if given is not None:
            return given
        numerator, divisor = (valued(found), unit) if sense == "at most" else (unit, valued(found))
        return numerator / divisor if divisor else math.nan

    if sense == "at least" and tightest is None and not valued(tight):  # no limit is infinite: the best that is finite
        positive = _positive(problem, total)
        tight = solve(problem, (*others, positive), share_s(points + 1), objective=name) if positive else tight
    ends = limit_at(tight, tightest), limit_at(loose, loosest)
    if not all(0 <= end < math.inf for end in ends) or (sense == "at least" and not all(ends)):
        raise UserError(f"the frontier of {name} runs from {ends[1]:g} to {ends[0]:g}; set frontier.loosest and frontier.tightest")
    solutions, rows = [], problem.rows_of(tight.architecture)
    for index, limit in enumerate(np.linspace(*ends, points)):
        constraints = (*others, *constraints_from({name: float(limit)}, problem))
        solution = solve(problem, constraints, share_s(points - index), start=rows)
        rows = problem.rows_of(solution.architecture)
        solutions.append(solution)
    return solutions[::-1]


def _positive(problem: Problem, total: str) -> Constraint | None:
    """That `total` is not 0, as a limit; None where it always is."""
    share_O, outside = problem.shares(total)
    least = min([share for share in (outside, *share_O) if share > 0], default=None)
    return least and Constraint(total, least, total, lower=least)


def _why_infeasible(problem: Problem, constraints: Sequence[Constraint], deadline: float) -> str:
    """How far each constraint can be reached: alone and, if every one is within reach alone, while the others hold."""
    alone = {c: reached(c, problem, _lightest(problem, c)) for c in constraints}
    hopeless = [c for c in constraints if not holds(c, alone[c])]
    start, end = ("\n  {}: ", "\n") if len(constraints) > 1 else (" ", ". ")
    message = f"no architecture fits {named(hopeless or constraints)} in scenario {problem.scenario}:"
    for index, c in enumerate(constraints):
        message += f"{start.format(c)}{extreme(c, problem)} reachable is {as_limit(c, alone[c], problem)}"
        if not hopeless:
            left_s = (deadline - time.perf_counter()) / (len(constraints) + 1 - index)
            message += f" alone; while the others hold, {_with_others(problem, c, constraints, left_s)}"
        message += f" ({c.total} {digits(alone[c])}, limit {digits(c.bound)})"
    if len(constraints) > 1:
        message += f"\n  nearest that fits, each relaxed by at most the same fraction: {_nearest(problem, constraints, deadline)}"
    return f"{message}{end}Relax the constraint or add cheaper variants to conf/search_space/."


def _towards(problem: Problem, c: Constraint) -> np.ndarray:
    """Weights whose least sum is the total furthest within `c`."""
    return (1 if c.lower is None else -1) * problem.shares(c.total, scenario_of(c, problem))[0]


def _lightest(problem: Problem, c: Constraint) -> list[int]:
    weight_O = _towards(problem, c)
    return program_of(problem, weight_O, ()).cheapest(weight_O).tolist()


def _with_others(problem: Problem, c: Constraint, constraints: Sequence[Constraint], left_s: float) -> str:
    others = [other for other in constraints if other is not c]
    try:
        found = mip.minimise(program_of(problem, _towards(problem, c), others), time.perf_counter() + left_s)
    except mip.OutOfTimeError:
        return "unknown within the time limit"
    if found is None:
        return "none, they conflict themselves"
    limit = as_limit(c, reached(c, problem, found.rows.tolist()), problem)
    return limit if found.proven else f"{limit} or better (time was up before more was ruled out)"


def _nearest(problem: Problem, constraints: Sequence[Constraint], deadline: float) -> str:
    """Limits that an architecture meets, each missed by at most the same fraction: the smallest, by bisection."""
    size_C = np.array([abs(c.bound) or 1.0 for c in constraints])
    weight_O = sum(_towards(problem, c) / size for c, size in zip(constraints, size_C, strict=True))
    program = program_of(problem, weight_O, constraints)

    def missed(rows: np.ndarray) -> float:
        return max(0.0, (program.over(rows) / size_C).max())

    rows = program.cheapest(weight_O)
    low, high = 0.0, missed(rows)
    while high - low > 1e-3 * high and time.perf_counter() < deadline:
        middle = (low + high) / 2
        try:
            found = mip.minimise(replace(program, room_K=program.room_K + middle * size_C), deadline)
        except mip.OutOfTimeError:
            break
        low, high, rows = (low, missed(found.rows), found.rows) if found else (middle, high, rows)
    words = []
    for c in constraints:
        total = reached(c, problem, rows.tolist())
        words.append(str(c) if holds(c, total) else c.worded(as_limit(c, total, problem)))
    return " with ".join(words) + ("" if high - low <= 1e-3 * high else " (the nearest until time was up)")
