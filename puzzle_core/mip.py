"""One option per cell, least weight, some sums limited: solved to a proven optimum. Arrays in, rows out.

    Options   o in O          a layer takes one option of half 0 and one of half 1, or one of half 2, which is both
    Weights   w_o             what is made least
    Shares    t_ko            what option o adds to sum k
    Room      r_k             the most that sum k may be, tolerance included
    Variables x_o in {0, 1}   1 where the option is chosen

    Minimise  sum_o w_o x_o
    such that sum_{o in half 0 or 2 of l} x_o = 1      for every layer l
              sum_{o in half 1 or 2 of l} x_o = 1      for every layer l
              sum_o t_ko x_o <= r_k                    for every sum k

All sums are exact: each float is a whole number of some power of two, and whole numbers are what is added and compared. So
the optimum is that of the floats given, near ties included, and a limit holds or does not.

For prices p >= 0 of the sums, L(p) = sum_l (least w + p t of layer l) - p r is a lower bound, and whatever uses option o
weighs at least L(p) + d_o, where d_o is the reduced cost of o: by how much it is dearer than its layer's cheapest choice. Of
several options, d adds up. Both are floats rounded down, so they stay bounds. Prices come from the linear relaxation; any
are valid. If a choice of weight z is known, only those of total d <= z - L(p) can be lighter. Mostly they are few, and are
enumerated. Where they are too many, CP-SAT solves the program of the options with small d alone (the core), first of few,
then of all that z does not rule out. It gets the whole numbers, cut into limbs that fit its 64 bits: no tolerance, no scale.
"""
import datetime
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from ortools.sat.python import cp_model

FIRST, SECOND, BOTH = 0, 1, 2
CORE = 2.0  # options per cell in CP-SAT's first core, on average
LISTED = 200_000  # choices that are enumerated at most; a hundred bytes and a microsecond each
EPS = 2.0**-52  # one rounding errs by at most half of it, relative
TINY = np.finfo(float).tiny  # below it, errors are not relative
LIMB = 40  # bits of a limb: a sum of 2**22 of them fits int64


@dataclass(frozen=True, eq=False)
class Program:
    """The arrays above. Every layer has options of both FIRST and SECOND, or of BOTH, or of all three."""

    layer_O: np.ndarray
    half_O: np.ndarray
    weight_O: np.ndarray
    share_KO: np.ndarray
    room_K: np.ndarray

    @cached_property
    def cells(self) -> list[np.ndarray]:
        """The options of each equation: half 0 of layer 0, half 1 of layer 0, half 0 of layer 1, ..."""
        order = np.argsort(self.layer_O, kind="stable")
        layers = np.split(order, np.flatnonzero(np.diff(self.layer_O[order])) + 1)
        return [rows[self.half_O[rows] != other] for rows in layers for other in (SECOND, FIRST)]

    def weight(self, rows: np.ndarray) -> float:
        return math.fsum(self.weight_O[rows])

    def over(self, rows: np.ndarray) -> np.ndarray:
        """By how much each sum of `rows` is above its room."""
        return np.array([math.fsum([*share_O[rows], -room]) for share_O, room in zip(self.share_KO, self.room_K, strict=True)])

    def fits(self, rows: np.ndarray) -> bool:
        return bool((self.over(rows) <= 0).all())  # the sign of a sum by fsum is that of the exact sum

    def lighter(self, rows: np.ndarray, others: np.ndarray) -> bool:
        """Whether `rows` weigh less than `others`, exactly."""
        return math.fsum([*self.weight_O[rows], *-self.weight_O[others]]) < 0

    def least(self, weight_O: np.ndarray) -> np.ndarray:
        """Each layer's least weight of half 0, of half 1 and of both: (3, layers), infinite where there is no option."""
        least_HL = np.full((3, int(self.layer_O.max()) + 1), np.inf)
        np.minimum.at(least_HL, (self.half_O, self.layer_O), weight_O)
        return least_HL

    def cheapest(self, weight_O: np.ndarray) -> np.ndarray:
        """The choice of least weight, limits aside."""
        first_L, second_L, both_L = self.least(weight_O)
        with np.errstate(invalid="ignore"):  # infinite where there is no option
            split_L = first_L + second_L
            virtual_L = split_L - first_L
            error_L = (first_L - (split_L - virtual_L)) + (second_L - virtual_L)  # split_L + error_L is the sum exactly (Knuth's TwoSum)
        joint_O = ((both_L < split_L) | ((both_L == split_L) & (error_L > 0)))[self.layer_O]
        candidates = np.flatnonzero(joint_O == (self.half_O == BOTH))
        order = candidates[np.lexsort((weight_O[candidates], self.half_O[candidates], self.layer_O[candidates]))]
        key = 3 * self.layer_O[order] + self.half_O[order]
        return np.sort(order[np.flatnonzero(np.diff(key, prepend=-1))])

    def only(self, kept: np.ndarray) -> "Program":
        per_option = {name: getattr(self, name)[kept] for name in ("layer_O", "half_O", "weight_O")}
        return replace(self, **per_option, share_KO=self.share_KO[:, kept])

    def relative_to(self, rows: np.ndarray) -> "Program":
        """The same program counted from the choice `rows`: its weight and sums are 0, the room is what it leaves."""
        values = np.vstack([self.weight_O, self.share_KO])
        reference_HLV = np.zeros((2, int(self.layer_O.max()) + 1, len(values)))
        reference_HLV[self.half_O[rows] % BOTH, self.layer_O[rows]] = values[:, rows].T  # a joint option stands at half 0
        values -= np.where(self.half_O != SECOND, reference_HLV[FIRST, self.layer_O].T, 0.0)
        values -= np.where(self.half_O != FIRST, reference_HLV[SECOND, self.layer_O].T, 0.0)
        return replace(self, weight_O=values[0], share_KO=values[1:], room_K=-self.over(rows))


