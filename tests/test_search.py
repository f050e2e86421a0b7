"""The search finds the optimum, honours every limit, and says what to do where it cannot."""

import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, stage
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import coupled
from benchmarks import rivals as benchmark
from puzzle_core import checks, mip, rivals, schemas, search, tables
from puzzle_core.constraints import CONSTRAINTS, constraints_from
from puzzle_core.errors import UserError
from puzzle_core.problem import SCORE, TOTALS, Problem
from puzzle_core.search import InfeasibleError, frontier, solve
from puzzle_core.spec import NO_OP, PARENT, Architecture, Joint, Scenario, Variant

SCENARIO = "b2p64g32"
UNITS = {
    "prefill_ms": "ms",
    "decode_ms": "ms",
    "param_bytes": "bytes",
    "num_params": "count",
    "kv_bytes_per_token": "bytes",
}
PARENT_COSTS = {"prefill_ms": 3.0, "decode_ms": 0.2, "param_bytes": 2e7, "num_params": 1e7, "kv_bytes_per_token": 512.0}
ATTENTION, FFN = ["parent", "kv2", "kv1", "no_op"], ["parent", "w768", "w384", "no_op"]


def make_tables(num_layers=4, attention=ATTENTION, ffn=FFN, score=None, cost=None, seed=0):
    """Scores and costs that fit the schemas; `score(layer, subblock, k)`, `cost(subblock, k, metric)` of variant k."""
    random = np.random.default_rng(seed)
    score = score or (lambda layer, subblock, k: k * random.lognormal())
    cost = cost or (lambda subblock, k, metric: PARENT_COSTS[metric] * 0.6**k * random.uniform(0.9, 1.1))
    options = [("attention", k, v) for k, v in enumerate(attention)] + [("ffn", k, v) for k, v in enumerate(ffn)]
    scores = [
        (layer, subblock, variant, "kl", 0.0 if variant == "parent" else float(score(layer, subblock, k)), 100, "")
        for layer, (subblock, k, variant) in itertools.product(range(num_layers), options)
    ]
    costs = [
        (subblock, variant, SCENARIO, metric, float(cost(subblock, k, metric)), UNITS[metric], "measured", "test")
        for (subblock, k, variant), metric in itertools.product([*options, ("outside", 0, "parent")], UNITS)
    ]
    return (
        pd.DataFrame(scores, columns=list(tables.SCHEMAS["scores"].columns)),
        pd.DataFrame(costs, columns=[name for name, column in tables.SCHEMAS["costs"].columns.items() if column.default is None]),
    )


def totals(problem, architecture):
    return problem.totals(problem.rows_of(architecture))


def make_problem(**how):
    return Problem.from_tables(*make_tables(**how), "kl", SCENARIO)


def exhaustive(problem, constraints):
    """The least score over every architecture within the constraints; None if there is none."""
    score_A = np.zeros(1)
    total_A = {c.total: np.full(1, problem.shares(c.total)[1]) for c in constraints}
    for cell in range(2 * problem.num_layers):
        rows = np.flatnonzero(2 * problem.layer_O + problem.half_O == cell)
        score_A = np.add.outer(score_A, problem.score_O[rows]).ravel()
        total_A = {name: np.add.outer(sums, problem.shares(name)[0][rows]).ravel() for name, sums in total_A.items()}
    fits_A = np.ones(len(score_A), bool)
    for c in constraints:
        fits_A &= total_A[c.total] <= c.upper * (1 + 1e-9)
    return score_A[fits_A].min() if fits_A.any() else None


def random_architecture(problem, random):
    picks = [
        problem.options[random.choice(np.flatnonzero(2 * problem.layer_O + problem.half_O == c))][2] for c in range(2 * problem.num_layers)
    ]
    return Architecture(tuple(zip(picks[::2], picks[1::2], strict=True)))


KINDS = ["plain", "equal scores", "negative scores", "scores far apart", "zero costs", "equal costs", "costs far apart"]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(KINDS),
    st.sets(st.sampled_from(["latency_ms", "memory_mib", "num_params", "throughput_tokens_per_s"]), max_size=3),
    st.sampled_from([1.0, 1.0, 0.9, 1.1]),
    st.booleans(),
)
def test_the_mip_scores_what_exhaustive_search_scores(seed, num_layers, num_attention, num_ffn, kind, limited, slack, listed):
    random = np.random.default_rng(seed)
    score = {
        "equal scores": lambda layer, subblock, k: random.integers(0, 3),
        "negative scores": lambda layer, subblock, k: random.normal(),
        "scores far apart": lambda layer, subblock, k: 10 ** random.uniform(-6, 6),
    }.get(kind)
    cost = {
        "zero costs": lambda subblock, k, metric: 0 if metric.endswith("ms") else PARENT_COSTS[metric] * 0.5**k,
        "equal costs": lambda subblock, k, metric: PARENT_COSTS[metric] // 2 ** (k // 2),
        "costs far apart": lambda subblock, k, metric: 10 ** random.uniform(-6, 6),
    }.get(kind)
    problem = make_problem(
        num_layers=num_layers, attention=ATTENTION[:num_attention], ffn=FFN[:num_ffn], score=score, cost=cost, seed=seed
    )
    reachable = totals(problem, random_architecture(problem, random))  # at slack 1 the budgets are exactly tight
    limits = {name: reachable[name] * slack for name in sorted(limited) if 0 < reachable[name] < math.inf}
    constraints = constraints_from(limits, problem)
    expected = exhaustive(problem, constraints)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mip, "LISTED", mip.LISTED if listed else 0)  # 0: CP-SAT alone
        if expected is None:
            with pytest.raises(InfeasibleError):
                solve(problem, constraints)
            return
        solution = solve(problem, constraints)
    assert solution.score == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert solution.bound <= solution.score
    assert solution.status == "optimal" and solution.gap < 1e-6
    for c in constraints:
        assert solution.totals[c.total] <= c.upper * (1 + 1e-9)


@pytest.mark.parametrize("over", [1.1e-9, 1.4e-9, 1e-8, 3e-7])
def test_a_limit_just_below_a_total_is_never_broken_however_many_permutations_reach_it(over):
    # 15 cheap layers of 30 break the limit by less than the solver sees, in any order; 16 keep it.
    random = np.random.default_rng(0)
    problem = make_problem(
        num_layers=30, attention=["parent"], ffn=["parent", "w768"], score=lambda *_: 1 + random.uniform(0, 1e-3)
    )
    cheap = Variant("w", 768)
    fifteen, sixteen = (
        totals(problem, Architecture(((PARENT, cheap),) * n + ((PARENT, PARENT),) * (30 - n))) for n in (15, 16)
    )
    (constraint,) = constraints_from({"latency_ms": fifteen["latency_ms"] / (1 + over)}, problem)
    solution = solve(problem, (constraint,), time_limit_s=20)
    assert solution.status == "optimal"
    assert solution.totals["latency_ms"] == pytest.approx(sixteen["latency_ms"], rel=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e6])
def test_the_unit_of_the_scores_does_not_matter(factor):
    scores, costs = make_tables(num_layers=12)
    problem = Problem.from_tables(scores, costs, "kl", SCENARIO)
    scaled = Problem.from_tables(scores.assign(value=factor * scores["value"]), costs, "kl", SCENARIO)
    limits = {"speedup": 1.7, "memory_fraction": 0.6}
    one, other = (solve(p, constraints_from(limits, p)) for p in (problem, scaled))
    assert other.score == pytest.approx(factor * one.score, rel=1e-9)
    assert other.totals == one.totals


