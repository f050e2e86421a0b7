"""Score every variant of the library: replace one in the parent, measure KL and LM loss on held-out tokens."""
from pathlib import Path

from puzzle_core import plots, scoring, tables
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import lock
from puzzle_core.parents import load_parent, pick_device


@stage("score")
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(scoring.Settings, cfg.score)
    table, partial = out / "scores.parquet", out / ".scores.partial.parquet"
    with lock(out, "score"):
        library = tables.read("library", data / "library.parquet")
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.parent.get("device", "auto")), in_parts=True)
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        known = tables.read_known("scores", table, partial)
        scores, num_made = scoring.score_library(
            parent, library, data / "blocks", corpus, settings, known, keep=lambda rows: tables.write("scores", rows, partial)
        )
        tables.write("scores", scores, table)
        partial.unlink(missing_ok=True)
        plots.score_picture(scores, "kl", out / "plots" / "scores.png")
    print(f"score: {num_made} variants scored, {len(library) - num_made} kept; {table}")


if __name__ == "__main__":
    run()