@dataclass(frozen=True)
class Found:
    """A choice that fits, and what is proven of it."""

    rows: np.ndarray
    weight: float  # of the exact sum, rounded once
    bound: float  # nothing that fits weighs less
    proven: bool  # nothing that fits weighs less than `rows`, in exact sums


class OutOfTimeError(Exception):
    """Time was up before anything that fits was found or ruled out."""


def minimise(program: Program, deadline: float, start: np.ndarray | None = None) -> Found | None:
    """The lightest choice that fits, with its proof; None if nothing fits; OutOfTimeError.

    `start` is a choice to begin from, if it fits; `deadline` is a time.perf_counter().
    """
    near = program.cheapest(program.weight_O)
    if program.fits(near):
        return Found(near, program.weight(near), program.weight(near), True)
    start = start if start is not None and program.fits(start) else None
    kept = np.union1d(_undominated(program), np.array([] if start is None else start, int))
    program, start = program.only(kept), None if start is None else np.searchsorted(kept, np.sort(start))
    priced = _price(program, _prices(program, program.cheapest(program.weight_O), deadline))
    best, done = _enumerate(program, priced, _overpaid(program, priced.prices_K) if start is None else start, deadline)
    if done:
        found = None if best is None else Found(best, program.weight(best), program.weight(best), True)
    else:
        found = _solve(program, priced, best, deadline)
    return found and replace(found, rows=kept[found.rows])


def _undominated(program: Program) -> np.ndarray:
    """The options left without those that another of their layer and half matches or beats in weight and every sum."""
    kept = []
    for key in np.unique(3 * program.layer_O + program.half_O):
        rows = np.flatnonzero(3 * program.layer_O + program.half_O == key)
        values_VR = np.vstack([program.weight_O[None, rows], program.share_KO[:, rows]])
        as_good_RR = (values_VR[:, :, None] <= values_VR[:, None, :]).all(axis=0)  # [a, b]: a is as good as b
        equal_RR = as_good_RR & as_good_RR.T
        beaten_R = (as_good_RR & ~equal_RR).any(axis=0) | np.triu(equal_RR, 1).any(axis=0)
        kept.append(rows[~beaten_R])
    return np.sort(np.concatenate(kept))