def test_without_constraints_the_parent_wins_and_its_totals_are_the_parents():
    solution = solve(make_problem(), ())
    assert solution.architecture == Architecture.uniform(4)
    assert (solution.score, solution.gap, solution.status) == (0.0, 0.0, "optimal")
    assert solution.totals == solution.parent_totals


def test_totals_are_the_sums_that_a_reader_would_do_by_hand():
    costs = {
        "prefill_ms": 4.0,
        "decode_ms": 0.5,
        "param_bytes": 2.0**20,
        "num_params": 7.0,
        "kv_bytes_per_token": 2.0**13,
    }
    problem = make_problem(num_layers=2, cost=lambda subblock, k, metric: 0.0 if k else costs[metric])
    half = Architecture(((PARENT, PARENT), (NO_OP, NO_OP)))
    found = totals(problem, half)  # two parent subblocks and what is outside: three rows
    assert found["prefill_ms"] == 12 and found["decode_ms"] == 1.5
    assert found["latency_ms"] == 12 + 31 * 1.5  # prefill gives the first of 32 tokens
    assert found["kv_mib"] == 3 * 2 * 95 * 2**13 / 2**20  # 2 sequences of 64 + 32 tokens, of which the last is not fed back
    assert found["memory_mib"] == 3 + found["kv_mib"] and found["num_params"] == 21
    assert found["throughput_tokens_per_s"] == pytest.approx(2 * 32 / 0.0585)


def test_totals_of_an_unknown_variant_name_the_layer_and_the_variant():
    with pytest.raises(ValueError, match="layer 0 attention kv7, layer 1 attention kv7"):
        totals(make_problem(num_layers=2), Architecture.uniform(2, attention=Variant("kv", 7)))
    with pytest.raises(ValueError, match="the tables have 2 layers, the architecture 1"):
        totals(make_problem(num_layers=2), Architecture.uniform(1))


def test_every_constraint_bounds_the_total_that_it_names():
    problem = make_problem()
    parent = problem.parent_totals
    limits = {
        "speedup": (2.0, parent["latency_ms"] / 2),
        "throughput_tokens_per_s": (parent["throughput_tokens_per_s"], parent["latency_ms"]),
    }
    for name in set(CONSTRAINTS) - set(limits):
        total = CONSTRAINTS[name][0]
        limits[name] = (0.5, 0.5 * parent[total]) if name.endswith("_fraction") else (1234.0, 1234.0)
    for name, (limit, upper) in limits.items():
        (constraint,) = constraints_from({name: limit}, problem)
        assert (constraint.name, constraint.limit, constraint.total) == (name, limit, CONSTRAINTS[name][0])
        assert constraint.upper == pytest.approx(upper, rel=1e-12)


def test_null_is_no_limit_and_an_unknown_name_gets_a_suggestion():
    problem = make_problem()
    assert constraints_from({"speedup": None, "memory_mib": None}, problem) == ()
    with pytest.raises(ValueError, match="unknown constraint 'speed_up': did you mean 'speedup'.*memory_fraction"):
        constraints_from({"speed_up": None}, problem)


@pytest.mark.parametrize("limit", [0, -1.5, "1.35", True, math.nan, math.inf])
def test_a_limit_that_is_no_positive_number_is_refused(limit):
    with pytest.raises(ValueError, match="constraint speedup is .* expected a positive number"):
        constraints_from({"speedup": limit}, make_problem())


def test_a_limit_out_of_reach_comes_with_the_best_one_that_can_be_typed_in_instead():
    problem = make_problem()
    with pytest.raises(InfeasibleError) as error:
        solve(problem, constraints_from({"speedup": 50.0}, problem))
    message = str(error.value)
    assert message.startswith(f"no architecture fits speedup 50.0 in scenario {SCENARIO}: largest reachable is ")
    assert "latency_ms" in message and "conf/search_space/" in message
    reachable = float(message.split("reachable is ")[1].split()[0])
    assert solve(problem, constraints_from({"speedup": reachable}, problem)).status == "optimal"
    with pytest.raises(InfeasibleError):
        solve(problem, constraints_from({"speedup": 1.001 * reachable}, problem))
    for seed in range(8):  # rounded to the reachable side, whichever is nearer
        problem = make_problem(num_layers=2, seed=seed)
        with pytest.raises(InfeasibleError) as error:
            solve(problem, constraints_from({"speedup": 50.0}, problem))
        reachable = float(str(error.value).split("reachable is ")[1].split()[0])
        assert solve(problem, constraints_from({"speedup": reachable}, problem)).status == "optimal"


def test_what_is_only_counted_is_no_source_beside_what_was_measured():
    scores, costs = make_tables()
    mixed = costs.assign(source=costs["unit"].map(lambda unit: "measured" if unit == "ms" else "computed"))
    assert Problem.from_tables(scores, mixed, "kl", SCENARIO).source == "measured"
    assert Problem.from_tables(scores, costs.assign(source="computed"), "kl", SCENARIO).source == "computed"


def test_of_several_limits_the_message_names_those_out_of_reach_and_tells_how_far_the_others_go():
    problem = make_problem()
    with pytest.raises(InfeasibleError) as error:
        solve(problem, constraints_from({"memory_mib": 1.0, "speedup": 1.2}, problem))
    first, memory, speedup, nearest, last = str(error.value).splitlines()
    assert first == f"no architecture fits memory_mib 1.0 in scenario {SCENARIO}:"
    assert "memory_mib 1.0: smallest reachable is" in memory and "speedup 1.2: largest reachable is" in speedup
    assert last.startswith("Relax")


def test_limits_that_only_conflict_together_come_with_what_is_left_of_each():
    # kv1 saves 4 ms and costs 4 MiB, w768 the other way round: what helps one limit breaks the other.
    cheap, dear, parent = 1.0, 9.0, 5.0
    ms = {("attention", 1): cheap, ("ffn", 1): dear}
    mib = {("attention", 1): dear, ("ffn", 1): cheap}

    def cost(subblock, k, metric):
        share = {"prefill_ms": ms, "param_bytes": mib}.get(metric)
        return 0.0 if share is None else share.get((subblock, k), parent) * (2**20 if share is mib else 1)

    problem = make_problem(num_layers=2, attention=["parent", "kv1"], ffn=["parent", "w768"], cost=cost)
    limits = {"prefill_ms": 18.0, "memory_mib": 20.0}  # each reaches 17 alone
    with pytest.raises(InfeasibleError) as error:
        solve(problem, constraints_from(limits, problem))
    first, prefill, memory, nearest, _ = str(error.value).splitlines()
    assert first == f"no architecture fits prefill_ms 18.0 with memory_mib 20.0 in scenario {SCENARIO}:"
    assert "smallest reachable is 17 alone; while the others hold, 33 (prefill_ms 17, limit 18)" in prefill
    assert "smallest reachable is 17 alone; while the others hold, 33 (memory_mib 17, limit 20)" in memory


def test_a_time_limit_that_leaves_nothing_is_no_proof_of_infeasibility():
    problem = make_problem()
    with pytest.raises(TimeoutError, match="speedup 1.5 .* within 1e-09 s. .*search.time_limit_s"):
        solve(problem, constraints_from({"speedup": 1.5}, problem), time_limit_s=1e-9)


