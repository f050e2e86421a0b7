"""Score every variant of the library: replace one in the parent, measure what is lost on development tokens."""
from pathlib import Path

from puzzle_core import plots, ranks, scoring, tables
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import lock
from puzzle_core.parents import load_parent, pick_device


@stage("score", launches=True)
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(scoring.Settings, cfg.score)
    with ranks.joined() as mine, lock(out, mine.tag("score")):
        table, partial = out / "scores.parquet", out / f".scores.{mine.tag('partial')}.parquet"
        library = tables.read("library", data / "library.parquet")
        parent = fill(load_parent, cfg.parent, device=mine.device(pick_device(cfg.parent.get("device", "auto"))), in_parts=True)
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        known = tables.read_known("scores", table, *sorted(out.glob(".scores.partial*.parquet")))
        scores, num_made = scoring.score_library(
            parent, library, data / "blocks", corpus, settings, known, lambda rows: tables.write("scores", rows, partial), mine
        )
        if mine.first:
            tables.write("scores", scores, table)
            plots.score_picture(scores, settings.names[0], out / "plots" / "scores.png")
            print(f"score: {num_made} variants scored, {len(library) - num_made} kept; {table}")
            for unfinished in out.glob(".scores.partial*.parquet"):
                unfinished.unlink()


if __name__ == "__main__":
    run()