def _overpaid(program: Program, prices_K: np.ndarray) -> np.ndarray | None:
    """A choice that fits, of those that are cheapest at prices above the relaxation's; None if there is none among them."""
    for factor in 1.0 + np.geomspace(1e-3, 1e3, 40) if prices_K.any() else ():
        rows = program.cheapest(program.weight_O + factor * prices_K @ program.share_KO)
        if program.fits(rows):
            return rows
    return None


@dataclass(frozen=True)
class Priced:
    """A program at given prices, every figure rounded down."""

    prices_K: np.ndarray
    low_O: np.ndarray  # w + p t
    least_L: np.ndarray  # of each layer's cheapest choice
    dearer_O: np.ndarray  # reduced costs: by how much the cheapest choice with this option is dearer
    bound: float  # L(p)

    def above(self, weight: float) -> float:
        """How far `weight` is above the bound, rounded up."""
        return math.nextafter(math.nextafter(weight, math.inf) - self.bound, math.inf)


def _price(program: Program, prices_K: np.ndarray) -> Priced:
    magnitude_O = np.abs(program.weight_O) + prices_K @ np.abs(program.share_KO)
    low_O = program.weight_O + prices_K @ program.share_KO - (len(prices_K) + 4) * (EPS * magnitude_O + TINY)
    first_L, second_L, both_L = program.least(low_O)
    least_L = np.nextafter(np.minimum(first_L + second_L, both_L), -np.inf)
    partner_HL = np.stack([second_L, first_L, np.zeros_like(both_L)])
    dearer_O = _dearer(low_O, partner_HL[program.half_O, program.layer_O], least_L[program.layer_O])
    paid_K = prices_K * program.room_K
    bound = math.fsum([*least_L, *-paid_K])
    return Priced(prices_K, low_O, least_L, dearer_O, bound - EPS * (np.abs(paid_K).sum() + abs(bound)) - TINY)


def _dearer(one: np.ndarray, other: np.ndarray, least: np.ndarray) -> np.ndarray:
    """one + other - least, which is not negative, rounded down."""
    return np.maximum(0.0, one + other - least - 4 * EPS * (np.abs(one) + np.abs(other) + np.abs(least)))


def _enumerate(program: Program, priced: Priced, best: np.ndarray | None, deadline: float) -> tuple[np.ndarray | None, bool]:
    """The lightest of all choices of small total d, further and further, until nothing else can be lighter.

    With it whether that is proven, which it is not where they become too many. None and proven: nothing fits.
    """
    ranked = np.sort(priced.dearer_O)
    size = len(program.cheapest(priced.low_O)) + 8
    while time.perf_counter() < deadline:
        whole = size >= len(ranked)
        reach = np.inf if whole else ranked[size]
        if best is not None:
            reach = min(reach, priced.above(program.weight(best)))
        listed = _lightest_within(program, priced, reach)
        if listed is None:
            break
        for rows in listed:
            best = rows if best is None or program.lighter(rows, best) else best
        if whole or (best is not None and priced.above(program.weight(best)) <= reach):
            return best, True
        size += 8
    return best, False


