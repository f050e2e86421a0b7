"""Distil the parent into the child as a whole, unless this very run has done so before; measure what came of it."""
from pathlib import Path

from puzzle_core import cards, evaluation, gkd, ranks
from puzzle_core.children import load_child
from puzzle_core.config import fill, plain, stage
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic, lock, read_json, write_json
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Solution, without_times


@stage("gkd", launches=True)
def run(cfg):
    data, out, settings = Path(cfg.data), Path(cfg.out), fill(gkd.Settings, cfg.gkd)
    with ranks.joined() as mine, lock(out, mine.tag("gkd")):
        solution = Solution.from_json(read_json(data / "chosen.json"))
        parent = fill(load_parent, cfg.parent, device=mine.device(pick_device(cfg.hardware.device)))
        corpus = Corpus(parent.tokenizer, plain(cfg.corpus))
        this_run = gkd.run_fingerprint(data / "child", settings, cfg.seed, parent.identity, corpus.fingerprint)
        with gkd.work_folder(out, this_run, mine) as work:
            where = (out / "distilled", data / "child", work, this_run)
            healed, curve = gkd.heal_once(*where, parent, corpus, settings, cfg.seed, mine)
            if mine.first:
                with atomic(out / "distilled") as part:
                    gkd.link(healed, part)
                    child = load_child(part, parent.model.dtype, parent.device)  # as a user gets it, Trainer's wrappers off
                    measured_by = fill(evaluation.Settings, cfg.evaluation)
                    metrics = evaluation.measure(parent.model, child, corpus, solution, cfg.hardware.serving, measured_by)
                    evaluation.record(part, metrics, parent.model, solution, cfg.hardware.serving)
                    cards.write(part, parent, solution, metrics, cards.DISTILLED.format(settings.num_tokens, corpus.name), corpus.name)
                write_json(out / "plots" / "gkd_curve.json", gkd.training_rows(curve))
                write_json(out / "plots" / "gkd_held_out.json", gkd.held_out_rows(curve))
                # in `dvc metrics show` it stands beside a parent that assemble timed; the one timed with it is in evaluation.json
                write_json(out / "metrics" / "distilled.json", without_times(metrics["child"]))
                print(evaluation.table({"parent": metrics["parent"], "distilled": metrics["child"]}))
                print(f"gkd: {gkd.kept(curve)}; {out}/distilled")


if __name__ == "__main__":
    run()
