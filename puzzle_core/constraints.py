"""A user's limits as bounds on totals, and how far each limit can be reached.

    constraints:
      speedup: 1.3                                      # at least, as its name says
      latency_ms: 75%                                   # at most, of the parent's
      num_params: {at_least: 1.0e8, at_most: 1.2e8}
      prefill_ms: {at_most: 200, scenario: b1p4096g16}  # in another workload of the costs table
      memory_mib:                                       # several at once
        - 8000
        - {at_most: 9000, batch_size: 32, context_len: 8192}
      score: 0.5                                        # the loss of quality itself, where something else is minimised
"""
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real

import numpy as np

from puzzle_core.errors import UserError
from puzzle_core.problem import SCORE, WITHOUT_TIMING, Problem
from puzzle_core.spec import Constraint, Scenario

SLACK = 1e-9  # relative, on every limit: a limit that equals a reachable total is reachable, whatever the order of summing

# What a user may limit: the total that it bounds, and how. At most: total <= limit * unit. At least: total <= unit /
# limit. The unit is 1, the parent's total, or 1000 times the generated tokens, so that tokens per second bound ms.
CONSTRAINTS = {
    "latency_ms": ("latency_ms", "at most", "one"),
    "prefill_ms": ("prefill_ms", "at most", "one"),
    "decode_ms": ("decode_ms", "at most", "one"),
    "memory_mib": ("memory_mib", "at most", "one"),
    "num_params": ("num_params", "at most", "one"),
    "kv_mib": ("kv_mib", "at most", "one"),
    "score": (SCORE, "at most", "one"),
    "throughput_tokens_per_s": ("latency_ms", "at least", "tokens"),
    "speedup": ("latency_ms", "at least", "parent"),
    "memory_fraction": ("memory_mib", "at most", "parent"),
    "params_fraction": ("num_params", "at most", "parent"),
    "kv_fraction": ("kv_mib", "at most", "parent"),
}
KEYS = ("at_most", "at_least", "scenario", "batch_size", "context_len")


def constraints_from(limits: Mapping[str, object], problem: Problem) -> tuple[Constraint, ...]:
    """The user's limits as bounds on totals; None is no limit. ValueError for an unknown name or a bad limit."""
    constraints = []
    for name, written in limits.items():
        total, sense, _ = lookup(name, problem)
        for entry in written if isinstance(written, list | tuple) else [written]:
            if entry is None:
                continue
            entry = dict(entry) if isinstance(entry, Mapping) else {sense.replace(" ", "_"): entry}
            if unknown := [key for key in entry if key not in KEYS]:
                raise UserError(f"constraint {name} has no key '{unknown[0]}'; expected {', '.join(KEYS)}")
            senses = [key for key in ("at_most", "at_least") if entry.get(key) is not None]
            if not senses:
                raise UserError(f"constraint {name} says neither at_most nor at_least: {entry}")
            scenario = _scenario(name, total, entry, problem)
            constraints += [_constraint(name, key, entry[key], scenario, problem) for key in senses]
    return tuple(constraints)


def lookup(name: str, problem: Problem) -> tuple[str, str, str]:
    """The total, sense and unit of the limit `name`: of CONSTRAINTS, or of a metric of the costs table's own."""
    if name in CONSTRAINTS:
        return CONSTRAINTS[name]
    own = [total for total in problem.totals_there if total not in CONSTRAINTS]
    if name in own:
        return name, "at most", "one"
    known = [*CONSTRAINTS, *own]
    hint = "".join(f"did you mean '{close}'? " for close in difflib.get_close_matches(name, known, n=1))
    raise UserError(f"unknown constraint '{name}': {hint}There are {', '.join(known)}.")


def unit_of(name: str, problem: Problem, scenario: Scenario) -> float:
    total, _, unit = lookup(name, problem)
    if unit == "tokens":
        return 1000.0 * scenario.batch_size * scenario.generation_len
    return problem.total(total, problem.parent_rows, scenario) if unit == "parent" else 1.0