def _lightest_within(program: Program, priced: Priced, reach: float) -> list[np.ndarray] | None:
    """The lightest choice that fits among those of total d up to `reach`: in a list, empty if none fits. None if they are too many."""
    kept = np.flatnonzero(priced.dearer_O <= reach)
    program, low_O = program.only(kept), priced.low_O[kept]
    layers = []  # (d, pairs of options) of each layer's choices, cheapest first
    for rows in np.split(order := np.argsort(program.layer_O, kind="stable"), np.flatnonzero(np.diff(program.layer_O[order])) + 1):
        first, second, both = (rows[program.half_O[rows] == half] for half in (FIRST, SECOND, BOTH))
        pairs = np.array([*((a, b) for a in first for b in second), *((b, -1) for b in both)])
        partner = np.where(pairs[:, 1] < 0, 0.0, low_O[pairs[:, 1]])
        dearer = _dearer(low_O[pairs[:, 0]], partner, priced.least_L[program.layer_O[rows[0]]])
        near = np.argsort(dearer, kind="stable")[: (dearer <= reach).sum()]
        layers.append((dearer[near], pairs[near]))
    layers.sort(key=lambda layer: -layer[0][1] if len(layer[0]) > 1 else -math.inf)  # those that multiply the list come last
    values_V = [[*program.weight_O, 0.0], *np.column_stack([program.share_KO, program.room_K])]
    limbs_V = [_limbs([*_whole(values)[0], 0]) for values in values_V]  # the room is last but one; option -1, beside a joint one, is 0
    limb_NO = np.vstack(limbs_V)
    dearer_S, sum_NS, history = np.zeros(1), np.zeros((len(limb_NO), 1), np.int64), []
    for dearer_C, pairs in layers:
        total_SC = dearer_S[:, None] + dearer_C
        state, choice = np.nonzero(total_SC <= reach * (1 + len(layers) * EPS))  # total d is a float sum
        if len(state) > LISTED:
            return None
        sum_NS = sum_NS[:, state] + limb_NO[:, pairs].sum(axis=2)[:, choice]
        dearer_S = total_SC[state, choice]
        history.append((state, pairs[choice]))
    weight_JS, *sums = np.split(sum_NS, np.cumsum([len(limbs) for limbs in limbs_V])[:-1])
    left_S = np.arange(len(dearer_S))
    for sum_JS, limbs in zip(sums, limbs_V[1:], strict=True):
        over_JS = _carried(sum_JS[:, left_S] - limbs[:, -2, None])
        left_S = left_S[(over_JS[-1] < 0) | (over_JS == 0).all(axis=0)]
    for limb_S in _carried(weight_JS)[::-1]:
        left_S = left_S[limb_S[left_S] == limb_S[left_S].min(initial=np.iinfo(np.int64).max)]
    return [kept[_trace(history, left_S[0])]] if len(left_S) else []


def _trace(history: list[tuple[np.ndarray, np.ndarray]], index: int) -> np.ndarray:
    """The options that led to entry `index` of the list."""
    rows = []
    for state, pairs in reversed(history):
        rows += [option for option in pairs[index].tolist() if option >= 0]
        index = state[index]
    return np.sort(rows)