def test_a_solution_cut_short_by_the_time_limit_is_feasible_and_brackets_the_optimum():
    problem = make_problem(num_layers=60, ffn=["parent", *(f"w{width}" for width in range(1000, 0, -125)), "no_op"])
    constraints = constraints_from({"speedup": 1.9, "memory_fraction": 0.5}, problem)
    optimum = solve(problem, constraints)
    hurried = None
    for time_limit_s in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):  # the first in which this machine finds anything
        try:
            hurried = solve(problem, constraints, time_limit_s)
            break
        except TimeoutError:
            continue
    assert hurried and hurried.bound <= optimum.score * (1 + 1e-9) and optimum.score <= hurried.score * (1 + 1e-9)
    assert (hurried.status == "optimal") == (hurried.gap < 1e-6)
    assert all(hurried.totals[c.total] <= c.upper * (1 + 1e-9) for c in constraints)


def test_scored_variants_without_a_cost_are_named_with_the_stage_that_measures_them():
    scores, costs = make_tables()
    kept = costs[(costs["variant"] != "kv1") & ~((costs["variant"] == "w384") & (costs["metric"] == "decode_ms"))]
    with pytest.raises(ValueError, match=r"attention kv1 \(decode_ms, .*ffn w384 \(decode_ms\).*profile-hardware"):
        Problem.from_tables(scores, kept, "kl", SCENARIO)
    with pytest.raises(ValueError, match="outside parent .*profile-hardware"):
        Problem.from_tables(scores, costs[costs["subblock"] != "outside"], "kl", SCENARIO)
    extra = pd.concat([costs, costs[costs["variant"] == "kv1"].assign(variant="kv16")])
    problem = Problem.from_tables(scores, extra, "kl", SCENARIO)
    assert len(problem.options) == len(scores)  # a cost without a score is no option


def test_an_unknown_metric_or_scenario_comes_with_those_in_the_table():
    scores, costs = make_tables()
    with pytest.raises(ValueError, match="no metric 'lm_loss' in the scores table, which has: kl"):
        Problem.from_tables(scores, costs, "lm_loss", SCENARIO)
    with pytest.raises(ValueError, match=f"no scenario 'b1p1g1' in the costs table, which has: {SCENARIO}"):
        Problem.from_tables(scores, costs, "kl", "b1p1g1")


@pytest.mark.parametrize(
    "gone, named",
    [
        ("layer == 1", "layer 1 attention parent, layer 1 ffn parent"),
        ("layer == 2 and subblock == 'ffn'", "layer 2 ffn parent"),
        ("layer == 0 and variant == 'parent'", "layer 0 attention parent, layer 0 ffn parent"),
    ],
)
def test_layers_subblocks_and_parents_that_are_missing_are_named(gone, named):
    scores, costs = make_tables()
    with pytest.raises(ValueError, match=f"scores table has no {named}, but has layer 3. Rerun score"):
        Problem.from_tables(scores.query(f"not ({gone})"), costs, "kl", SCENARIO)


def test_the_tables_of_these_tests_fit_the_schemas():
    scores, costs = make_tables()
    tables.check("scores", scores)
    tables.check("costs", costs)


def test_the_order_of_the_rows_does_not_matter():
    scores, costs = make_tables()
    shuffled = [table.sample(frac=1, random_state=1) for table in (scores, costs)]
    one, other = (Problem.from_tables(*pair, "kl", SCENARIO) for pair in ((scores, costs), shuffled))
    limits = {"params_fraction": 0.5}
    first, second = (solve(p, constraints_from(limits, p)) for p in (one, other))
    assert (first.architecture, first.totals) == (second.architecture, second.totals)


def test_thirty_layers_of_nine_options_are_proven_optimal_in_seconds():
    problem = make_problem(num_layers=30, ffn=[*FFN, "linear"])
    solution = solve(problem, constraints_from({"speedup": 1.8, "memory_fraction": 0.5}, problem), time_limit_s=10)
    assert solution.status == "optimal" and solution.seconds < 10


def test_the_sample_tables_are_in_order_and_searched_to_a_proven_optimum():
    data = ROOT / "data/samples/smollm2-135m"
    assert not checks.faults(checks.load(data))
    problem = search.posed(data, search.Settings(), Scenario.parse("b64p512g512"))
    solution = solve(problem, constraints_from({"speedup": 1.5}, problem))
    assert solution.status == "optimal" and solution.speedup >= 1.5
    assert solution.score < solve(problem, constraints_from({"speedup": 2.0}, problem)).score


def test_the_search_and_its_commands_need_no_torch():
    command = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"  # importing them raises
        "import puzzle_core.search; assert 'hydra' not in sys.modules\n"
        "import stages.check, stages.frontier, stages.rivals, stages.search"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT)


def by_hand(program):
    """Every choice of a program with joint options: weights and sums, one layer after the other."""
    weight_A, sum_KA = np.zeros(1), np.zeros((len(program.room_K), 1))
    for layer in range(program.layer_O.max() + 1):
        rows = np.flatnonzero(program.layer_O == layer)
        first, second, both = (rows[program.half_O[rows] == half] for half in range(3))
        choices = [[a, b] for a in first for b in second] + [[b] for b in both]
        weight_A = np.add.outer(weight_A, [program.weight_O[c].sum() for c in choices]).ravel()
        sums = [[share_O[c].sum() for c in choices] for share_O in program.share_KO]
        sum_KA = np.stack([np.add.outer(old, new).ravel() for old, new in zip(sum_KA, sums, strict=True)])
    fits_A = (sum_KA <= program.room_K[:, None]).all(axis=0)
    return weight_A[fits_A].min() if fits_A.any() else None


def options_of_layers(random):
    """Layer and half of each option of up to four layers: split ones, joint ones, or both."""
    rows = []
    for layer in range(random.integers(1, 5)):
        counts = ((3, 3, 0), (0, 0, 4), (2, 2, 3))[random.integers(3)]
        rows += [(layer, half) for half, count in enumerate(counts) for _ in range(count)]
    return np.array(rows).T


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans(), st.sampled_from([1, 3, 100]))
def test_joint_options_beside_split_ones_are_chosen_as_by_hand(seed, num_sums, listed, levels):
    random = np.random.default_rng(seed)
    layer_O, half_O = options_of_layers(random)
    values = random.integers(0, levels, (1 + num_sums, len(layer_O))).astype(float)
    room_K = values[1:].mean(axis=1) * (layer_O.max() + 1) * random.uniform(0.3, 2, num_sums)
    program = mip.Program(layer_O, half_O, values[0], values[1:], np.round(room_K))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mip, "LISTED", mip.LISTED if listed else 0)
        found = mip.minimise(program, time.perf_counter() + 60)
    expected = by_hand(program)
    assert (found is None) == (expected is None)
    if found:
        assert found.weight == expected == found.bound and found.proven and program.fits(found.rows)


def near_ties(seed):
    """A program whose choices weigh the same but for 1e-16 to 1e-8, or differ by up to 24 orders of magnitude; its sums do so too."""
    random = np.random.default_rng(seed)
    layer_O, half_O = options_of_layers(random)
    least = -1 if seed % 3 == 0 else 0
    whole_VO = random.integers(least, 4, (1 + random.integers(1, 4), len(layer_O))) * np.where(half_O == mip.BOTH, 2, 1)
    tie = 10.0 ** random.integers(-16, -7)
    values_VO = whole_VO * (1 + tie * random.normal(size=whole_VO.shape)) + tie * random.uniform(size=whole_VO.shape)
    if seed % 5 == 0:
        values_VO *= 10 ** random.uniform(-12, 12, values_VO.shape)
    room_K = values_VO[1:].mean(axis=1) * (layer_O.max() + 1) * random.uniform(0.6, 1.6, len(values_VO) - 1)
    if seed % 2:  # as much as some choice takes
        joint_O = np.isin(layer_O, layer_O[half_O == mip.BOTH])
        cells = sorted({(n, half) for n, half, joint in zip(layer_O, half_O, joint_O, strict=True) if not joint or half == mip.BOTH})
        some = [random.choice(np.flatnonzero((layer_O == n) & (half_O == half))) for n, half in cells]
        room_K = np.array([math.fsum(share_O[some]) for share_O in values_VO[1:]])
    return mip.Program(layer_O, half_O, values_VO[0], values_VO[1:], room_K)


