"""The problem that the tables pose: every option with its score and its share of each total, in any scenario of the table.

    Options   o in O       one row of the scores table: a variant of a subblock of a layer, or of a whole block
    Scores    s_o          quality lost where the option replaces the parent's; the parent's is 0
    Shares    t_ko         what the option adds to total k: latency_ms, memory_mib, ...
    Outside   a_k          what embeddings, final norm and LM head add to total k, whatever is chosen

An architecture's totals are sums: a_k + sum of t_ko over its options.
"""
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from puzzle_core.errors import UserError
from puzzle_core.spec import ALL_LAYERS, BLOCK, KV_WINDOW, OUTSIDE, PARENT, SUBBLOCKS, Architecture, Joint, Scenario, Variant, parse_variant

SCORE = "score"  # the objective's total that no costs are needed for
HALVES = (*SUBBLOCKS, BLOCK)



def _kv_bytes(at: Scenario, of_token: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Bytes of the batch's KV cache at the end of the request; a window of 0 keeps every token."""
    return at.batch_size * of_token * np.where(window > 0, np.minimum(window, at.cached_tokens), at.cached_tokens)


# Each total: the metrics of the costs table that it is made of, and how. The batch's ms, MiB at the end of generation, counts.
# A request of N tokens is one prefill, which gives the first, and N - 1 decode steps.
TOTALS = {
    "latency_ms": (("prefill_ms", "decode_ms"), lambda at, prefill, decode: prefill + at.num_decode_steps * decode),
    "prefill_ms": (("prefill_ms",), lambda at, prefill: prefill),
    "decode_ms": (("decode_ms",), lambda at, decode: decode),
    "memory_mib": (
        ("param_bytes", "kv_bytes_per_token", KV_WINDOW),
        lambda at, params, kv, window: (params + _kv_bytes(at, kv, window)) / 2**20,
    ),
    "num_params": (("num_params",), lambda at, count: count),
    "kv_mib": (("kv_bytes_per_token", KV_WINDOW), lambda at, kv, window: _kv_bytes(at, kv, window) / 2**20),
}
WITHOUT_TIMING = ("memory_mib", "num_params", "kv_mib")  # known in every scenario, measured or not


@dataclass(frozen=True, eq=False)
class Problem:
    """Aligned arrays over the options, sorted by layer and subblock, and the costs of every scenario in the table."""

    scenario: Scenario
    metric: str  # a column of scores, or the weighted sum of several
    num_layers: int
    options: tuple[tuple[int, str, Variant | Joint], ...]  # (layer, subblock, variant)
    layer_O: np.ndarray
    half_O: np.ndarray  # index of the subblock in HALVES
    score_O: np.ndarray
    costs: pd.DataFrame
    _shares: dict = field(default_factory=dict, repr=False)  # (total, scenario) -> share_O with that of outside at the end

    @classmethod
    def from_tables(cls, scores: pd.DataFrame, costs: pd.DataFrame, metric: str | Mapping[str, float], scenario: str) -> "Problem":
        """Join the scores of a metric, or of several with their weights, to the costs; ValueError that names what is lacking."""
        scores = _weighted(scores, metric)
        scores["half"] = scores["subblock"].map(HALVES.index)
        scores = scores.sort_values(["layer", "half", "variant"])
        _check_layers(scores)
        problem = cls(
            scenario=Scenario.parse(scenario),
            metric=metric if isinstance(metric, str) else " + ".join(f"{weight:g} {name}" for name, weight in metric.items()),
            num_layers=int(scores["layer"].max()) + 1,
            options=tuple((row.layer, row.subblock, parse_variant(row.subblock, row.variant)) for row in scores.itertuples()),
            layer_O=scores["layer"].to_numpy(),
            half_O=scores["half"].to_numpy(),
            score_O=scores["value"].to_numpy(float),
            costs=costs if "layer" in costs else costs.assign(layer=ALL_LAYERS),
        )
        problem._base(str(problem.scenario))
        return problem

    def at(self, scenario: Scenario) -> "Problem":
        """The same problem for another workload."""
        moved = replace(self, scenario=scenario)
        moved._base(str(scenario))
        return moved

    @cached_property
    def scenarios(self) -> list[str]:
        return sorted(set(self.costs["scenario"]))

    @cached_property
    def hardware(self) -> str:
        """Where the costs of the workload were measured."""
        return ", ".join(sorted(set(self.costs.loc[self.costs["scenario"] == str(self.scenario), "hardware"])))

    @cached_property
    def source(self) -> str:
        """How the costs of the workload came about; what is only counted says nothing."""
        sources = set(self.costs.loc[self.costs["scenario"] == str(self.scenario), "source"])
        return ", ".join(sorted(sources - {"computed"} or sources))

    @cached_property
    def totals_there(self) -> list[str]:
        """The names of the totals that the costs table has the metrics for."""
        there = set(self._base(str(self.scenario)).columns)
        own = there - {metric for metrics, _ in TOTALS.values() for metric in metrics}
        return [total for total, (metrics, _) in TOTALS.items() if there >= set(metrics)] + sorted(own)

    def shares(self, total: str, scenario: Scenario | None = None) -> tuple[np.ndarray, float]:
        """What each option adds to `total` in a scenario, and what is outside the blocks; ValueError without its metrics."""
        scenario = scenario or self.scenario
        key = total, str(scenario)
        if key not in self._shares:
            self._shares[key] = self._summed(total, scenario)
        return self._shares[key][:-1], float(self._shares[key][-1])

    def total(self, total: str, rows: Iterable[int], scenario: Scenario | None = None) -> float:
        share_O, outside = self.shares(total, scenario)
        return math.fsum([outside, *share_O[rows]])

    def totals(self, rows: Iterable[int]) -> dict[str, float]:
        """Every total of the options `rows`, and throughput_tokens_per_s."""
        found = {total: self.total(total, rows) for total in self.totals_there}
        if "latency_ms" in found:
            seconds = found["latency_ms"] / 1000
            num_tokens = self.scenario.batch_size * self.scenario.generation_len
            found["throughput_tokens_per_s"] = num_tokens / seconds if seconds else math.inf
        return found

    @cached_property
    def parent_rows(self) -> list[int]:
        """The parent's rows: both subblocks, or the block where a layer has no other."""
        joint = set(self.layer_O.tolist()) - {layer for layer, subblock, _ in self.options if subblock != BLOCK}
        return self.rows_of(Architecture(((PARENT, PARENT),) * self.num_layers, tuple(sorted(joint))))

    @cached_property
    def parent_totals(self) -> dict[str, float]:
        return self.totals(self.parent_rows)

    @cached_property
    def _row_of(self) -> dict:
        return {option: row for row, option in enumerate(self.options)}

    def row_of(self, layer: int, subblock: str, variant: Variant | Joint) -> int | None:
        """The option of that name; None if the tables have none."""
        return self._row_of.get((layer, subblock, variant))

    def rows_of(self, architecture: Architecture) -> list[int]:
        """The options that make `architecture`; ValueError if the tables lack one."""
        lacking = ["layer {} {} {}".format(*option) for option in architecture.rows() if option not in self._row_of]
        if lacking or len(architecture.layers) != self.num_layers:
            raise UserError(
                f"the tables have {self.num_layers} layers, the architecture {len(architecture.layers)}, and no row for "
                f"{', '.join(lacking) or 'the others'}. Rerun bld, score and profile-hardware with what is missing, unless it is what "
                "search.export_target leaves out."
            )
        return [self._row_of[option] for option in architecture.rows()]

    def architecture_of(self, rows: Iterable[int]) -> Architecture:
        return Architecture.of_rows(self.options[row] for row in rows)

    def score(self, rows: Iterable[int]) -> float:
        return math.fsum(self.score_O[rows])

    def _summed(self, total: str, scenario: Scenario) -> np.ndarray:
        if total == SCORE:
            return np.append(self.score_O, 0.0)
        measured = str(scenario) in self.scenarios or total not in WITHOUT_TIMING
        base = self._base(str(scenario if measured else self.scenario))
        metrics, made = TOTALS.get(total, ((total,), lambda at, values: values))
        if lacking := [metric for metric in metrics if metric not in base]:
            raise UserError(
                f"{total} needs {', '.join(lacking)}, which the costs table does not have in scenario {scenario}; it has "
                f"{', '.join(base.columns)}. Add the rows, or limit something else."
            )
        return made(scenario, *(base[metric].to_numpy(float) for metric in metrics))

    def _base(self, scenario: str) -> pd.DataFrame:
        """The metrics of every option, and of what is outside at the end.

        A layer's own row goes before the one for all layers; a block without a row costs what its halves do.
        """
        if ("base", scenario) in self._shares:
            return self._shares["base", scenario]
        if scenario not in self.scenarios:
            raise UserError(f"no scenario '{scenario}' in the costs table, which has: {', '.join(self.scenarios)}")
        costs = self.costs[self.costs["scenario"] == scenario]
        pivot = costs.pivot(index=["layer", "subblock", "variant"], columns="metric", values="value")
        if KV_WINDOW not in pivot:
            pivot[KV_WINDOW] = 0.0

        def rows_of(options: list[tuple[int, str, Variant | Joint]]) -> pd.DataFrame:
            keys = [(layer, subblock, str(variant)) for layer, subblock, variant in options]
            own = pivot.reindex(pd.MultiIndex.from_tuples(keys, names=pivot.index.names))
            general = pivot.reindex(pd.MultiIndex.from_tuples((ALL_LAYERS, *key[1:]) for key in keys))
            return _windowed(_windowed(own).fillna(general.set_axis(own.index)))

        base = rows_of([*self.options, (ALL_LAYERS, OUTSIDE, PARENT)])
        if blocks := [option for option in self.options if option[1] == BLOCK]:
            first, second = (rows_of([(n, s, v) for n, _, joint in blocks for s, v in (joint.halves[half],)]) for half in (0, 1))
            both = first.fillna({KV_WINDOW: 0.0}).to_numpy() + second.fillna({KV_WINDOW: 0.0}).to_numpy()  # the FFN's window is 0
            at = [row for row, option in enumerate(self.options) if option[1] == BLOCK]
            base.iloc[at] = np.where(base.iloc[at].isna(), both, base.iloc[at])
        base = base.fillna({KV_WINDOW: 0.0})
        rows = base[base.isna().any(axis=1)].iterrows()
        if lacking := {f"{' '.join(key[1:])} ({', '.join(row.index[row.isna()])})": None for key, row in rows}:
            raise UserError(
                f"costs table has no row in scenario {scenario} for {', '.join(lacking)}; expected every scored variant, "
                f"and 'outside parent' for what is in no block. Rerun profile-hardware."
            )
        self._shares["base", scenario] = base
        return base


def _windowed(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with a window of 0, which keeps every token, where a row has the bytes of a token and no window."""
    if "kv_bytes_per_token" not in rows:
        return rows
    return rows.assign(**{KV_WINDOW: rows[KV_WINDOW].mask(rows[KV_WINDOW].isna() & rows["kv_bytes_per_token"].notna(), 0.0)})


def _weighted(scores: pd.DataFrame, metric: str | Mapping[str, float]) -> pd.DataFrame:
    """One row an option, with the weighted sum of its scores as value."""
    weights = {metric: 1.0} if isinstance(metric, str) else dict(metric)
    there = sorted(set(scores["metric"]))
    for name, weight in weights.items():
        if name not in there:
            raise UserError(f"no metric '{name}' in the scores table, which has: {', '.join(there)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"search.metric weighs {name} by {weight!r}; expected a number, at least 0: scores are quality lost")
    if not any(weights.values()):
        raise UserError(f"search.metric weighs {', '.join(weights)} by 0: nothing would be made least")
    key = ["layer", "subblock", "variant"]
    table = scores[scores["metric"].isin(list(weights))].pivot(index=key, columns="metric", values="value")
    if (gone := table[table.isna().any(axis=1)]).size:
        named = [f"layer {n} {s} {v} ({', '.join(row.index[row.isna()])})" for (n, s, v), row in gone.head(5).iterrows()]
        raise UserError(f"scores table lacks {len(gone)} rows of the metrics that are summed, e.g. {', '.join(named)}. Rerun score.")
    return sum(weight * table[name] for name, weight in weights.items()).rename("value").reset_index()


def _check_layers(scores: pd.DataFrame) -> None:
    """Every layer has the parent as attention and ffn, or as a block where it has rows of whole blocks alone."""
    rows = scores[["layer", "subblock", "variant"]].itertuples(index=False)
    there = {(row.layer, row.subblock, parse_variant(row.subblock, row.variant)) for row in rows}
    halved = {layer for layer, subblock, _ in there if subblock != BLOCK}
    joint = {layer for layer, subblock, _ in there if subblock == BLOCK} - halved
    last, lacking = max(layer for layer, *_ in there), []
    for layer in range(min(last, len(halved | joint)) + 1):  # by then a gap has shown, however far the last layer is
        wanted = [(layer, BLOCK, Joint(PARENT, PARENT))] if layer in joint else [(layer, subblock, PARENT) for subblock in SUBBLOCKS]
        lacking += ["layer {} {} {}".format(*row) for row in wanted if row not in there]
    if lacking:
        raise UserError(f"scores table has no {', '.join(lacking)}, but has layer {last}. Rerun score.")
