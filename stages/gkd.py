"""Distil the parent into the child as a whole, unless this very run has done so before; measure what came of it."""
from pathlib import Path

import torch

from puzzle_core import cards, evaluation, gkd
from puzzle_core.children import load_child, save_child
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic, lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.serving import warn_if_elsewhere
from puzzle_core.spec import Solution

HOW = "Its blocks were distilled one by one and put together; then it was healed as a whole: global distillation, {:,} tokens of {}."


@stage("gkd")
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(gkd.Settings, cfg.gkd)
    with lock(out, "gkd"):
        solution = Solution.from_json(read_json(data / "chosen.json"))
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        this_run = gkd.run_fingerprint(data / "child", settings, cfg.seed, parent.identity, corpus.fingerprint)
        with gkd.work_folder(out, this_run) as work, atomic(out / "distilled") as part:
            curve = gkd.take_over(out / "distilled", this_run, part)
            if curve is None:
                child = load_child(data / "child", torch.float32, parent.device)  # the optimizer's masters
                sequences = corpus.sequences("train", settings.train_tokens, settings.seq_len, seed=f"gkd-{cfg.seed}")
                curve = gkd.distill(parent.model, child, sequences, settings, cfg.seed, work)
                save_child(child, parent.tokenizer, part)
                gkd.note_run(part, this_run, curve)
            child = load_child(part, parent.model.dtype, parent.device)  # as a user gets it, Trainer's wrappers off
            measured_by = fill(evaluation.Settings, cfg.evaluation)
            warn_if_elsewhere(solution, parent.model, cfg.hardware.serving)
            metrics = evaluation.measure(parent.model, child, corpus, solution.scenario, cfg.hardware.serving, measured_by)
            cards.write(part, parent, solution, metrics, HOW.format(settings.train_tokens, corpus.name), corpus.name)
        write_json(out / "plots" / "gkd_curve.json", curve)
        write_json(out / "metrics" / "distilled.json", metrics["child"])
    print(evaluation.table({"parent": metrics["parent"], "distilled": metrics["child"]}))


if __name__ == "__main__":
    run()
