"""Pictures of results: the scores that an architecture is chosen by, frontiers, rivals."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from puzzle_core.errors import UserError
from puzzle_core.files import atomic
from puzzle_core.spec import ATTENTION, BLOCK, FFN, SUBBLOCKS, Joint, Solution, Variant, by_size, is_parent

PREDICTED = {"speedup": "speed-up", "memory_mib": "memory, MiB", "kl": "KL to the parent"}
NAMES = {ATTENTION: "attention", FFN: "FFN", BLOCK: "block"}
WIDTH_INCHES, DPI = 9.0, 200  # 9 inches are the 900 pixels of a README; twice the dots for sharp screens


def score_picture(scores: pd.DataFrame, metric: str, path: str | Path) -> None:
    """Draw to a PNG what each variant but the parent would cost in quality in each layer."""
    table = scores[(scores["metric"] == metric) & ~scores["variant"].map(is_parent)]
    if table.empty:
        raise UserError(
            f"no '{metric}' scores of variants to draw; the table has metrics {sorted(set(scores['metric']))}"
        )
    table = table.pivot(index=["subblock", "variant"], columns="layer", values="value")
    table = table.reindex(columns=range(table.columns.max() + 1))
    rows = [(s, v) for s in SUBBLOCKS for v in by_size({Variant.parse(v) for at, v in table.index if at == s})]
    rows += [(BLOCK, joint) for joint in sorted(Joint.parse(v) for at, v in table.index if at == BLOCK)]
    values = table.loc[[(s, str(v)) for s, v in rows]].to_numpy()
    positive = values[values > 0]
    figure = Figure(figsize=(WIDTH_INCHES, 1.4 + 0.26 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    colors = colormaps["YlOrRd"].with_extremes(bad="#dddddd")  # a log scale has no 0, and rows may be missing
    norm = LogNorm(low, max(high, 1.01 * low))
    image = axes.imshow(np.where(values > 0, values, np.nan), aspect="auto", cmap=colors, norm=norm)
    axes.set_title(f"{metric} lost by replacing one subblock of the parent", size=11, loc="left")
    axes.set_yticks(range(len(rows)), [f"{NAMES[s]} {v}" for s, v in rows], size=9)
    _finish(axes, table.shape[1], len(rows))
    axes.axhline(sum(s == ATTENTION for s, _ in rows) - 0.5, color="white", linewidth=5)
    figure.colorbar(image, ax=axes, pad=0.01, label=f"{metric} (grey: ≤ 0 or none)")
    _write(figure, path)


def frontier_picture(
    rows: list[dict], name: str, metric: str, path: str | Path, title: str, marks: dict[str, tuple[float, float]] | None = None
) -> None:
    """Draw to a PNG the least score at each limit of the constraint `name`; points that are not proven are hollow.

    `marks` are children to show beside it, by label: what each reaches of `name`, and what it loses.
    """
    figure = Figure(figsize=(WIDTH_INCHES, 3.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    x, y = [row["limit"] for row in rows], [row["score"] for row in rows]
    axes.plot(x, y, color="#1f5fa8", linewidth=1.5, zorder=1)
    faces = ["#1f5fa8" if row["gap"] == 0 else "white" for row in rows]
    axes.scatter(x, y, s=18, c=faces, edgecolors="#1f5fa8", zorder=2)
    for (label, at), color, shape in zip((marks or {}).items(), ("#1f5fa8", "#b3452c", "#2e7d4f"), ("D", "s", "o"), strict=False):
        axes.scatter(*at, s=70, c=color, marker=shape, edgecolors="white", label=label, zorder=3)
    if marks:
        axes.legend(fontsize=9, frameon=False, loc="upper left")
    axes.set_title(title, size=11, loc="left")
    axes.set_xlabel(name if marks else f"{name}, the limit", size=10)
    axes.set_ylabel(metric if marks else f"total {metric}, predicted", size=10)
    positive = [score for score in y if score > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log", nonpositive="mask")  # what loses nothing has no place there
    _plain(axes)
    _write(figure, path)


def rivals_picture(rows: list[dict], metric: str, path: str | Path, title: str) -> None:
    """Draw to a PNG what each method's architecture loses; those that found none that fits say so."""
    rows = sorted(rows, key=lambda row: (row["score"] is None, row["score"]), reverse=True)
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.34 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    scores = [row["score"] or 0.0 for row in rows]
    axes.barh(range(len(rows)), scores, color=["#1f5fa8" if row["method"] == "mip" else "#a9c4e4" for row in rows])
    for place, row in enumerate(rows):
        label = "nothing that fits" if row["score"] is None else f"{row['score']:.4g}" + (f"  (+{row['gap']:.2%})" if row["gap"] else "")
        axes.text(max(scores[place], 0), place, f" {label}", va="center", size=9)
    axes.set_yticks(range(len(rows)), [row["method"].replace("_", " ") for row in rows], size=9)
    axes.set_xlim(min(0, *scores), 1.25 * max(*scores, 1e-300))
    axes.set_xlabel(f"total {metric}, predicted (in brackets: above the MIP's)", size=10)
    axes.set_title(title, size=11, loc="left")
    _plain(axes)
    _write(figure, path)


