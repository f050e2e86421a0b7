"""What coupled training of a layer's two halves is worth: joint blocks beside the halves that they are made of.

    python -m benchmarks.coupled --data data parent.dtype=bfloat16 ...   # overrides as the stages took them that made the library

For a library that has joint blocks (`python -m stages.couple`, docs/library.md), with scores and costs. Of each block: the sum of its
halves' scores, the KL of the halves put together as they are, and that of the block; all on the same held-out text. Then the search
at some speed-ups with and without joint rows, and the joint KL of each child. Writes docs/results/coupled.json, and the table there.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.demo import ROOT, write_into
from benchmarks.machine import write_results
from puzzle_core import evaluation, realised, search, tables
from puzzle_core.config import composed, fill, plain
from puzzle_core.corpus import Corpus
from puzzle_core.files import read_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.problem import Problem
from puzzle_core.spec import BLOCK, PARENT, Architecture, Joint, Workload


def one_block(num_layers: int, layer: int, block: Joint, joint: bool) -> Architecture:
    """The parent but for one layer, which has the block, or its halves as they were trained apart."""
    layers = [(PARENT, PARENT)] * num_layers
    layers[layer] = block.attention, block.ffn
    return Architecture(tuple(layers), (layer,) if joint else ())


def by_block(problem: Problem, joint_kl) -> pd.DataFrame:
    """A row for each joint block that changes both halves."""
    joint = [(layer, block) for layer, subblock, block in problem.options if subblock == BLOCK]
    blocks = [(layer, block) for layer, block in joint if PARENT not in (block.attention, block.ffn)]
    apart, together = ([one_block(problem.num_layers, *block, joint) for block in blocks] for joint in (False, True))
    kls = joint_kl([*apart, *together])
    table = pd.DataFrame([(layer, str(block)) for layer, block in blocks], columns=["layer", "block"])
    summed = [problem.score(problem.rows_of(halves)) for halves in apart]
    return table.assign(sum=summed, halves=kls[: len(blocks)], coupled=kls[len(blocks) :])


def by_speedup(problems: dict[str, Problem], speedups: list[float], limits: dict, settings: search.Settings, joint_kl) -> list[dict]:
    """What the search finds without and with joint rows."""
    rows = [
        {"speedup": speedup, "rows": name, "solution": search.search(problem, {**limits, "speedup": speedup}, settings)[0]}
        for speedup in speedups
        for name, problem in problems.items()
    ]
    for row, kl in zip(rows, joint_kl([row["solution"].architecture for row in rows]), strict=True):
        solution = row.pop("solution")
        row |= {"predicted": solution.score, "joint_kl": kl, "joint_layers": len(solution.architecture.joint)}
        row["architecture"] = solution.architecture.to_json()
    return rows


def text_of(found: dict) -> str:
    """The two tables as Markdown."""
    lines = ["| blocks whose halves are both replaced | median KL |", "|---|---|"]
    names = {"sum": "sum of the halves' scores", "halves": "halves trained apart, put together", "coupled": "trained together"}
    lines += [f"| {title} | {found['median'][name]:.4f} |" for name, title in names.items()]
    lines += ["", "| speed-up | rows searched | sum of scores | joint KL of the child | layers with a joint block |", "|---" * 5 + "|"]
    for row in found["searched"]:
        cells = [f"{row['speedup']:g} ×", row["rows"], f"{row['predicted']:.3f}", f"{row['joint_kl']:.3f}", str(row["joint_layers"])]
        lines.append(f"| {' | '.join(cells)} |")
    better = f"Trained together is better in {found['better']:.0%} of {found['blocks']} blocks, by {found['gain']:.0%} in the median."
    return "\n".join([*lines, "", f"{better} {found['about']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="library.parquet, scores.parquet, costs.parquet and blocks/")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    parser.add_argument("--out", help="none: write no result")
    options, overrides = parser.parse_known_args()
    cfg = composed(*overrides, f"out='{options.data}'")
    scores, costs, library = (tables.read(name, options.data / f"{name}.parquet") for name in ("scores", "costs", "library"))
    parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
    corpus, text = Corpus(parent.tokenizer, plain(cfg.corpus)), fill(realised.Settings, cfg.realised)
    batches = text.batches(corpus, fill(evaluation.Settings, cfg.evaluation).batches(corpus))
    settings, weights_of = fill(search.Settings, cfg.search, pool_size=1), tables.variant_files(library, options.data / "blocks")

    def joint_kl(architectures: list[Architecture]) -> list[float]:
        return realised.joint_kl(parent, architectures, weights_of, batches, text)

    def problem(of: pd.DataFrame) -> Problem:
        return Problem.from_tables(of, costs, settings.metric, str(fill(Workload, cfg.workload).scenario))

    problems = {"halves": problem(scores[scores["subblock"] != BLOCK]), "halves and joint blocks": problem(scores)}
    blocks = by_block(problems["halves and joint blocks"], joint_kl)
    gain = 1 - blocks["coupled"] / blocks["halves"]
    num_tokens = sum(batch.size for batch in batches)
    trained = int(library.loc[library["subblock"] == BLOCK, "num_tokens"].max())
    found = {
        "blocks": len(blocks),
        "median": blocks[["sum", "halves", "coupled"]].median().to_dict(),
        "better": float(np.mean(gain > 0)),
        "gain": float(gain.median()),
        "about": f"KL on {num_tokens:,} held-out tokens; blocks trained on {trained:,} each; costs of {problems['halves'].hardware}.",
        "searched": by_speedup(problems, options.speedups, plain(cfg.constraints), settings, joint_kl),
        "of_blocks": blocks.to_dict("records"),
    }
    print(text_of(found))
    if options.out != "none":
        write_results("coupled", found, parent.device)
        write_into("docs/library.md", "coupled", text_of(read_json(ROOT / "docs/results/coupled.json")["figures"]))


if __name__ == "__main__":
    main()