def exactly_by_hand(program):
    """The least weight of every choice that fits, in fractions without any rounding; None if nothing fits."""
    exact = np.vectorize(Fraction, otypes=[object])
    values_VO, room_K = exact(np.vstack([program.weight_O, program.share_KO])), exact(program.room_K)
    unit = math.lcm(*(value.denominator for value in (*values_VO.flat, *room_K)))
    values_VO, room_K = np.vectorize(int, otypes=[object])(values_VO * unit), [int(room * unit) for room in room_K]
    sum_VA = np.zeros((len(values_VO), 1), object)
    for layer in range(program.layer_O.max() + 1):
        first, second, both = (np.flatnonzero((program.layer_O == layer) & (program.half_O == half)) for half in range(3))
        pairs_VC = (values_VO[:, first, None] + values_VO[:, None, second]).reshape(len(values_VO), -1)
        sum_VA = (sum_VA[:, :, None] + np.hstack([pairs_VC, values_VO[:, both]])[:, None]).reshape(len(values_VO), -1)
    fitting = sum_VA[0][(sum_VA[1:] <= np.array(room_K, object)[:, None]).all(axis=0)]
    return Fraction(min(fitting), unit) if len(fitting) else None


@pytest.mark.parametrize(("listed", "seeds"), [(True, range(2400)), (False, range(2400, 3200))])
def test_of_three_thousand_near_ties_what_is_called_optimal_is_optimal_in_exact_sums(listed, seeds, monkeypatch):
    monkeypatch.setattr(mip, "LISTED", mip.LISTED if listed else 0)  # 0: CP-SAT alone
    wrong = []
    for seed in seeds:
        program = near_ties(seed)
        found, expected = mip.minimise(program, time.perf_counter() + 20), exactly_by_hand(program)
        if found is None or expected is None:
            wrong += [(seed, found, expected)] * (found is not None or expected is not None)
            continue
        weight = sum(map(Fraction, program.weight_O[found.rows]))
        if not (found.proven and weight == expected and found.weight == float(weight) and program.fits(found.rows)):
            wrong.append((seed, found, float(weight - expected)))
    assert not wrong, f"{len(wrong)} of {len(seeds)}, e.g. {wrong[:3]}"


def test_the_bound_of_an_unfinished_search_is_never_above_the_optimum_in_exact_sums(monkeypatch):
    monkeypatch.setattr(mip, "LISTED", 0)
    monkeypatch.setattr(mip, "_solve_core", lambda program, deadline, hint: (hint, -math.inf, False))  # time is up
    bounded = 0
    for seed in range(400):
        program = near_ties(seed)
        try:
            found = mip.minimise(program, time.perf_counter() + 20)
        except mip.OutOfTimeError:
            continue
        if not found.proven:
            assert Fraction(found.bound) <= exactly_by_hand(program), seed
            bounded += 1
    assert bounded > 50


def joint_tables():
    """Layers 0 to 2 with rows of both kinds, layer 3 with rows of whole blocks alone; per-layer costs in layer 1."""
    scores, costs = make_tables(num_layers=3, attention=["parent", "kv1"], ffn=["parent", "w768"])
    blocks = ["parent+parent", "kv1+w768", "no_op+no_op"]
    more = [(n, "block", v, "kl", 0.5 * k, 100, "") for n in (0, 3) for k, v in enumerate(blocks)]
    scores = pd.concat([scores, pd.DataFrame(more, columns=scores.columns)], ignore_index=True)
    shares = [(v, m, 2 * PARENT_COSTS[m] * 0.4**k) for k, v in enumerate(blocks) for m in UNITS]
    more = [("block", v, SCENARIO, m, value, UNITS[m], "measured", "test") for v, m, value in shares]
    costs = pd.concat([costs, pd.DataFrame(more, columns=costs.columns)], ignore_index=True).assign(layer=-1)
    own = costs[(costs["variant"] == "kv1") & (costs["metric"] == "num_params")].assign(layer=1, value=7.0)
    return scores, pd.concat([costs, own], ignore_index=True)


def test_joint_rows_are_searched_beside_split_ones_and_survive_json():
    scores, costs = joint_tables()
    tables.check("scores", scores)
    problem = Problem.from_tables(scores, tables.check("costs", costs), "kl", SCENARIO)
    solution = solve(problem, constraints_from({"params_fraction": 0.5}, problem))
    assert 3 in solution.architecture.joint
    assert type(solution).from_json(solution.to_json()).architecture == solution.architecture
    assert dict(problem.totals(problem.rows_of(solution.architecture))) == solution.totals
    assert {"block"} == set(solution.architecture.to_json()[3])


def test_a_cost_of_one_layer_goes_before_the_one_of_all():
    scores, costs = joint_tables()
    problem = Problem.from_tables(scores, costs, "kl", SCENARIO)
    share_O, _ = problem.shares("num_params")
    kv1 = {layer: share_O[problem.options.index((layer, "attention", Variant("kv", 1)))] for layer in (0, 1, 2)}
    assert kv1[1] == 7.0 and kv1[0] == kv1[2] != 7.0


def several_scenarios(num_layers=6):
    scores, costs = make_tables(num_layers=num_layers)
    slower = costs.assign(scenario="b8p64g32", value=np.where(costs["unit"] == "ms", 2.5 * costs["value"], costs["value"]))
    return scores, pd.concat([costs, slower], ignore_index=True)


def test_limits_in_several_workloads_both_ways_and_in_percent_hold_at_once():
    problem = Problem.from_tables(*several_scenarios(), "kl", SCENARIO)
    limits = {
        "latency_ms": [{"at_most": "80%"}, {"at_most": "70%", "scenario": "b8p64g32"}],
        "num_params": {"at_least": "40%", "at_most": "75%"},
        "memory_mib": [{"at_most": 800, "batch_size": 64, "context_len": 4096}, "90%"],
    }
    constraints = constraints_from(limits, problem)
    solution = solve(problem, constraints)
    parent, rows = problem.parent_rows, problem.rows_of(solution.architecture)
    for scenario, most in ((SCENARIO, 0.8), ("b8p64g32", 0.7)):
        latency, of_parent = (problem.total("latency_ms", which, Scenario.parse(scenario)) for which in (rows, parent))
        assert latency <= most * of_parent * (1 + 1e-9)
    assert 0.4 <= solution.totals["num_params"] / problem.parent_totals["num_params"] <= 0.75
    base = problem._base(SCENARIO).iloc[[*rows, -1]].sum()
    assert (base["param_bytes"] + 64 * 4096 * base["kv_bytes_per_token"]) / 2**20 <= 800 * (1 + 1e-9)
    assert [str(c) for c in constraints][1] == "latency_ms 70% on b8p64g32"