def realised_picture(rows: list[dict], metric: str, path: str | Path, title: str) -> None:
    """Draw to a PNG what was predicted for each architecture and the joint KL of its child: bars for a few, dots for many."""
    few = len(rows) <= 16
    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 0.42 * len(rows) if few else 5.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    (_named_bars if few else _dots)(axes, sorted(rows, key=lambda row: -row["realised"]))
    axes.set_title(title, size=11, loc="left")
    axes.set_xlabel(f"total {metric} predicted, joint KL realised" if few else f"total {metric}, predicted", size=10)
    _plain(axes)
    _write(figure, path)


def predicted_picture(solution: Solution, measured: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw to a PNG what the search predicted of parent and child and what was measured: a panel for each figure that is known both ways.

    Costs and child are measured at different times, so the speed is that over the parent of the same run.
    """
    rows = {"parent": ({**solution.parent_totals, "speedup": 1.0}, measured["parent"]), "child": (solution.predicted(), measured["child"])}
    panels = [name for name in PREDICTED if any(all(side.get(name) for side in row) for row in rows.values())]
    figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.6 * len(rows)), dpi=DPI, layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels) or 1)), panels, strict=False):
        sides = {key: [row[side].get(name, 0.0) for row in rows.values()] for side, key in enumerate(("predicted", "realised"))}
        for shift, key, color in ((-0.2, "predicted", "#a9c4e4"), (0.2, "realised", "#1f5fa8")):
            bars = axes.barh([place + shift for place in range(len(rows))], sides[key], height=0.38, color=color, label=key)
            axes.bar_label(bars, [f" {value:.4g}" for value in sides[key]], size=8)
        axes.set_yticks(range(len(rows)), list(rows) if name == panels[0] else [""] * len(rows), size=9)
        axes.invert_yaxis()
        axes.set_xlim(right=1.45 * max(map(max, sides.values())))
        axes.set_title(PREDICTED[name], size=10, loc="left")
        _plain(axes)
    figure.suptitle(f"Predicted (light) and realised (dark): {solution.priced}", size=11, x=0.01, ha="left")
    _write(figure, path)


def _named_bars(axes: Axes, rows: list[dict]) -> None:
    for shift, key, color in ((0.2, "realised", "#1f5fa8"), (-0.2, "predicted", "#a9c4e4")):
        bars = axes.barh([place + shift for place in range(len(rows))], [row[key] for row in rows], height=0.38, color=color, label=key)
        axes.bar_label(bars, [f" {row[key]:.4g}" for row in rows], size=8)
    axes.set_yticks(range(len(rows)), [row["name"].replace("_", " ") for row in rows], size=9)
    axes.set_xlim(right=1.12 * max(max(row["predicted"], row["realised"]) for row in rows))
    axes.legend(fontsize=9, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _dots(axes: Axes, rows: list[dict]) -> None:
    for group in dict.fromkeys(row["group"] for row in rows):
        some = [row for row in rows if row["group"] == group]
        axes.scatter([row["predicted"] for row in some], [row["realised"] for row in some], s=18, label=group)
    axes.axline((0, 0), slope=1, color="#999999", linewidth=1, zorder=0, label="as predicted")
    axes.set_ylabel("joint KL, realised", size=10)
    axes.legend(fontsize=9, frameon=False)


def curve_picture(training: list[dict], held_out: list[dict], path: str | Path) -> None:
    """Draw to a PNG the losses of global distillation step by step, and what was measured on development text on the way.

    Cosine distances and whatever else is measured have panels of their own: their units are others.
    """
    lines = [(training, key) for key in training[0] if key not in ("step", "learning_rate")]
    lines += [(held_out, key) for key in dict.fromkeys(key for row in held_out for key in row if key != "step")]
    panels: dict[str, list] = {}
    for rows, key in lines:
        panels.setdefault(key if key == "cosine" or (rows is held_out and key != "held_out_kl") else "loss", []).append((rows, key))
    figure = Figure(figsize=(WIDTH_INCHES, 3.0), dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.values(), strict=True):
        for rows, key in panel:
            points = [(row["step"], row[key]) for row in rows if key in row]
            dots = "o" if rows is held_out else None
            axes.plot(*zip(*points, strict=True), linewidth=1.4, marker=dots, markersize=4, label=key.replace("_", " "))
        axes.set_xlabel("step", size=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9, frameon=False)
        _plain(axes)
    _write(figure, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _finish(axes: Axes, num_layers: int, num_rows: int) -> None:
    axes.set_xlabel("layer", size=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axes.set_xticks(np.arange(-0.5, num_layers), minor=True)
    axes.set_yticks(np.arange(-0.5, num_rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.0, 40 / num_layers))
    axes.tick_params(which="both", length=0)
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.set_frame_on(False)


def _write(figure: Figure, path: str | Path) -> None:
    with atomic(path) as part:
        figure.savefig(part, format="png")
