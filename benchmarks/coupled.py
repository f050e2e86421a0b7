"""What coupled training of a layer's two halves is worth: joint blocks beside the halves that they are made of.

    python -m benchmarks.coupled --data data parent.dtype=bfloat16 ...   # overrides as the stages took them that made the library
    python -m benchmarks.coupled --data data/samples/smollm2-135m-coupled search_space=paper workload=throughput    # tables alone

For a library that has joint blocks (`python -m stages.couple`, docs/library.md), with scores and costs: each block's score beside the
sum of its halves', and what the search finds at some speed-ups with and without joint rows. Where the weights are there too, under
blocks/: the KL of the halves put together as they are, and the joint KL of each child that the search chose. Writes
docs/results/coupled.json, and the table in docs/library.md.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.demo import write_into
from benchmarks.machine import write_results
from puzzle_core import realised, search, tables
from puzzle_core.config import composed, fill, plain
from puzzle_core.corpus import Corpus
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.problem import Problem
from puzzle_core.spec import BLOCK, PARENT, Architecture, Joint, Workload


def one_block(num_layers: int, layer: int, block: Joint, joint: bool) -> Architecture:
    """The parent but for one layer, which has the block, or its halves as they were trained apart."""
    layers = [(PARENT, PARENT)] * num_layers
    layers[layer] = block.attention, block.ffn
    return Architecture(tuple(layers), (layer,) if joint else ())


def by_block(problem: Problem, joint_kl: Callable | None) -> pd.DataFrame:
    """A row for each joint block that changes both halves."""
    joint = [(layer, block) for layer, subblock, block in problem.options if subblock == BLOCK]
    blocks = [(layer, block) for layer, block in joint if PARENT not in (block.attention, block.ffn)]
    table = pd.DataFrame([(layer, str(block)) for layer, block in blocks], columns=["layer", "block"])
    for score, measured, together in (("sum", "halves_measured", False), ("coupled", "coupled_measured", True)):
        some = [one_block(problem.num_layers, *block, together) for block in blocks]
        table[score] = [problem.score(problem.rows_of(one)) for one in some]
        if joint_kl:
            table[measured] = joint_kl(some)
    return table


def by_speedup(
    problems: dict[str, Problem], speedups: list[float], limits: dict, settings: search.Settings, joint_kl: Callable | None
) -> list[dict]:
    """What the search finds without and with joint rows."""
    rows = [
        {"speedup": speedup, "rows": name, "solution": search.search(problem, {**limits, "speedup": speedup}, settings)[0]}
        for speedup in speedups
        for name, problem in problems.items()
    ]
    kls = joint_kl([row["solution"].architecture for row in rows]) if joint_kl else [None] * len(rows)
    for row, kl in zip(rows, kls, strict=True):
        solution = row.pop("solution")
        row |= {"predicted": solution.score, "joint_kl": kl, "joint_layers": len(solution.architecture.joint)}
        row["architecture"] = solution.architecture.to_json()
    return rows


def text_of(found: dict) -> str:
    """The two tables as Markdown."""
    titles = {
        "sum": "sum of the halves' scores",
        "coupled": "score of the block, trained together",
        "halves_measured": "KL of the halves trained apart, put together, on other text",
        "coupled_measured": "KL of the block on that text",
    }
    lines = ["| blocks whose halves are both replaced | median |", "|---|---|"]
    lines += [f"| {titles[name]} | {value:.4f} |" for name, value in found["median"].items()]
    measured = ["joint KL of the child"] if found["searched"][0]["joint_kl"] is not None else []
    header = ["speed-up", "rows searched", "sum of scores", *measured, "layers with a joint block"]
    lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in found["searched"]:
        cells = [f"{row['speedup']:g} ×", row["rows"], f"{row['predicted']:.3f}", *[f"{row['joint_kl']:.3f}" for _ in measured]]
        lines.append(f"| {' | '.join([*cells, str(row['joint_layers'])])} |")
    share = f"{found['better']:.0%} of {found['blocks']} blocks"
    better = f"The block's score is below the sum in {share}, by {found['gain']:.0%} in the median."
    return "\n".join([*lines, "", f"{better} {found['about']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="library.parquet, scores.parquet, costs.parquet and blocks/")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    parser.add_argument("--out", help="none: write no result")
    options, overrides = parser.parse_known_args()
    cfg = composed(*overrides, f"out='{options.data}'")
    scores, costs, library = (tables.read(name, options.data / f"{name}.parquet") for name in ("scores", "costs", "library"))
    settings, joint_kl, device = fill(search.Settings, cfg.search, pool_size=1), None, pick_device("cpu")
    measured_on = "tables alone: no child was built."
    if (options.data / "blocks").is_dir():
        measured, device = fill(realised.Settings, cfg.realised), pick_device(cfg.hardware.device)
        parent = fill(load_parent, cfg.parent, device=device)
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        batches = measured.batches(corpus)
        weights_of = tables.variant_files(library, options.data / "blocks")
        joint_kl = partial(realised.joint_kl, parent, weights_of=weights_of, batches=batches, settings=measured)
        measured_on = f"joint KL on {sum(batch.size for batch in batches):,} development tokens."

    def problem(of: pd.DataFrame) -> Problem:
        return Problem.from_tables(of, costs, settings.metric, str(fill(Workload, cfg.workload).scenario))

    problems = {"halves": problem(scores[scores["subblock"] != BLOCK]), "halves and joint blocks": problem(scores)}
    blocks = by_block(problems["halves and joint blocks"], joint_kl)
    gain = 1 - blocks["coupled"] / blocks["sum"]
    trained = int(library.loc[library["subblock"] == BLOCK, "num_tokens"].max())
    found = {
        "blocks": len(blocks),
        "median": blocks.drop(columns=["layer", "block"]).median().to_dict(),
        "better": float(np.mean(gain > 0)),
        "gain": float(gain.median()),
        "about": f"Variants were trained on {trained:,} tokens each, blocks, which are made of them, on as many again; {measured_on}",
        "searched": by_speedup(problems, options.speedups, plain(cfg.constraints), settings, joint_kl),
        "of_blocks": blocks.to_dict("records"),
    }
    text = text_of(found)
    print(text)
    if options.out != "none":
        write_results("coupled", found, device)
        write_into("docs/library.md", "coupled", text)


if __name__ == "__main__":
    main()