def test_the_best_of_the_allowed_batch_sizes_wins():
    problem = Problem.from_tables(*several_scenarios(), "kl", SCENARIO)
    rate = problem.parent_totals["throughput_tokens_per_s"]
    limits = {"throughput_tokens_per_s": 1.5 * rate}  # batch 8 makes 4 times the tokens in 2.5 times the time: the parent does
    for sizes, expected in (((2,), 2), ((2, 8), 8), ((8, 2), 8)):
        solution = search.search(problem, limits, search.Settings(batch_sizes=sizes))[0]
        assert solution.scenario.batch_size == expected and (solution.score == 0) == (expected == 8)
    fastest = search.search(problem, {"score": 2.0}, search.Settings(batch_sizes=(2, 8), objective="throughput_tokens_per_s"))[0]
    assert fastest.scenario.batch_size == 8
    with pytest.raises(InfeasibleError, match="(?s)in scenario b2p64g32.*in scenario b8p64g32"):
        search.search(problem, {"speedup": 99}, search.Settings(batch_sizes=(2, 8)))


def test_the_reverse_question_undoes_the_question():
    problem = make_problem(num_layers=6)
    least = solve(problem, constraints_from({"speedup": 1.6}, problem))
    fastest = solve(problem, constraints_from({"score": least.score}, problem), objective="latency_ms")
    assert fastest.status == "optimal" and fastest.score <= least.score * (1 + 1e-9)
    assert fastest.totals["latency_ms"] <= least.totals["latency_ms"] * (1 + 1e-9)
    assert fastest.value == fastest.bound == fastest.totals["latency_ms"]


def test_a_weighted_sum_of_metrics_is_what_is_minimised():
    scores, costs = make_tables()
    other = scores.assign(metric="lm_loss", value=np.where(scores["variant"] == "parent", 0.0, 1 / (1 + scores["value"])))
    problem = Problem.from_tables(pd.concat([scores, other]), costs, {"kl": 1.0, "lm_loss": 0.3}, SCENARIO)
    alone = Problem.from_tables(scores, costs, "kl", SCENARIO)
    assert problem.metric == "1 kl + 0.3 lm_loss"
    np.testing.assert_allclose(problem.score_O, alone.score_O + 0.3 * np.where(alone.score_O == 0, 0, 1 / (1 + alone.score_O)))


def test_a_pool_by_other_weights_holds_what_is_best_where_kinds_count_more_or_less():
    problem, limits = make_problem(num_layers=6), {"speedup": 1.4}
    settings = search.Settings(pool_size=6, pool_distance=4, pool_weights=8.0)
    pool, again = (search.search(problem, limits, settings) for _ in range(2))
    (constraint,) = constraints_from(limits, problem)
    bounded = search.search(problem, {**limits, "score": 1.5 * pool[0].score}, settings)
    assert len(bounded) > 1 and all(one.score <= 1.5 * pool[0].score for one in bounded)  # of true scores, whatever counts how much
    first, *others = pool
    assert first == replace(search.solve(problem, [constraint]), seconds=first.seconds) and len(others) == 5
    assert [s.score for s in others] == sorted(s.score for s in others)
    for number, one in enumerate(pool):
        assert one.score == pytest.approx(problem.score(problem.rows_of(one.architecture)))
        assert one.totals["latency_ms"] <= constraint.upper * (1 + 1e-9)
        rows = set(one.architecture.rows())
        assert all(len(rows - set(other.architecture.rows())) >= 4 for other in pool[:number])
    assert [one.architecture for one in pool] == [one.architecture for one in again]
    nearest = search.search(problem, limits, search.Settings(pool_size=6, pool_distance=2))
    assert others[-1].score > nearest[-1].score  # they are further from the best than the next best


def test_weights_of_a_pool_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="search.pool_weights is 0.5; expected a number from 1 to"):
        search.Settings(pool_weights=0.5)
    with pytest.raises(ValueError, match="search.objective is latency_ms: set pool_weights to 1"):
        search.Settings(pool_weights=2.0, objective="latency_ms")


@pytest.mark.parametrize("distance", [1, 3])
def test_a_pool_holds_the_next_best_that_differ_enough(distance):
    problem = make_problem(num_layers=3)
    limits = {"speedup": 1.4}
    pool = search.search(problem, limits, search.Settings(pool_size=5, pool_distance=distance))
    assert len(pool) == 5 and [s.score for s in pool] == sorted(s.score for s in pool)
    (constraint,) = constraints_from(limits, problem)
    chosen = []
    options = [[(n, s, v) for n, s, v in problem.options if (n, s) == cell] for cell in itertools.product(range(3), ("attention", "ffn"))]
    for rows in sorted(itertools.product(*options), key=lambda rows: problem.score([problem._row_of[row] for row in rows])):
        total = problem.total("latency_ms", [problem._row_of[row] for row in rows])
        far = all(sum(a != b for a, b in zip(rows, other, strict=True)) >= distance for other in chosen)
        if total <= constraint.upper * (1 + 1e-9) and far:
            chosen.append(rows)
        if len(chosen) == 5:
            break
    assert [s.score for s in pool] == pytest.approx([problem.score([problem._row_of[row] for row in rows]) for rows in chosen])


def pairings(num_layers=3, seed=0):
    """A problem whose layers have each pairing of their variants as a joint row too, of about the same score and cost."""
    random = np.random.default_rng(seed)
    scores, costs = make_tables(num_layers=num_layers, attention=["parent", "kv1", "no_op"], ffn=["parent", "w384"], seed=seed)
    joints = [f"{a}+{f}" for a in ("parent", "kv1", "no_op") for f in ("parent", "w384")]
    values = [(n, v, 0.0 if v == "parent+parent" else float(random.uniform(0.2, 1.5))) for n in range(num_layers) for v in joints]
    more = pd.DataFrame([(n, "block", v, "kl", value, 100, "") for n, v, value in values], columns=scores.columns)
    return Problem.from_tables(pd.concat([scores, more], ignore_index=True), costs, "kl", SCENARIO)