def _whole(values: Iterable[float]) -> tuple[list[int], Fraction]:
    """Floats as whole numbers of a unit, without any rounding, and the unit."""
    ratios = [value.as_integer_ratio() for value in map(float, values)]
    denominator = max(below for _, below in ratios)  # powers of two
    numbers = [above * (denominator // below) for above, below in ratios]
    divisor = math.gcd(*numbers) or 1
    return [number // divisor for number in numbers], Fraction(divisor, denominator)


def _limbs(numbers: list[int]) -> np.ndarray:
    """(limbs, numbers): number = sum_j limb_j 2**(LIMB j), the highest limb with the sign. Their sums do not overflow."""
    num_limbs = max(1, math.ceil(max(number.bit_length() for number in numbers) / LIMB))
    low = [[number >> LIMB * j & (1 << LIMB) - 1 for number in numbers] for j in range(num_limbs - 1)]
    return np.array([*low, [number >> LIMB * (num_limbs - 1) for number in numbers]], np.int64)


def _carried(sum_JS: np.ndarray) -> np.ndarray:
    """Sums of limbs as limbs, which compare from the highest to the lowest."""
    limb_JS = sum_JS.copy()
    for j in range(len(limb_JS) - 1):
        limb_JS[j + 1] += limb_JS[j] >> LIMB
        limb_JS[j] &= (1 << LIMB) - 1
    return limb_JS


def _solve(program: Program, priced: Priced, best: np.ndarray | None, deadline: float) -> Found | None:
    """By CP-SAT, from the core outwards; `best` is a choice that fits, if one is known."""
    dearer_O, ranked = priced.dearer_O, np.sort(priced.dearer_O)
    size = math.ceil(CORE * len(program.cells))
    while True:
        reach = ranked[min(size, len(ranked)) - 1]
        if best is not None:
            reach = min(reach, priced.above(program.weight(best)))
        inside_O = dearer_O <= reach
        inside_O[[] if best is None else best] = True
        core = np.flatnonzero(inside_O)
        rows, core_bound, complete = _solve_core(program.only(core), deadline, None if best is None else np.searchsorted(core, best))
        if rows is not None and (best is None or program.lighter(core[rows], best)):
            best = core[rows]
        if best is None:
            if not complete:
                raise OutOfTimeError
            if inside_O.all():
                return None
            size = 4 * len(core)  # nothing fits in this core
            continue
        weight, left_out = program.weight(best), dearer_O[~inside_O].min(initial=np.inf)
        if complete and left_out >= priced.above(weight):
            return Found(best, weight, weight, True)
        if not complete:
            bound = max(priced.bound, min(core_bound, math.nextafter(priced.bound + left_out, -math.inf)))
            return Found(best, weight, float(min(weight, bound)), False)
        size = len(ranked)  # all that the bound has not ruled out


def _solve_core(program: Program, deadline: float, hint: np.ndarray | None) -> tuple[np.ndarray | None, float, bool]:
    """The lightest choice or None, a bound on it, and whether CP-SAT was done before the deadline.

    Limb by limb: first the sum of the highest limbs is made least, then with each lower one what remains of it.
    """
    near = program.cheapest(program.weight_O) if hint is None else hint
    model = cp_model.CpModel()
    x_O = [model.new_bool_var("") for _ in program.weight_O]
    for cell in program.cells:
        model.add_exactly_one(x_O[row] for row in cell)
    for share_O, room in zip(program.share_KO, program.room_K, strict=True):
        *whole_O, whole_room = _whole([*share_O, room])[0]
        left = whole_room - sum(whole_O[row] for row in near)
        _limit(model, x_O, _limbs([*_relative_to(program, whole_O, near), left]), len(program.cells))
    whole_O, unit = _whole(program.weight_O)
    base, limb_JO = sum(whole_O[row] for row in near), _limbs(_relative_to(program, whole_O, near))
    rows, bound, least, rest = hint, -math.inf, 0, 0
    for level in reversed(range(len(limb_JO))):
        weight = rest * 2**LIMB + cp_model.LinearExpr.weighted_sum(x_O, limb_JO[level].tolist())
        model.minimize(weight)
        if rows is not None:
            model.clear_hints()
            chosen = set(rows.tolist())
            for row, x in enumerate(x_O):
                model.add_hint(x, row in chosen)
        solver, left_s = cp_model.CpSolver(), deadline - time.perf_counter()
        if left_s <= 0:
            return rows, bound, False
        solver.parameters.num_workers, solver.parameters.max_time_in_seconds = 1, left_s
        solver.parameters.presolve_inclusion_work_limit = 0  # that of 9.15 may cut off the optimum: github.com/google/or-tools/issues/5293
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            assert rows is None
            return None, math.inf, True
        if status == cp_model.UNKNOWN:
            return rows, bound, False
        assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), solver.status_name(status)
        done = status == cp_model.OPTIMAL
        found = np.flatnonzero([solver.boolean_value(x) for x in x_O])
        rows = found if rows is None or program.lighter(found, rows) else rows
        reached = solver.value(weight) if done else math.floor(math.nextafter(solver.best_objective_bound, -math.inf))
        least = least * 2**LIMB + reached  # lower limbs are not negative: they only add to it
        bound = math.nextafter(float(unit * (base + least * 2 ** (LIMB * level))), -math.inf)
        if not done:
            return rows, bound, False
        rest = model.new_int_var(0, len(program.cells), "")  # the lower limbs of all cells carry no more
        model.add(rest == weight - reached)
    assert unit * (base + least) == sum(map(Fraction, program.weight_O[rows].tolist())), "the hint is lighter"
    return rows, bound, True


def _limit(model: cp_model.CpModel, x_O: list[cp_model.IntVar], limb_JO: np.ndarray, num_cells: int) -> None:
    """At most the last of `limb_JO` is the sum of the chosen ones: limb by limb, each passing on what it lacks to the next."""
    lacking = 0
    for level, (*limb_O, room) in enumerate(limb_JO.tolist()):
        last = level == len(limb_JO) - 1
        passed = 0 if last else model.new_int_var(0, num_cells + 1, "")
        model.add(cp_model.LinearExpr.weighted_sum(x_O, limb_O) + lacking <= room + passed * 2**LIMB)
        lacking = passed


def _relative_to(program: Program, whole_O: list[int], rows: np.ndarray) -> list[int]:
    """Whole numbers of the options, counted from those of the choice `rows`, which become 0 in sum."""
    at = {(program.layer_O[row], program.half_O[row] % BOTH): whole_O[row] for row in rows}  # a joint option stands at half 0
    halves = {FIRST: (FIRST,), SECOND: (SECOND,), BOTH: (FIRST, SECOND)}
    options = zip(whole_O, program.layer_O, program.half_O, strict=True)
    return [whole - sum(at.get((layer, half), 0) for half in halves[both]) for whole, layer, both in options]


def _prices(program: Program, near: np.ndarray, deadline: float) -> np.ndarray:
    """The prices of the sums at the optimum of the linear relaxation; zeros where it has none."""
    model, unit, unit_K = _relaxation(program.relative_to(near))
    if (left_s := deadline - time.perf_counter()) <= 0:
        return np.zeros(len(unit_K))
    steps = 4 * (len(program.weight_O) + len(program.cells) + len(unit_K))  # where coefficients are 1e-16 of others, it may cycle
    parameters = mathopt.SolveParameters(threads=1, time_limit=datetime.timedelta(seconds=left_s), iteration_limit=steps)
    try:
        result = mathopt.solve(model, mathopt.SolverType.GLOP, params=parameters)
    except (AttributeError, RuntimeError, ValueError):  # GLOP ends abnormally; MathOpt 9.15 stumbles over its own message of that
        return np.zeros(len(unit_K))
    if result.termination.reason.name != "OPTIMAL":
        return np.zeros(len(unit_K))
    dual_K = np.array(result.dual_values(list(model.linear_constraints())[len(program.cells) :]))
    prices_K = np.maximum(0.0, -dual_K) * unit / unit_K
    return np.where(np.isfinite(prices_K), prices_K, 0.0)


def _units(values_KO: np.ndarray) -> np.ndarray:
    largest_K = np.abs(values_KO).max(axis=1, initial=0.0)
    return np.where(largest_K > 0, largest_K, 1.0)


def _relaxation(program: Program) -> tuple[mathopt.Model, float, np.ndarray]:
    """The linear relaxation as a model, the unit of its weights and those of its sums. Through a proto: ten times faster to build."""
    (unit,), unit_K = _units(program.weight_O[None]), _units(program.share_KO)
    weight_O, share_KO, room_K = program.weight_O / unit, program.share_KO / unit_K[:, None], program.room_K / unit_K
    num_options, cells, proto = len(weight_O), program.cells, model_pb2.ModelProto()
    proto.variables.ids.extend(range(num_options))
    proto.variables.lower_bounds.extend([0.0] * num_options)
    proto.variables.upper_bounds.extend([1.0] * num_options)
    proto.variables.integers.extend([False] * num_options)
    used = np.flatnonzero(weight_O)
    proto.objective.linear_coefficients.ids.extend(used.tolist())
    proto.objective.linear_coefficients.values.extend(weight_O[used].tolist())
    proto.linear_constraints.ids.extend(range(len(cells) + len(room_K)))
    proto.linear_constraints.lower_bounds.extend([1.0] * len(cells) + [-math.inf] * len(room_K))
    proto.linear_constraints.upper_bounds.extend([1.0] * len(cells) + room_K.tolist())
    rows = [(cell, np.ones(len(cell))) for cell in cells]
    rows += [(np.flatnonzero(share_O), share_O[share_O != 0]) for share_O in share_KO]
    for index, (columns, coefficients) in enumerate(rows):
        proto.linear_constraint_matrix.row_ids.extend([index] * len(columns))
        proto.linear_constraint_matrix.column_ids.extend(columns.tolist())
        proto.linear_constraint_matrix.coefficients.extend(coefficients.tolist())
    return mathopt.Model.from_model_proto(proto), unit, unit_K