def _scenario(name: str, total: str, entry: Mapping[str, object], problem: Problem) -> Scenario:
    """The scenario that a limit holds in: the workload, one of the table's, or any batch size and context for bytes."""
    if entry.get("scenario") is not None:
        return Scenario.parse(str(entry["scenario"]))
    if entry.get("batch_size") is None and entry.get("context_len") is None:
        return problem.scenario
    if total not in WITHOUT_TIMING:
        raise UserError(
            f"constraint {name}: batch_size and context_len are for memory_mib and kv_mib, which are computed; "
            f"for what is measured name a scenario of the costs table: {', '.join(problem.scenarios)}"
        )
    there = {key: entry[key] for key in ("batch_size", "context_len") if entry.get(key) is not None}
    for key, value in there.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"constraint {name}: {key} is {value!r}; expected a whole number, at least 1")
    context_len = there.get("context_len", problem.scenario.cached_tokens)
    return Scenario(there.get("batch_size", problem.scenario.batch_size), context_len, 1)


def _constraint(name: str, key: str, limit: object, scenario: Scenario, problem: Problem) -> Constraint:
    total, sense, _ = lookup(name, problem)
    relative = isinstance(limit, str) and limit.endswith("%")
    try:
        value = float(limit[:-1]) / 100 if relative else limit
    except ValueError:
        value = limit
    number = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf
    if not number or (value == 0 and (sense, key) != ("at most", "at_most")):
        raise UserError(f"constraint {name} is {limit!r}; expected a positive number, a percentage of the parent's, or null for no limit")
    problem.shares(total, scenario)  # an unknown scenario is refused here
    if total == "decode_ms" and not scenario.num_decode_steps:
        raise UserError(f"constraint {name}: a request of {scenario} has no decode step: prefill gives its one token. Limit prefill_ms.")
    unit = unit_of(name, problem, scenario)
    bound = unit * value if sense == "at most" else unit / value
    if relative:
        parent = problem.total(total, problem.parent_rows, scenario)
        bound = parent * value if sense == "at most" else parent / value
    if not math.isfinite(bound):
        raise UserError(f"constraint {name} is {limit!r}, which no number of {total} can hold; leave it out or set it to null")
    upper = (key == "at_most") == (sense == "at most")
    where = "" if scenario == problem.scenario else str(scenario)
    return Constraint(name, float(value), total, bound if upper else None, None if upper else bound, where, relative)


def scenario_of(constraint: Constraint, problem: Problem) -> Scenario:
    return Scenario.parse(constraint.scenario) if constraint.scenario else problem.scenario


def reached(constraint: Constraint, problem: Problem, rows: Iterable[int]) -> float:
    """The total that `constraint` bounds, of the options `rows`."""
    return problem.total(constraint.total, rows, scenario_of(constraint, problem))


def holds(constraint: Constraint, total: float) -> bool:
    slack = SLACK * abs(constraint.bound)
    return total <= constraint.bound + slack if constraint.lower is None else total >= constraint.bound - slack


def named(constraints: Iterable[Constraint]) -> str:
    return " with ".join(map(str, constraints)) or "no constraint"


def extreme(constraint: Constraint, problem: Problem) -> str:
    """Which end of the user's scale is out of reach."""
    cost_like = lookup(constraint.name, problem)[1] == "at most"
    return "smallest" if cost_like == (constraint.lower is None) else "largest"


def as_limit(constraint: Constraint, total: float, problem: Problem) -> str:
    """The limit that an architecture of `total` just meets, rounded to the reachable side: it can be typed in."""
    cost_like = lookup(constraint.name, problem)[1] == "at most"
    rounded = math.ceil if cost_like == (constraint.lower is None) else math.floor
    if not cost_like and not total:
        return "without end"
    where, scale = scenario_of(constraint, problem), 100 if constraint.relative else 1
    unit = problem.total(constraint.total, problem.parent_rows, where) if constraint.relative else unit_of(constraint.name, problem, where)
    if not unit:
        return "none"
    return digits(scale * (total / unit if cost_like else unit / total), rounded) + ("%" if constraint.relative else "")


def digits(value: float, rounded: Callable[[float], int] = round) -> str:
    """Five digits or all the integer ones, without an exponent."""
    decimals = max(0, 4 - math.floor(math.log10(abs(value)))) if value else 0
    return np.format_float_positional(rounded(value * 10**decimals) / 10**decimals, trim="-")