def apart(one, other):
    """In how many choices of a subblock's variant two architectures differ, whichever rows they take."""
    return sum(one[layer, subblock] != variant for layer, subblock, variant in other.items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("distance", [1, 2, 4])
def test_a_pool_with_joint_rows_is_apart_in_variants_whether_rows_are_joint_or_not(seed, distance):
    problem = pairings(seed=seed)
    limits = {"speedup": 1.3}
    (constraint,) = constraints_from(limits, problem)
    of_layer = []
    for layer in range(problem.num_layers):
        first, second, both = (np.flatnonzero((problem.layer_O == layer) & (problem.half_O == half)).tolist() for half in range(3))
        of_layer.append([*map(list, itertools.product(first, second)), *([row] for row in both)])
    choices = [sum(rows, []) for rows in itertools.product(*of_layer)]
    choices = [rows for rows in choices if problem.total("latency_ms", rows) <= constraint.upper * (1 + 1e-9)]
    expected = []
    for rows in sorted(choices, key=problem.score):
        found = problem.architecture_of(rows)
        if len(expected) < 6 and all(apart(found, other) >= distance for other, _ in expected):
            expected.append((found, problem.score(rows)))
    pool = search.search(problem, limits, search.Settings(pool_size=6, pool_distance=distance))
    assert [one.score for one in pool] == pytest.approx([score for _, score in expected])
    assert any(one.architecture.joint for one in pool) and any(len(one.architecture.joint) < 3 for one in pool)
    by_weights = search.search(problem, limits, search.Settings(pool_size=6, pool_distance=distance, pool_weights=8.0))
    for some in (pool, by_weights):
        assert min(apart(a.architecture, b.architecture) for a, b in itertools.combinations(some, 2)) >= distance


def test_what_another_batch_size_might_do_better_is_not_called_optimal(monkeypatch):
    problem = Problem.from_tables(*several_scenarios(), "kl", SCENARIO)

    def late(candidate, *args, **kwargs):
        if candidate.scenario.batch_size == 8:
            raise TimeoutError("batch size 8 was given up")
        return solve(candidate, *args, **kwargs)

    limits = {"throughput_tokens_per_s": 1.5 * problem.parent_totals["throughput_tokens_per_s"]}
    monkeypatch.setattr(search, "solve", late)
    (found,) = search.search(problem, limits, search.Settings(batch_sizes=(2, 8)))
    assert found.scenario.batch_size == 2 and found.status == "feasible"
    assert found.bound == 0.0 < found.score  # with 8 the parent itself keeps the limit


def test_a_pool_is_best_first_where_its_first_was_not_proven_and_its_new_first_is_not_either(monkeypatch):
    problem, limits = make_problem(num_layers=3), {"speedup": 1.4}
    best, second = search.search(problem, limits, search.Settings(pool_size=2))
    unproven = replace(second, status="feasible", bound=0.5 * best.score)

    def hurried(problem, constraints, time_limit_s, *args, unlike=(), **kwargs):
        return best if unlike else unproven

    monkeypatch.setattr(search, "solve", hurried)
    pool = search.search(problem, limits, search.Settings(pool_size=2))
    assert [one.score for one in pool] == [best.score, second.score]
    assert [(one.status, one.bound) for one in pool] == [("feasible", 0.5 * best.score)] * 2


def test_how_far_a_limit_goes_while_the_others_hold_is_no_more_than_what_was_proven(monkeypatch):
    problem = make_problem(num_layers=2)
    constraints = constraints_from({"speedup": 2.0, "params_fraction": {"at_least": 0.9}}, problem)
    minimise = mip.minimise
    monkeypatch.setattr(mip, "minimise", lambda *args: (found := minimise(*args)) and replace(found, proven=False))
    with pytest.raises(InfeasibleError, match=r"while the others hold, [0-9.]+ or better \(time was up"):
        solve(problem, constraints)


def test_a_pool_ends_where_nothing_differs_enough():
    problem = make_problem(num_layers=1, attention=["parent", "no_op"], ffn=["parent"])
    assert len(search.search(problem, {}, search.Settings(pool_size=9))) == 2


@pytest.mark.parametrize("name", ["speedup", "memory_mib", "score"])
def test_every_point_of_a_frontier_is_what_a_search_of_its_own_finds(name):
    problem = make_problem(num_layers=6)
    limits = {"params_fraction": 0.9, "speedup": 1.2} if name != "score" else {"params_fraction": 0.9}
    points = frontier(problem, limits, name, points=7)
    assert len(points) == 7 and [p.score for p in points] == sorted(p.score for p in points)[:: -1 if name == "score" else 1]
    for point in points:
        limit = point.constraints[-1].limit
        alone = solve(problem, constraints_from({**limits, name: limit}, problem))
        assert point.score == pytest.approx(alone.score, rel=1e-9) and point.status == "optimal"


def test_a_frontier_ends_at_0_where_a_total_can_be_0_and_at_the_best_finite_limit_where_one_can_be_infinite():
    def cost(subblock, k, metric):  # no_op takes nothing, and outside takes no time and no cache
        return 0.0 if k == 3 or (subblock == "outside" and metric not in ("param_bytes", "num_params")) else PARENT_COSTS[metric] / (1 + k)

    problem = make_problem(num_layers=2, cost=cost)
    nothing = Architecture.uniform(2, NO_OP, NO_OP)
    assert totals(problem, nothing)["latency_ms"] == totals(problem, nothing)["kv_mib"] == 0
    for name in ("kv_mib", "kv_fraction", "latency_ms"):
        points = frontier(problem, {}, name, points=5)
        parent = problem.parent_totals[points[0].constraints[-1].total]
        assert [p.constraints[-1].bound for p in points] == pytest.approx(np.linspace(parent, 0, 5))
        assert points[0].score == 0 < points[-1].score and points[-1].totals[points[-1].constraints[-1].total] == 0
        assert all(p.status == "optimal" for p in points)
    for name in ("speedup", "throughput_tokens_per_s"):
        points = frontier(problem, {}, name, points=5)
        latencies = [problem.total("latency_ms", [row]) for row in range(len(problem.options))]
        assert points[0].score == 0 and points[0].speedup == pytest.approx(1)
        assert points[-1].totals["latency_ms"] <= min(ms for ms in latencies if ms > 0) * (1 + 1e-9)
        assert points[-1].constraints[-1].bound == pytest.approx(min(ms for ms in latencies if ms > 0))
    with pytest.raises(InfeasibleError, match=r"no architecture fits kv_mib 0.0 .* smallest reachable is 0.16903 "):
        dear = make_problem(num_layers=2)
        solve(dear, constraints_from({"kv_mib": 0}, dear))


def test_the_points_of_a_frontier_share_the_time_limit(monkeypatch):
    shares, late_s = [], [0.0]
    monkeypatch.setattr(search.time, "perf_counter", lambda: late_s[0])

    def slow(problem, constraints, time_limit_s, **kwargs):
        shares.append(time_limit_s)
        found = solve(problem, constraints, 10.0, **kwargs)
        late_s[0] += 1.0  # whatever it was given
        return found

    monkeypatch.setattr(search, "solve", slow)
    frontier(make_problem(), {}, "speedup", points=4, time_limit_s=12.0)
    assert shares == [12 / 6, 11 / 5, 10 / 4, 9 / 3, 8 / 2, 7.0]


def test_rivals_keep_the_limits_and_none_beats_the_mip():
    problem = make_problem(num_layers=8)
    constraints = constraints_from({"speedup": 1.5, "memory_fraction": 0.8}, problem)
    entries = {e.method: e for e in rivals.compete(problem, constraints, rivals.Settings(rl_steps=300, rl_samples=64))}
    assert set(entries) == {"mip", *rivals.RIVALS}
    for entry in entries.values():
        totals_ = problem.totals(problem.rows_of(entry.architecture))
        assert all(totals_[c.total] <= c.upper * (1 + 1e-9) for c in constraints)
        assert entry.score >= entries["mip"].score * (1 - 1e-9) and entry.totals == totals_
    assert entries["rl"].gap < 0.05
    assert len(set(entries["uniform"].architecture.layers)) == 1
    assert set(entries["depth"].architecture.layers) == {(PARENT, PARENT), (NO_OP, NO_OP)}
    most = entries["max_parameters"].totals["num_params"]
    assert all(entry.totals["num_params"] <= most * (1 + 1e-9) for entry in entries.values())
    assert "mip" in rivals.table(list(entries.values()), ["latency_ms"]).splitlines()[1]


def test_random_architectures_keep_the_limits_differ_and_are_the_same_again():
    problem = make_problem(num_layers=8)
    constraints = constraints_from({"speedup": 1.5}, problem)
    drawn = rivals.random_architectures(problem, constraints, 10, rivals.Settings())
    assert drawn == rivals.random_architectures(problem, constraints, 10, rivals.Settings()) and len(set(drawn)) == 10
    assert all(totals(problem, one)["latency_ms"] <= constraints[0].upper * (1 + 1e-9) for one in drawn)
    with pytest.raises(InfeasibleError, match="largest reachable"):
        rivals.random_architectures(problem, constraints_from({"speedup": 99}, problem), 1, rivals.Settings())


def test_rivals_choose_among_joint_rows_and_say_where_nothing_fits():
    problem = Problem.from_tables(*joint_tables(), "kl", SCENARIO)
    constraints = constraints_from({"params_fraction": 0.5}, problem)
    entries = {e.method: e for e in rivals.compete(problem, constraints, rivals.Settings(rl_steps=50))}
    assert entries["rl"].architecture.joint and entries["greedy"].architecture.joint
    assert entries["uniform"].architecture is None and "nothing that fits" in rivals.table(list(entries.values()), ["num_params"])


def test_the_benchmark_of_rivals_puts_the_least_joint_kl_first():
    found = {"score": 2.0, "gap": 0.5, "latency_ms": 5.0, "seconds": 1.0}
    entries = [
        {"method": "uniform", "seconds": 0.0, "score": None, "gap": None, "joint_kl": None},
        {**found, "method": "mip", "joint_kl": 3.0},
        {**found, "method": "max_parameters", "joint_kl": 2.5},
    ]
    text = benchmark.table(entries, parent_ms=10.0)
    lines = text.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["max parameters", "mip", "uniform"]
    assert lines[0] == "| max parameters | 2.000 | 50.00% | 2.500 | 2.00 | 1.0 |" and "nothing that fits" in lines[2]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t["scores"].drop(index=0), ["layer 0 attention parent", "value 0.0"]),
        (lambda t: t["scores"].assign(value=lambda x: x["value"].where(x.index != 5)), ["row 5 (0 ffn w768 kl)", "no finite number"]),
        (lambda t: pd.concat([t["scores"], t["scores"].tail(1)], ignore_index=True), ["row 31", "row 32", "more than once"]),
        (lambda t: t["scores"].query("layer != 2"), ["layer 2", "every row"]),
        (lambda t: t["scores"].assign(value=1.0), ["gives the parent a score", "0 exactly"]),
        (lambda t: t["scores"].rename(columns={"value": "vale"}), ["no column 'value'", "rename 'vale'"]),
        (lambda t: t["scores"].replace({"variant": {"kv1": "KV1"}}), ["has no variant id", "0 attention KV1"]),
        (lambda t: t["scores"].replace({"subblock": {"ffn": "mlp"}}), ["no known subblock", "attention, ffn, block"]),
    ],
)
def test_the_checker_names_the_rows_of_scores_and_the_way_to_mend_them(spoil, words):
    found = dict(zip(("scores", "costs"), make_tables(), strict=True))
    assert checks.faults(found) == []
    faults = checks.faults({**found, "scores": spoil(found).reset_index(drop=True)})
    assert faults and all(any(word in fault for fault in faults) for word in words), faults


