"""What is wrong with tables from elsewhere: every fault with the rows that have it and the way to mend it.

`tables.check` refuses a table that does not fit its schema; this explains it to somebody who writes the tables by hand or
by a script of his own, and looks across tables, which a schema cannot.
"""
import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from puzzle_core.errors import UserError
from puzzle_core.schemas import BASE_METRICS, MEASURED, MOST_LAYERS, RESERVED
from puzzle_core.spec import BLOCK, KV_WINDOW, OUTSIDE, PARENT, SUBBLOCKS, Joint, Scenario, halves, is_parent, parse_variant
from puzzle_core.tables import SCHEMAS, check

REQUIRED = ("scores", "costs")
SHOWN = 5  # rows named per fault


def load(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of `folder` as they are, unchecked; library.parquet may be missing. FileNotFoundError, ValueError."""
    found = {}
    for name in SCHEMAS:
        path = folder / f"{name}.parquet"
        if path.exists():
            try:
                found[name] = pd.read_parquet(path).reset_index(drop=True)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is not a readable parquet file ({error}); write it with DataFrame.to_parquet") from error
        elif name in REQUIRED:
            raise FileNotFoundError(f"{path} is missing; a search needs {' and '.join(f'{n}.parquet' for n in REQUIRED)}")
    return found


def faults(tables: dict[str, pd.DataFrame]) -> list[str]:
    """Everything that is wrong, a sentence each; empty if the tables can be searched."""
    found = []
    for name, table in tables.items():
        alone = list(_columns(name, table))
        found += alone or list(_cells(name, table))
    if not found:  # what is not explained above, the schemas still refuse
        found += [str(error) for error in map(_refusal, tables, tables.values()) if error]
    if not found:
        found += _parents(tables["scores"])
        found += _costs_of_scores(tables["scores"], tables["costs"])
        found += _scenarios(tables["costs"])
        found += _metrics(tables["scores"], tables["costs"])
        if "library" in tables:
            found += _library(tables["scores"], tables["library"])
    return found


def _refusal(name: str, table: pd.DataFrame) -> ValueError | None:
    try:
        check(name, table)
    except ValueError as error:
        return error
    return None


def summary(tables: dict[str, pd.DataFrame]) -> str:
    scores, costs = tables["scores"], tables["costs"]
    return (
        f"{scores['layer'].max() + 1} layers, {len(scores.drop_duplicates(['layer', 'subblock', 'variant']))} options, "
        f"scores {', '.join(sorted(set(scores['metric'])))}, scenarios {', '.join(sorted(set(costs['scenario'])))}"
    )


def _columns(name: str, table: pd.DataFrame) -> Iterator[str]:
    wanted = {column: spec for column, spec in SCHEMAS[name].columns.items() if spec.default is None}  # the others may be left out
    for column in wanted.keys() - set(table):
        close = difflib.get_close_matches(column, set(table) - set(wanted), n=1)
        yield f"{name}: there is no column '{column}'" + (f"; rename '{close[0]}'?" if close else f"; add it ({wanted[column].dtype})")
    for column in sorted(set(table) - set(SCHEMAS[name].columns)):
        yield f"{name}: column '{column}' is not one of {', '.join(SCHEMAS[name].columns)}; drop it"
    for column in sorted(set(table) & set(SCHEMAS[name].columns)):
        if not len(table):
            break
        kind = str(SCHEMAS[name].columns[column].dtype)
        if kind.startswith("int") and not pd.api.types.is_integer_dtype(table[column]):
            yield f"{name}: column '{column}' is {table[column].dtype}; expected whole numbers: table['{column}'].astype(int)"
        if kind.startswith("float") and not pd.api.types.is_float_dtype(table[column]):
            yield f"{name}: column '{column}' is {table[column].dtype}; expected floats: table['{column}'].astype(float)"
    if not len(table):
        yield f"{name}: there are no rows"


def _cells(name: str, table: pd.DataFrame) -> Iterator[str]:
    """Values that cannot be right whatever the others are, and keys that are there twice."""

    def where(wrong: pd.Series | np.ndarray, what: str, mend: str) -> Iterator[str]:
        rows = table.index[np.asarray(wrong, bool)]
        if len(rows):
            yield f"{name}: {_rows(table, rows, SCHEMAS[name].unique)} {what}; {mend}"

    subblocks = (*SUBBLOCKS, BLOCK, OUTSIDE) if name == "costs" else (*SUBBLOCKS, BLOCK)
    yield from where(~table["subblock"].isin(subblocks), "is of no known subblock", f"use {', '.join(subblocks)}")
    pairs = zip(table["subblock"], table["variant"], strict=True)
    bad = [s in subblocks and not _parses(lambda text, s=s: parse_variant(s, text), v) for s, v in pairs]
    yield from where(bad, "has no variant id", "use parent, no_op, linear, kvN, wN; in a row of subblock block two of them, as kv4+w768")
    if "layer" in table:
        yield from where(table["layer"] < (-1 if name == "costs" else 0), "has a negative layer", "count layers from 0")
        yield from where(table["layer"] >= MOST_LAYERS, f"is of a layer beyond {MOST_LAYERS}", "count layers from 0, without a gap")
    if "metric" in table:
        taken = table["metric"].isin((*RESERVED, *BASE_METRICS) if name == "scores" else (*RESERVED, *MEASURED))
        yield from where(taken, "has a metric with the name of a total, a limit or a column of results", "call it something else")
    key = [column for column in SCHEMAS[name].unique if column in table]
    yield from where(table.duplicated(key, keep=False), "is there more than once", "keep one row of each key")
    for column in table.select_dtypes("number"):
        yield from where(~np.isfinite(table[column]), f"has a {column} that is no finite number", "measure it again or drop the row")
    if name == "scores":
        parent = table["variant"].map(is_parent).astype(bool)
        scored = parent & (table["value"] != 0) & np.isfinite(table["value"])
        yield from where(scored, "gives the parent a score", "it is 0 exactly: subtract the parent's from all")
        yield from where(table["num_tokens"] < 1, "was scored on no tokens", "say on how many it was")
    if name == "costs":
        yield from where(table["value"] < 0, "costs less than nothing", "a cost is at least 0")
        bad = [not _parses(Scenario.parse, text) for text in table["scenario"]]
        yield from where(bad, "has no scenario id", "use for example b8p512g128")
        sources = ("measured", "computed", "analytic")
        yield from where(~table["source"].isin(sources), "has no known source", f"use {', '.join(sources)}")


def _rows(table: pd.DataFrame, rows: pd.Index, key: list[str]) -> str:
    key = [column for column in key if column in table]
    named = [f"row {row} ({' '.join(str(table.at[row, column]) for column in key)})" for row in rows[:SHOWN]]
    return ", ".join(named) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def _parses(parse: Callable, text: object) -> bool:
    try:
        return isinstance(text, str) and str(parse(text)) == text
    except ValueError:
        return False


def _some(what: Iterable) -> str:
    what = [item if isinstance(item, str) else " ".join(map(str, item)) for item in what]
    return ", ".join(what[:SHOWN]) + (f" and {len(what) - SHOWN} more" if len(what) > SHOWN else "")


def _parents(scores: pd.DataFrame) -> Iterator[str]:
    """Every layer must be able to stay as it is, in every metric; a layer has both subblocks or blocks alone."""
    joint = str(Joint(PARENT, PARENT))
    for metric, table in scores.groupby("metric"):
        there = set(table[["layer", "subblock", "variant"]].itertuples(index=False, name=None))
        halves = {(layer, subblock) for layer, subblock, _ in there}
        lacking = []
        num_there, last = scores["layer"].nunique(), scores["layer"].max()
        for layer in range(min(last, num_there) + 1):  # by then a gap has shown, however far the last layer is
            of_layer = {subblock for n, subblock in halves if n == layer}
            if of_layer == {BLOCK}:
                lacking += [(layer, BLOCK, joint)] * ((layer, BLOCK, joint) not in there)
            elif not of_layer:
                lacking.append((layer, "(every row)"))
            else:
                lacking += [(layer, s, "parent") for s in SUBBLOCKS if (layer, s, "parent") not in there]
        if lacking:
            yield (
                f"scores: metric {metric} lacks {_some(f'layer {item[0]} ' + ' '.join(item[1:]) for item in lacking)}; "
                "add the parent's rows, with value 0.0, to every layer from 0 to the last"
            )
    options = scores.groupby(["layer", "subblock", "variant"])["metric"].nunique()
    some = options[options < scores["metric"].nunique()]
    if len(some):
        yield f"scores: {_some(some.index)} {'have' if len(some) > 1 else 'has'} not every metric; score it with all of them, or drop it"


def _costs_of_scores(scores: pd.DataFrame, costs: pd.DataFrame) -> Iterator[str]:
    """Each scored option has each metric that any row has, in each scenario, of its layer or of all; a block may have its halves'."""
    layers = costs["layer"] if "layer" in costs else pd.Series(-1, index=costs.index)
    options = sorted(set(scores[["layer", "subblock", "variant"]].itertuples(index=False, name=None)))
    for (scenario, metric), rows in costs[costs["metric"] != KV_WINDOW].groupby(["scenario", "metric"]):
        there = set(zip(layers[rows.index], rows["subblock"], rows["variant"], strict=True))

        def costs_something(layer: int, subblock: str, variant: str, there: set = there) -> bool:
            of_halves = halves(subblock, parse_variant(subblock, variant))
            either = (layer, subblock, variant) in there or (-1, subblock, variant) in there
            return either or (subblock == BLOCK and all(costs_something(layer, s, str(v)) for s, v in of_halves))

        lacking = dict.fromkeys((s, v) for n, s, v in options if not costs_something(n, s, v))
        if lacking:
            have = "have" if len(lacking) > 1 else "has"
            yield f"costs: {_some(lacking)} {have} a score but no {metric} in scenario {scenario}; add it, 0 if it costs none"
        if (-1, OUTSIDE, str(PARENT)) not in there:
            yield (
                f"costs: there is no row 'outside parent' of {metric} in scenario {scenario}; "
                "add it (embeddings, final norm, LM head), 0 if it costs none"
            )


def _scenarios(costs: pd.DataFrame) -> Iterator[str]:
    """A scenario may lack metrics, whose totals are then not known there; but not because it has one under a misspelt name."""
    metrics = {scenario: set(rows["metric"]) for scenario, rows in costs.groupby("scenario")}
    misspelt = {}
    for scenario, there in metrics.items():
        for metric in sorted(there - set(BASE_METRICS)):
            close = difflib.get_close_matches(metric, set(BASE_METRICS) - there, n=1, cutoff=0.8)
            if close and not any({metric, *close} <= others for others in metrics.values()):
                misspelt.setdefault((metric, *close), []).append(scenario)
    for (metric, close), scenarios in misspelt.items():
        yield f"costs: {metric} of scenario {_some(scenarios)} is no metric that totals are made of; did you mean {close}?"


def _metrics(scores: pd.DataFrame, costs: pd.DataFrame) -> Iterator[str]:
    if both := sorted(set(scores["metric"]) & set(costs["metric"])):
        yield f"costs: {_some(both)} is a metric of scores too; call one of the two something else"


def _library(scores: pd.DataFrame, library: pd.DataFrame) -> Iterator[str]:
    key = ["layer", "subblock", "variant"]
    scored, made = (set(table[key].itertuples(index=False, name=None)) for table in (scores, library))
    if lacking := sorted(row for row in scored - made if not set(row[2].split("+")) <= {"parent", "no_op"}):
        are = "are" if len(lacking) > 1 else "is"
        yield f"library: {_some(lacking)} {are} scored but not in the library; a child with it could not be assembled"
