"""Build the child from the parent and the chosen variants, prove that it loads anywhere, measure it beside the parent."""
from pathlib import Path

import torch

from puzzle_core import cards, evaluation, tables
from puzzle_core.children import make_child, save_child, verify_reload
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic, lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Solution

HOW = "Its blocks were distilled one by one and put together; it was not yet trained as a whole."


@stage("assemble")
def run(cfg):
    data, out = Path(cfg.data), Path(cfg.out)
    with lock(out, "assemble"):
        solution = Solution.from_json(read_json(data / "solution.json"))
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        library = tables.read("library", data / "library.parquet")
        child = make_child(parent, solution.architecture, tables.variant_files(library, data / "blocks"))
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        settings = fill(evaluation.Settings, cfg.evaluation)
        ids = torch.as_tensor(settings.batches(corpus)[0][:1], device=parent.device)
        with atomic(out / "child") as part:  # it appears when it is proved, measured and described
            save_child(child, parent.tokenizer, part)
            verify_reload(child, part, ids)
            metrics = evaluation.measure(parent.model, child, corpus, solution.scenario, cfg.hardware.serving, settings)
            cards.write(part, parent, solution, metrics, HOW, corpus.name)
        for name, row in metrics.items():
            write_json(out / "metrics" / f"{name}.json", row)
    print(evaluation.table({"parent": metrics["parent"], "predicted": solution.predicted(), "child": metrics["child"]}))


if __name__ == "__main__":
    run()