@pytest.mark.parametrize(
    ("query", "changed", "words"),
    [
        ("variant != 'kv1'", {}, ["attention kv1 has a score but no decode_ms"]),
        ("subblock != 'outside'", {}, ["no row 'outside parent'"]),
        ("variant != 'x'", {"value": -1.0}, ["costs less than nothing"]),
        ("variant != 'x'", {"scenario": "batch 8"}, ["has no scenario id", "b8p512g128"]),
        ("variant != 'x'", {"value": "1"}, ["expected floats"]),
        ("variant != 'x'", {"metric": lambda costs: costs["metric"].str.upper()}, ["does not fit its schema", "DECODE_MS"]),
        ("variant != 'x'", {"spread": -1.0}, ["does not fit its schema", "spread"]),
    ],
)
def test_the_checker_names_what_is_wrong_with_costs(query, changed, words):
    scores, costs = make_tables()
    faults = checks.faults({"scores": scores, "costs": costs.query(query).reset_index(drop=True).assign(**changed)})
    assert all(any(word in fault for fault in faults) for word in words), faults


@pytest.mark.parametrize(
    ("table", "metric"),
    [
        *(("costs", name) for name in ("score", "speedup", "memory_mib", "throughput_tokens_per_s", "memory_fraction", "gap")),
        ("costs", "perplexity"),
        *(("scores", name) for name in ("score", "speedup", "latency_ms", "num_params", "limit")),
        ("both", "kl"),
    ],
)
def test_a_metric_of_ones_own_may_not_have_the_name_of_a_total_or_of_a_limit(table, metric, tmp_path):
    scores, costs = make_tables()
    scores = pd.concat([scores, scores.assign(metric=metric)]) if table == "scores" else scores
    costs = costs if table == "scores" else pd.concat([costs, costs.query("metric == 'prefill_ms'").assign(metric=metric)])
    found = {"scores": scores.reset_index(drop=True), "costs": costs.reset_index(drop=True)}
    for name, content in found.items():
        content.to_parquet(tmp_path / f"{name}.parquet")
    (fault,) = checks.faults(checks.load(tmp_path))
    assert metric in fault and "call" in fault and "something else" in fault
    with pytest.raises(ValueError, match=metric):
        search.posed(tmp_path, search.Settings(), Scenario.parse(SCENARIO))


def test_every_name_of_a_limit_or_total_is_reserved():
    named = {*CONSTRAINTS, *TOTALS, SCORE, *make_problem().parent_totals}
    assert named <= {*schemas.RESERVED, *schemas.BASE_METRICS}


@pytest.mark.parametrize("layer", [7, 9_000, 10**9])
def test_a_layer_far_beyond_the_others_is_refused_and_not_counted_up_to(layer, tmp_path):
    scores, costs = make_tables()
    far = pd.concat([scores, scores.query("layer == 3").assign(layer=layer)], ignore_index=True)
    start = time.perf_counter()
    (fault,) = checks.faults({"scores": far, "costs": costs})
    if layer < schemas.MOST_LAYERS:
        assert "layer 4 (every row)" in fault and "every layer from 0 to the last" in fault
    else:
        assert f"({layer} attention parent kl)" in fault and "without a gap" in fault
        with pytest.raises(ValueError, match="the layers before it have no rows"):
            tables.check("scores", far)
        with pytest.raises(ValueError, match="the layers before it have no rows"):
            tables.check("costs", costs.assign(layer=layer))
    with pytest.raises(ValueError, match=f"no layer 4 attention parent, layer 4 ffn parent.* but has layer {layer}"):
        Problem.from_tables(far, costs, "kl", SCENARIO)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"pool_size": 10**12}, "pool_size is 1000000000000; expected a whole number from 1 to 10,000"),
        ({"pool_size": 1e12}, "pool_size is 1000000000000.0; expected a whole number"),
        ({"pool_size": True}, "pool_size is True; expected a whole number"),
        ({"pool_distance": 0}, "pool_distance is 0; expected a whole number"),
        ({"pool_weights": math.inf}, "pool_weights is inf; expected a number from 1 to"),
        ({"pool_weights": math.nan}, "pool_weights is nan; expected a number from 1 to"),
        ({"batch_sizes": 8}, "batch_sizes is 8; expected a list"),
        ({"batch_sizes": [8, 1.5]}, "one of search.batch_sizes is 1.5; expected a whole number"),
        ({"time_limit_s": math.nan}, "time_limit_s is nan; expected a number"),
        ({"time_limit_s": 1e300}, r"time_limit_s is 1e\+300; expected a number"),
    ],
)
def test_settings_of_absurd_size_are_refused_at_once(asked, words):
    with pytest.raises(ValueError, match=words):
        search.Settings(**asked)


def test_points_ends_and_scenarios_of_absurd_size_are_refused_at_once():
    problem = make_problem()
    for points in (1, 10**12, 2.5):
        with pytest.raises(ValueError, match="frontier.points is .* expected a whole number from 2 to 10,000"):
            frontier(problem, {}, "speedup", points=points)
    with pytest.raises(ValueError, match="frontier.tightest is '2x'; expected a number"):
        frontier(problem, {}, "speedup", points=3, tightest="2x")
    for text in ("b1p1g99999999999999999999", "b" + "9" * 5000 + "p1g1"):
        with pytest.raises(ValueError, match="is not a scenario id"):
            Scenario.parse(text)
    with pytest.raises(ValueError, match="at most 1,000,000,000"):
        constraints_from({"kv_mib": {"at_most": 1, "context_len": 10**12}}, problem)
    with pytest.raises(ValueError, match="rivals.rl_steps is 1000000000000; expected a whole number"):
        rivals.Settings(rl_steps=10**12)
    with pytest.raises(ValueError, match="random is 1000000000000; expected a whole number"):
        rivals.random_architectures(problem, (), 10**12, rivals.Settings())


