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

For prices p >= 0 of the sums, L(p) = sum_l (least w + p t of layer l) - p r is a lower bound, and whatever uses option o
weighs at least L(p) + d_o, where d_o is by how much o is dearer than its layer's cheapest choice; of several, d adds up.
So: take the prices from the linear relaxation; if a choice is known that weighs z, only those of total d <= z - L(p) can be
better. Mostly they are few, and are listed: a proof that rests on no solver's tolerance. Where they are many, SCIP solves
the program of the options with small d alone (the core), first of few, then of all that z does not rule out; relative to a
choice near the optimum and in units of its own, so that the unit of the weights is no matter.
"""
import datetime
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

FIRST, SECOND, BOTH = 0, 1, 2
FEASIBILITY = 1e-9  # of SCIP, relative to the largest coefficient of a row; at its default of 1e-6 it breaks limits
CORE = 2.0  # options per cell in SCIP's first core, on average
LISTED = 200_000  # choices that are listed at most; a hundred bytes and a microsecond each
NOISE = 1e-14  # relative error of a sum of floats, generously


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
        return bool((self.over(rows) <= 0).all())

    def least(self, weight_O: np.ndarray) -> np.ndarray:
        """Each layer's least weight of half 0, of half 1 and of both: (3, layers), infinite where there is no option."""
        least_HL = np.full((3, int(self.layer_O.max()) + 1), np.inf)
        np.minimum.at(least_HL, (self.half_O, self.layer_O), weight_O)
        return least_HL

    def cheapest(self, weight_O: np.ndarray) -> np.ndarray:
        """The choice of least weight, limits aside."""
        first_L, second_L, both_L = self.least(weight_O)
        joint_O = (both_L < first_L + second_L)[self.layer_O]
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
    weight: float
    bound: float  # nothing that fits weighs less
    proven: bool  # bound and weight are the same, as far as floats tell


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
    prices_K = _prices(program, program.cheapest(program.weight_O), deadline)
    priced = _price(program, prices_K)
    found = _list(program, priced, _overpaid(program, prices_K) if start is None else start, deadline)
    if found is None or not found.proven:
        found = _solve(program, priced, found.rows if found else None, deadline)
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
    """A program at given prices."""

    weight_O: np.ndarray  # w + p t
    least_L: np.ndarray  # of each layer's cheapest choice
    dearer_O: np.ndarray  # by how much the cheapest choice with this option is dearer
    bound: float  # L(p), less what floats may have it wrong
    noise: float  # what floats may have a difference to it wrong


def _price(program: Program, prices_K: np.ndarray) -> Priced:
    weight_O = program.weight_O + prices_K @ program.share_KO
    cheapest = program.cheapest(weight_O)
    bound = math.fsum([*program.weight_O[cheapest], *(prices_K * program.over(cheapest))])
    noise = NOISE * (np.abs(program.weight_O[cheapest]).sum() + prices_K @ np.abs(program.share_KO[:, cheapest]).sum(axis=1))
    first_L, second_L, both_L = program.least(weight_O)
    least_L = np.minimum(first_L + second_L, both_L)
    partner_HL = np.stack([second_L, first_L, np.zeros_like(both_L)])
    dearer_O = weight_O + partner_HL[program.half_O, program.layer_O] - least_L[program.layer_O]
    return Priced(weight_O, least_L, np.maximum(0.0, dearer_O), bound - noise, 2 * noise)


def _list(program: Program, priced: Priced, start: np.ndarray | None, deadline: float) -> Found | None:
    """Look through every choice of small total d, further and further, until it is proven that the best was among them.

    Not proven where they become too many; None if none was found that fits.
    """
    ranked = np.sort(priced.dearer_O)
    best, size = start, len(program.cheapest(priced.weight_O)) + 8
    while time.perf_counter() < deadline:
        whole = size >= len(ranked)
        reach = np.inf if whole else ranked[size] + priced.noise
        if best is not None:
            reach = min(reach, program.weight(best) - priced.bound + priced.noise)
        choices = _choices_within(program, priced, reach)
        if choices is None:
            break
        for rows in choices:  # lightest first
            if best is not None and program.weight(rows) >= program.weight(best):
                break
            if program.fits(rows):
                best = np.sort(rows)
                break
        if best is not None and program.weight(best) - priced.bound + priced.noise <= reach:
            return Found(best, program.weight(best), program.weight(best), True)
        if whole:
            break
        size += 8
    return None if best is None else Found(best, program.weight(best), priced.bound, False)


