"""What each way to begin a variant is worth: its score on the embedded parent, untrained, with the ridge refit and without.

    python -m benchmarks.initialisation                             # every layer: for a GPU
    python -m benchmarks.initialisation --layers 1 8 15 --ffn w768 linear --calibration-tokens 4096 --score-tokens 512

Makes a library for each choice of `bld.channels` and `bld.kv_heads`, no gradient step in it, scores it, and writes the median
KL over the layers into docs/library.md.
"""
import argparse
import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch
import yaml

from benchmarks.demo import ROOT, write_into
from benchmarks.machine import now, write_results
from puzzle_core import bld, scoring, surgery, tables
from puzzle_core.corpus import Corpus
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.serving import hardware_name
from puzzle_core.subblocks import resolve_layers

STRENGTHS = [0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0]
KEY = ["subblock", "variant"]


def choices() -> list[tuple[str, str]]:
    """Each way to choose channels and each way to merge heads, at least once: they do not meet."""
    longest = max(len(surgery.CHANNELS), len(surgery.KV_HEADS))
    return list(itertools.islice(zip(itertools.cycle(surgery.CHANNELS), itertools.cycle(surgery.KV_HEADS), strict=False), longest))


def table(rows: pd.DataFrame) -> str:
    medians = rows.pivot_table(index=["variant", "init"], columns="refit", values="kl", aggfunc="median", sort=False)
    lines = ["| variant | initialisation | median KL | with the ridge refit |", "|---|---|---|---|"]
    lines += [f"| {variant} | {init} | {row[False]:.4f} | {row[True]:.4f} |" for (variant, init), row in medians.iterrows()]
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--layers", type=int, nargs="+", help="all if left out")
    arguments.add_argument("--attention", nargs="*", default=["kv1", "linear"])
    arguments.add_argument("--ffn", nargs="*", default=["w1152", "w768", "w384", "linear"])
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--calibration-tokens", type=int, default=8192)
    arguments.add_argument("--score-tokens", type=int, default=16384)
    options = arguments.parse_args()
    device = pick_device()
    parent = load_parent(**yaml.safe_load((ROOT / "conf/parent/smollm2-135m.yaml").read_text()), device=device)
    corpus = Corpus(parent.tokenizer, yaml.safe_load((ROOT / "conf/corpus/excerpt.yaml").read_text()))
    spaces = resolve_layers({"attention": options.attention, "ffn": options.ffn}, parent.model.config, parent.family)
    layers = options.layers or list(range(len(parent.layers)))
    score = scoring.Settings(options.score_tokens, options.seq_len, options.batch_size, ["kl"], variants_at_once=4, head_tokens=512)
    nothing = pd.DataFrame(columns=list(tables.SCHEMAS["scores"].columns))
    rows, start = [], now(device)
    for (channels, kv_heads), refit in itertools.product(choices(), (False, True)):
        settings = bld.Settings(
            options.seq_len, options.batch_size, options.calibration_tokens, 0, 1024, STRENGTHS if refit else None, 1e-4, 0.0, 0.0, 1.0,
            channels=channels, kv_heads=kv_heads,
        )  # fmt: skip
        jobs = [job for job in bld.jobs(parent, spaces, settings, 0, corpus) if job.layer in layers]
        done = {(row["variant"], row["init"], row["refit"]) for row in rows}  # where the other of the two choices comes round again
        with tempfile.TemporaryDirectory() as directory:
            library, _ = bld.train_library(parent, jobs, corpus, settings, 0, Path(directory) / "blocks")
            library["begun"] = library["init"].str.split("+").str[0]
            library = library[[(f"{s} {v}", i, refit) not in done for s, v, i in library[[*KEY, "begun"]].itertuples(index=False)]]
            scores, _ = scoring.score_library(parent, library, Path(directory) / "blocks", corpus, score, nothing, lambda table: None)
        for row, of_row in zip(library.itertuples(), scores.itertuples(), strict=True):
            if row.variant != "parent":
                named = {"layer": row.layer, "variant": f"{row.subblock} {row.variant}", "init": row.begun, "refit": refit}
                rows.append({**named, "mse": row.loss_after, "kl": of_row.value, "num_tokens": of_row.num_tokens})
        print(f"{channels}, {kv_heads}, {'ridge' if refit else 'no refit'}: {now(device) - start:.0f} s", flush=True)
    found = pd.DataFrame(rows)
    text = table(found)
    asked = {**vars(options), "layers": layers, "strengths": STRENGTHS, "threads": torch.get_num_threads()}
    write_results("initialisation", {"asked": asked, "seconds": now(device) - start, "rows": rows}, device)
    which = "all layers" if options.layers is None else f"layers {', '.join(map(str, layers))}"
    budgets = f"{options.calibration_tokens:,} calibration tokens, KL on {rows[0]['num_tokens']:,} development tokens"
    caption = f"Median over {which} of smollm2-135m; {budgets}; {hardware_name(device)}."
    write_into("docs/library.md", "initialisation", f"{text}\n\n{caption}")
    print(f"{text}\n\n{caption}")


if __name__ == "__main__":
    main()
