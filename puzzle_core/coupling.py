"""Which joint blocks are worth training: of each layer, the few variants that a search is likely to take, in every pairing.

Coupled training costs m·n variants a layer where decoupled training costs m + n, so it is done on a reduced space (Puzzle,
section 3). The choice needs scores and what the library knows of costs, parameters and KV cache, which no hardware changes.
"""
from collections.abc import Mapping

import numpy as np
import pandas as pd

from puzzle_core.errors import UserError
from puzzle_core.spec import ATTENTION, BLOCK, FFN, KV_WINDOW, SUBBLOCKS, Joint, Variant

KV_BYTES = "kv_bytes"  # of a sequence
BUDGETS = np.arange(0.95, 0.45, -0.05)  # of the parent's cost: where a search may be asked for


def promising(
    library: pd.DataFrame, scores: pd.DataFrame, metric: str, num: Mapping[str, int], context_len: int
) -> dict[int, list[Joint]]:
    """The joint variants of each layer: every pair of its `num` best variants of each subblock.

    A variant's cost is its share of the parent's parameters and of its KV cache at `context_len` tokens, the mean of the two. For
    each budget of BUDGETS every layer and subblock takes what is least in score + price · cost, at the price that meets the budget;
    best are those that no other of their layer matches in score, parameters and cache, then those that are taken at most
    budgets, then those of least score.
    ValueError if the tables do not have the same variants, or not the metric.
    """
    table = _joined(library, scores, metric)
    window = table[KV_WINDOW].where(table[KV_WINDOW] > 0, context_len).clip(upper=context_len)
    table[KV_BYTES] = table["kv_bytes_per_token"] * window
    table["taken"] = _times_taken(table)
    table["dominated"] = _dominated(table)
    ranked = table.sort_values(["dominated", "taken", "value"], ascending=[True, False, True], kind="stable")
    best = {cell: list(rows["variant"])[: num[cell[1]]] for cell, rows in ranked.groupby(["layer", "subblock"])}
    return {
        int(layer): [Joint(Variant.parse(a), Variant.parse(f)) for a in best[layer, ATTENTION] for f in best[layer, FFN]]
        for layer in sorted(set(table["layer"]))
    }


def with_blocks(space: dict, blocks: Mapping[int, list[Joint]]) -> dict:
    """A preset of conf/search_space/ with `blocks` in place of any that it had."""
    own = {str(layers): {s: some for s, some in lists.items() if s != BLOCK} for layers, lists in (space.get("layers") or {}).items()}
    for layer, joints in blocks.items():
        own[str(layer)] = {**own.get(str(layer), {}), BLOCK: list(map(str, joints))}
    return {**{s: space[s] for s in SUBBLOCKS}, "layers": {layers: lists for layers, lists in own.items() if lists}}


def _joined(library: pd.DataFrame, scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    key = ["layer", "subblock", "variant"]
    if metric not in set(scores["metric"]):
        raise UserError(f"no metric '{metric}' in the scores table, which has: {', '.join(sorted(set(scores['metric'])))}")
    scores, library = scores[(scores["metric"] == metric) & (scores["subblock"] != BLOCK)], library[library["subblock"] != BLOCK]
    table = library.merge(scores[[*key, "value"]], on=key, how="outer", indicator=True)
    if len(odd := table[table["_merge"] != "both"]):
        named = ", ".join(f"layer {n} {s} {v}" for n, s, v in odd[key].head(5).itertuples(index=False))
        raise UserError(f"library and scores differ in {len(odd)} variants, e.g. {named}. Run `dvc repro score`.")
    return table


def _times_taken(table: pd.DataFrame) -> np.ndarray:
    """At how many budgets each row is what its layer and subblock take."""
    parent = table["variant"] == "parent"
    shares = [table[c] / max(table.loc[parent, c].sum(), 1) for c in ("num_params", KV_BYTES)]
    cost, score = np.mean(shares, axis=0), table["value"].to_numpy()
    cells = list(table.groupby(["layer", "subblock"]).indices.values())
    whole, taken = cost[parent].sum(), np.zeros(len(table), int)
    least, most = np.log(1e-9), np.log(1e9)  # logarithms of a price, score lost for each share of the cost

    def chosen_at(log_price: float) -> list[int]:
        return [rows[np.argmin(score[rows] + np.exp(log_price) * cost[rows])] for rows in cells]

    for budget in BUDGETS:
        low, high = least, most
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost[chosen_at(middle)].sum() > budget * whole else (low, middle)
        taken[chosen_at(high)] += 1
    return taken


def _dominated(table: pd.DataFrame) -> np.ndarray:
    """Whether another row of the layer and subblock is as good in score, parameters and KV cache, and better in one."""
    dominated = np.zeros(len(table), bool)
    for rows in table.groupby(["layer", "subblock"]).indices.values():
        values = table.iloc[rows][["value", "num_params", KV_BYTES]].to_numpy(float)
        as_good = (values[None] <= values[:, None]).all(-1) & (values[None] < values[:, None]).any(-1)
        dominated[rows] = as_good.any(1)
    return dominated