def test_a_scenario_is_searched_with_the_metrics_that_it_has():
    scores, costs = make_tables()
    prompts = costs.query("metric in ('prefill_ms', 'num_params')").assign(scenario="b1p4096g16")
    both = pd.concat([costs, prompts], ignore_index=True)
    assert checks.faults({"scores": scores, "costs": both}) == []
    problem = Problem.from_tables(scores, both, "kl", SCENARIO)
    limit = {"prefill_ms": {"at_most": "70%", "scenario": "b1p4096g16"}}
    assert solve(problem, constraints_from(limit, problem)).status == "optimal"
    there = problem.at(Scenario(1, 4096, 16))
    assert set(solve(there, constraints_from({"prefill_ms": "70%"}, there)).totals) == {"prefill_ms", "num_params"}
    with pytest.raises(ValueError, match="latency_ms needs decode_ms, which the costs table does not have in scenario b1p4096g16"):
        constraints_from({"speedup": 1.3}, there)


def test_the_checker_tells_a_misspelt_metric_from_one_of_the_tables_own():
    scores, costs = make_tables()
    other = costs.assign(scenario="b1p4096g16").replace({"metric": {"prefill_ms": "prefil_ms"}})
    (fault,) = checks.faults({"scores": scores, "costs": pd.concat([costs, other], ignore_index=True)})
    assert "prefil_ms of scenario b1p4096g16" in fault and "did you mean prefill_ms?" in fault
    energy = [costs.query("metric == 'prefill_ms'").assign(metric="prefill_mj", scenario=s, unit="mJ") for s in (SCENARIO, "b1p4096g16")]
    assert checks.faults({"scores": scores, "costs": pd.concat([costs, *energy], ignore_index=True)}) == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"latency_ms": {"at_mots": 1}}, "no key 'at_mots'; expected at_most"),
        ({"latency_ms": {"scenario": SCENARIO}}, "neither at_most nor at_least"),
        ({"latency_ms": {"at_most": 1, "batch_size": 2}}, "batch_size and context_len are for memory_mib"),
        ({"latency_ms": {"at_most": 1, "scenario": "b9p9g9"}}, f"no scenario 'b9p9g9' .* {SCENARIO}"),
        ({"memory_mib": {"at_most": 1, "batch_size": 1.5}}, "batch_size is 1.5; expected a whole number"),
        ({"latency_ms": "much"}, "'much'; expected a positive number"),
        ({"latency_ms": "x%"}, "'x%'; expected a positive number"),
    ],
)
def test_a_constraint_that_cannot_be_read_says_what_is_expected(limits, words):
    with pytest.raises(ValueError, match=words):
        constraints_from(limits, make_problem())


def test_joint_ids_are_canonical():
    assert str(Joint.parse("kv4+w768")) == "kv4+w768"
    for text in ("kv4", "kv4+", "kv4+w768+w768"):
        with pytest.raises(ValueError, match="not a variant id"):
            Joint.parse(text)


def test_the_commands_write_their_tables_and_pictures(tmp_path):
    for name, table in zip(("scores", "costs"), make_tables(), strict=True):
        tables.write(name, table.assign(scenario="b2p16g8") if name == "costs" else table, tmp_path / f"{name}.parquet")
    where = [f"out={tmp_path}", f"data={tmp_path}", f"hydra.run.dir={tmp_path / 'log'}"]
    assert "4 layers, 32 options, scores kl, scenarios b2p16g8" in stage("check", *where).stdout
    assert "5 points, 5 proven optimal" in stage("frontier", *where, "frontier.points=5").stdout
    rows = json.loads((tmp_path / "plots" / "frontier.json").read_text())
    points = json.loads((tmp_path / "frontier.json").read_text())
    assert [row["score"] for row in rows] == [point["score"] for point in points] and "architecture" in points[0]
    assert "max_parameters" in stage("rivals", *where, "rivals.rl_steps=20").stdout
    for row in json.loads((tmp_path / "rivals.json").read_text()):
        assert row["architecture"] is None or len(Architecture.from_json(row["architecture"]).layers) == 4
        assert (row["source"], row["hardware"]) == (points[0]["source"], points[0]["hardware"]) == ("measured", "test")
    assert (tmp_path / "plots" / "frontier.png").exists() and (tmp_path / "plots" / "rivals.png").exists()
    tables.write("costs", tables.read("costs", tmp_path / "costs.parquet").query("variant != 'kv1'"), tmp_path / "costs.parquet")
    failed = stage("check", *where, check=False)
    assert failed.returncode == 1 and "attention kv1 has a score but no" in failed.stdout and "5 faults" in failed.stderr


def test_what_joint_blocks_are_worth_is_told_by_tables_alone_and_by_children_where_there_are_any(capsys, monkeypatch):
    data = ROOT / "data/samples/smollm2-135m-coupled"
    command = ["coupled", "--data", str(data), "--speedups", "1.5", "--out", "none", "search_space=paper", "workload=throughput"]
    monkeypatch.setattr(sys, "argv", command)
    coupled.main()
    text = capsys.readouterr().out
    assert "| 1.5 × | halves and joint blocks | 0.464 | 17 |" in text and "KL of" not in text
    scores, costs = (tables.read(name, data / f"{name}.parquet") for name in ("scores", "costs"))
    problem = Problem.from_tables(scores, costs, "kl", "b64p512g512")
    blocks = coupled.by_block(problem, joint_kl=lambda some: [len(one.joint) for one in some])
    assert set(blocks.halves_measured) == {0} and set(blocks.coupled_measured) == {1} and len(blocks) == 60
    (row,) = coupled.by_speedup({"all": problem}, [1.5], {}, search.Settings(), joint_kl=lambda some: [0.5] * len(some))
    found = {"median": {}, "better": 1.0, "gain": 0.5, "blocks": 60, "about": "", "searched": [row]}
    assert "| 1.5 × | all | 0.464 | 0.500 | 17 |" in coupled.text_of(found)


def test_a_limit_that_no_number_can_hold_is_refused():
    problem = make_problem(num_layers=2)
    with pytest.raises(UserError, match=r"constraint speedup is 1e-320, which no number of latency_ms can hold"):
        constraints_from({"speedup": 1e-320}, problem)


@pytest.mark.parametrize(
    ("metric", "words"),
    [({"kl": -1}, "weighs kl by -1; expected a number, at least 0"), ({"kl": 0, "lm_loss": 0}, "nothing would be made least")],
)
def test_scores_are_made_least_and_never_most(metric, words):
    scores, costs = make_tables()
    scores = pd.concat([scores, scores.assign(metric="lm_loss")], ignore_index=True)
    with pytest.raises(UserError, match=words):
        Problem.from_tables(scores, costs, metric, SCENARIO)


def test_a_request_of_one_token_has_no_decode_step_to_limit():
    problem = make_problem(num_layers=2)
    one = Scenario(2, 64, 1)
    problem = replace(problem, scenario=one, costs=problem.costs.assign(scenario=str(one)))
    with pytest.raises(UserError, match="constraint decode_ms: a request of b2p64g1 has no decode step"):
        constraints_from({"decode_ms": "50%"}, problem)