def _choices_within(program: Program, priced: Priced, reach: float) -> Iterator[np.ndarray] | None:
    """Those of total d up to `reach` that seem to fit, lightest first; None if there are too many."""
    values_VO = np.vstack([program.weight_O, program.share_KO])
    values_VO = np.hstack([values_VO, np.zeros((len(values_VO), 1))])  # option -1, beside a joint one, is nothing
    layers = []  # (d, pairs of options) of each layer's choices, cheapest first
    for rows in np.split(order := np.argsort(program.layer_O, kind="stable"), np.flatnonzero(np.diff(program.layer_O[order])) + 1):
        rows = rows[priced.dearer_O[rows] <= reach]
        first, second, both = (rows[program.half_O[rows] == half] for half in (FIRST, SECOND, BOTH))
        pairs = np.array([*((a, b) for a in first for b in second), *((b, -1) for b in both)])
        dearer = np.where(pairs >= 0, priced.weight_O[pairs], 0.0).sum(axis=1) - priced.least_L[program.layer_O[pairs[0, 0]]]
        kept = np.argsort(dearer, kind="stable")[: (dearer <= reach).sum()]
        layers.append((np.maximum(0.0, dearer[kept]), pairs[kept]))
    layers.sort(key=lambda layer: -layer[0][1] if len(layer[0]) > 1 else -math.inf)  # those that multiply the list come last
    dearer_S, value_VS, history = np.zeros(1), np.zeros((len(values_VO), 1)), []
    for dearer_C, pairs in layers:
        total_SC = dearer_S[:, None] + dearer_C
        state, choice = np.nonzero(total_SC <= reach)
        if len(state) > LISTED:
            return None
        value_VS = value_VS[:, state] + values_VO[:, pairs].sum(axis=2)[:, choice]
        dearer_S = total_SC[state, choice]
        history.append((state, pairs[choice]))
    room_V = program.room_K + 1e-12 * np.abs(program.share_KO).sum(axis=1)  # float sums; the exact ones decide
    seeming = np.flatnonzero((value_VS[1:] <= room_V[:, None]).all(axis=0))
    return (_trace(history, index) for index in seeming[np.argsort(value_VS[0, seeming], kind="stable")])


def _trace(history: list[tuple[np.ndarray, np.ndarray]], index: int) -> np.ndarray:
    """The options that led to entry `index` of the list."""
    rows = []
    for state, pairs in reversed(history):
        rows += [option for option in pairs[index].tolist() if option >= 0]
        index = state[index]
    return np.array(rows)


def _solve(program: Program, priced: Priced, best: np.ndarray | None, deadline: float) -> Found | None:
    """By SCIP, from the core outwards; `best` is a choice that fits, if one is known."""
    bound, noise, dearer_O = priced.bound, priced.noise, priced.dearer_O
    ranked = np.sort(dearer_O)
    size = math.ceil(CORE * len(program.cells))
    while True:
        reach = ranked[min(size, len(ranked)) - 1]
        if best is not None:
            reach = min(reach, program.weight(best) - bound)
        inside_O = dearer_O <= reach
        inside_O[[] if best is None else best] = True
        core = np.flatnonzero(inside_O)
        hint = None if best is None else np.searchsorted(core, best)
        rows, core_bound, complete = _solve_core(program.only(core), deadline, hint)
        if rows is not None and (best is None or program.weight(core[rows]) < program.weight(best)):
            best = core[rows]
        if best is None:
            if not complete:
                raise OutOfTimeError
            if inside_O.all():
                return None
            size = 4 * len(core)  # nothing fits in this core
            continue
        weight, left_out = program.weight(best), bound + dearer_O[~inside_O].min(initial=np.inf)
        if not complete:
            return Found(best, weight, float(min(weight, max(bound, min(core_bound, left_out)))), False)
        if noise < weight - bound < 1e-3 * reach:  # a few huge weights drowned the rest: without them, in a smaller unit
            kept = np.unique(np.concatenate([np.flatnonzero(dearer_O <= weight - bound), best]))
            found = minimise(program.only(kept), deadline, np.searchsorted(kept, best))
            return replace(found, rows=kept[found.rows])
        if left_out >= weight - noise:
            return Found(best, weight, weight, True)
        size = len(ranked)  # all that the bound has not ruled out


