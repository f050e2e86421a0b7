"""Distil the parent into the child as a whole; measure what was saved beside the parent."""
from pathlib import Path

import torch

from puzzle_core import evaluation, gkd
from puzzle_core.children import load_child, save_child
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Solution


@stage("gkd")
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(gkd.Settings, cfg.gkd)
    with lock(out, "gkd"):
        solution = Solution.from_json(read_json(data / "solution.json"))
        parent = fill(load_parent, cfg.parent, device=pick_device(cfg.hardware.device))
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        with gkd.work_folder(out, data / "child", settings, cfg.seed, parent.identity, corpus.fingerprint) as work:
            child = load_child(data / "child", torch.float32, parent.device)  # the optimizer's masters
            sequences = corpus.sequences("train", settings.train_tokens, settings.seq_len, seed=f"gkd-{cfg.seed}")
            curve = gkd.distill(parent.model, child, sequences, settings, cfg.seed, work)
            save_child(child, parent.tokenizer, out / "distilled")
            write_json(out / "plots" / "gkd_curve.json", curve)
            child = load_child(out / "distilled", parent.model.dtype, parent.device)  # as a user gets it, Trainer's wrappers off
            batches = corpus.batches("validation", **plain(cfg.evaluation.text), seed="evaluation")
            metrics = evaluation.measure(parent.model, child, batches, solution.scenario, cfg.evaluation.repeats)
            write_json(out / "metrics" / "distilled.json", metrics["child"])
    print(evaluation.table({"parent": metrics["parent"], "distilled": metrics["child"]}))


if __name__ == "__main__":
    run()