def _prices(program: Program, near: np.ndarray, deadline: float) -> np.ndarray:
    """The prices of the sums at the optimum of the linear relaxation; zeros where it has none."""
    model, unit, unit_K = _model(program.relative_to(near), integer=False)
    parameters = _parameters(deadline)
    result = mathopt.solve(model, mathopt.SolverType.GLOP, params=parameters) if parameters else None
    if result is None or result.termination.reason.name != "OPTIMAL":
        return np.zeros(len(unit_K))
    dual_K = np.array(result.dual_values(list(model.linear_constraints())[len(program.cells) :]))
    return np.maximum(0.0, -dual_K) * unit / unit_K


def _solve_core(program: Program, deadline: float, hint: np.ndarray | None) -> tuple[np.ndarray | None, float, bool]:
    """The lightest choice or None, a bound on it, and whether the solver was done before the deadline."""
    near = program.cheapest(program.weight_O) if hint is None else hint
    model, unit, _ = _model(program.relative_to(near), integer=True)
    x_O = list(model.variables())
    hints = [] if hint is None else [mathopt.SolutionHint(variable_values={x_O[row]: 1.0 for row in hint})]
    while parameters := _parameters(deadline):
        parameters.gscip.real_params["numerics/feastol"] = FEASIBILITY
        how = mathopt.ModelSolveParameters(solution_hints=hints)
        result = mathopt.solve(model, mathopt.SolverType.GSCIP, params=parameters, model_params=how)
        reason = result.termination.reason.name
        if reason in ("INFEASIBLE", "INFEASIBLE_OR_UNBOUNDED"):
            return None, np.inf, True
        if reason not in ("OPTIMAL", "FEASIBLE"):
            break
        rows = np.flatnonzero(np.array(result.variable_values(x_O)) > 0.5)
        if program.fits(rows):
            return rows, program.weight(near) + unit * result.dual_bound(), reason == "OPTIMAL"
        _cut_off(program, model, rows)
        hints = []
    return None, -np.inf, False


def _cut_off(program: Program, model: mathopt.Model, rows: np.ndarray) -> None:
    """Exclude `rows`, which break limits by less than the solver sees, and whatever breaks them alike.

    Shares repeat from layer to layer, so every permutation of `rows` would come back in turn. Each limit is written again as
    a change from `rows`: its right side is near 0, the solver's tolerance absolute, so scaling up sharpens it.
    """
    x_O, local = list(model.variables()), program.relative_to(rows)
    model.add_linear_constraint(mathopt.fast_sum(x_O[row] for row in rows) <= len(rows) - 1)
    for share_O, room, unit in zip(local.share_KO, local.room_K, _units(local.share_KO), strict=True):
        if room < 0:
            terms = (1e4 / unit * share * x for share, x in zip(share_O.tolist(), x_O, strict=True) if share)
            model.add_linear_constraint(mathopt.fast_sum(terms) <= 1e4 / unit * room)


def _parameters(deadline: float) -> mathopt.SolveParameters | None:
    """No gap, one thread, the time that is left; None if there is none."""
    left_s = deadline - time.perf_counter()
    if left_s <= 0:
        return None
    limit = datetime.timedelta(seconds=left_s)
    return mathopt.SolveParameters(relative_gap_tolerance=0.0, absolute_gap_tolerance=0.0, threads=1, time_limit=limit)


def _units(values_KO: np.ndarray) -> np.ndarray:
    largest_K = np.abs(values_KO).max(axis=1, initial=0.0)
    return np.where(largest_K > 0, largest_K, 1.0)


def _model(program: Program, integer: bool) -> tuple[mathopt.Model, float, np.ndarray]:
    """The program as a model, the unit of its weights and those of its sums. Through a proto: ten times faster to build."""
    (unit,), unit_K = _units(program.weight_O[None]), _units(program.share_KO)
    weight_O, share_KO, room_K = program.weight_O / unit, program.share_KO / unit_K[:, None], program.room_K / unit_K
    num_options, cells, proto = len(weight_O), program.cells, model_pb2.ModelProto()
    proto.variables.ids.extend(range(num_options))
    proto.variables.lower_bounds.extend([0.0] * num_options)
    proto.variables.upper_bounds.extend([1.0] * num_options)
    proto.variables.integers.extend([integer] * num_options)
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
