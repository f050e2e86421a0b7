"""The study's page: everything that its small files say, brought together. What is missing is said to be missing."""
import collections
import math
import shlex
import statistics
from pathlib import Path

import pandas as pd

from benchmarks import demo
from benchmarks.study_children import (
    STAGES,
    all_diverged,
    architecture_of,
    brief_kls,
    brief_names,
    gkd_json,
    healing_of,
    needs_measuring,
    number_of,
    pool_of,
    rate_of,
    speed,
    tokens_of,
)
from benchmarks.study_rows import LIBRARIES, RETIRED, Asked, Row, Study, groups_of, today
from puzzle_core import gkd
from puzzle_core.config import fill, plain
from puzzle_core.files import read_json
from puzzle_core.realised import agreement, rank_correlations
from puzzle_core.spec import Workload, without_times

HEADINGS = {
    "mip": "Puzzle at each speed-up",
    "rivals": "Other ways to choose from the same library",
    "libraries": "The same search on a lesser library",
    "pool": "A pool whose children are measured, or healed briefly, before one is taken",
    "scores": "Another score than KL",
    "losses": "Losses of GKD",
    "rates": "Learning rates of GKD",
}
FITTED = 1.02  # a child counts as fitted up to so many times the speed-up that was asked for
TOGETHER = {"pool": ("pool", "tokens")}  # groups that share a heading
COLUMNS = ["speed-up predicted", "realised", "KL predicted", "before GKD", "training tokens", "after GKD", "perplexity", "same next token",
           "accuracy retained", "choosing, GKD, s"]  # fmt: skip


def write(study: Study) -> Path:
    """docs/results/NAME.json and NAME.md by the name of the study's folder, and README's block of that name, if any; the page's path.

    Of a study whose results are elsewhere, made of NAME.json as it is.
    """
    found = gathered(study) if study.results.exists() else read_json(json_of(study))
    if study.folder.name in HEADLINES:
        demo.write_into("README.md", study.folder.name, HEADLINES[study.folder.name](found))
    path = demo.save_result(study.folder.name, found).with_suffix(".md")
    path.write_text(page(found))
    return path


def json_of(study: Study) -> Path:
    return demo.ROOT / "docs" / "results" / f"{study.folder.name}.json"


def gathered(study: Study) -> dict:
    """All of the study as plain values: asked, commands, rows, libraries, additivity."""
    cfg, commands, of_rows, rate = study.cfg, study.all("commands"), rows(study), rate_of(study)
    healed, timed = study.all("healed"), study.all("speeds")
    return {
        "asked": read_json(study.results / "asked.json"),
        "workload": str(cfg.workload.batch_size) + f" × ({cfg.workload.prompt_len} + {cfg.workload.generation_len})",
        "serving": cfg.hardware.serving,
        "gkd_tokens": fill(gkd.Settings, cfg.gkd).num_tokens,
        "lr": rate or cfg.gkd.lr,
        "lr_from": "that of gkd.lr" if rate is None else "of those compared, on the MIP's own child, the one with the least KL",
        "tasks": plain(cfg.evaluation).get("tasks") or {},
        "machines": sorted({one["machine"] for one in healed + timed}),
        "versions": sorted({", ".join(f"{name} {version}" for name, version in one["versions"].items()) for one in healed + timed}),
        "per_gpu": sorted({one["per_gpu"] for one in healed}),
        "commands": commands,
        "stages": STAGES,
        "gpu_minutes": sum(one["seconds"] * one["gpus"] for one in commands) / 60,
        "parent_name": cfg.parent.get("id") or cfg.parent.get("path") or "the parent",
        "parent": next((one["parent"] for one in healed if "parent" in one), None),
        "parent_timed": min((one["parent"] for one in timed), key=lambda parent: parent["latency_ms"], default=None),
        "rows": of_rows,
        "foretold": foretold(of_rows, study.asked.compared_at),
        "libraries": libraries(study),
        "additivity": additivity(study),
    }


def rows(study: Study) -> list[dict]:
    return [row_of(study, row) for row in study.rows]


def missing(study: Study) -> dict[str, list[str]]:
    """What is not known yet, by the step that finds it out."""
    of_rows = rows(study)
    return {
        "heal": [row["name"] for row in of_rows if "missing" in row],
        "speeds": [row["name"] for row in of_rows if row.get("timed") is None],
        "joint": [row.name for row in study.rows if needs_measuring(study, row)]
        + [name for name in groups_of(study.asked) if not study.file("additivity", name).exists()],
    }


def row_of(study: Study, row: Row) -> dict:
    """What is known of a row; `missing` says what is not, and why."""
    known = {"name": row.name, "group": row.group, "title": row.title, "speedup_asked": row.speedup, "seed": row.seed}
    chosen, architecture = study.read("chosen", row.name), architecture_of(study, row)
    if chosen is None:
        return known | {"missing": "its library or the costs are not there, or nothing was chosen yet"}
    if not chosen["pool"]:
        return known | {"missing": "it found nothing that fits", "search_s": chosen["seconds"]}
    if architecture is None:
        why = "brief GKD of all its children diverged" if all_diverged(study, row) else "the pool's children were not all measured"
        why = f"{row.tokens_of}, whose tokens it trains on, was not chosen yet" if row.tokens_of else why
        return known | {"missing": why}
    predicted = chosen["pool"][number_of(study, row)]
    known |= {"search_s": chosen["seconds"], "predicted": without_times({k: v for k, v in predicted.items() if k != "architecture"})}
    known |= {"architecture": " | ".join(" ".join(layer.values()) for layer in predicted["architecture"])}
    known |= {"choosing_s": chosen["seconds"] + deciding_s(study, row)}
    known |= {"pool": pool(study, row, chosen["pool"]), "healing": healing_of(study, row, architecture), "gkd": gkd_json(study, row)}
    timed = speed(study, architecture)
    known |= {"tokens": tokens_of(study, row), "timed": timed and without_times(timed["child"])}  # both times: results/speeds/
    healed = study.read("healed", known["healing"])
    if healed is None:
        return known | {"missing": "not healed"}
    known |= {key: healed[key] for key in ("before", "after", "held_out", "seconds", "per_gpu", "machine", "stages") if key in healed}
    return known | ({"missing": healed["failed"]} if "failed" in healed else {})


def deciding_s(study: Study, row: Row) -> float:
    """Seconds of what decides which of the row's pool is taken: all joint KLs together, or each child's brief GKD; of no pool 0."""
    if row.method == "healed-pool":
        return sum(study.read("briefly", name)["took_s"] for name in brief_names(study, row))
    return study.read("pools", row.name)["took_s"] if len(pool_of(study, row)) > 1 else 0.0


def pool(study: Study, row: Row, chosen: list[dict]) -> list[dict] | None:
    """What is known of each of several architectures: variants that are not the parent's, sum of scores, joint KL, KL after brief GKD."""
    if len(chosen) < 2:
        return None
    taken, joint = number_of(study, row), (study.read("pools", row.name) or {"joint_kl": [None] * len(chosen)})["joint_kl"]
    briefly = brief_kls(study, row) if row.method == "healed-pool" else [None] * len(chosen)
    return [
        {
            "variants": variants(one["architecture"]),
            "predicted": one["kl"],
            "joint_kl": kl,
            "healed_kl": None if healed == math.inf else healed,
            "taken": number == taken,
        }
        for number, (one, kl, healed) in enumerate(zip(chosen, joint, briefly, strict=True))
    ]


def variants(layers: list[dict[str, str]]) -> str:
    """How often an architecture has each variant that is not the parent's."""
    counted = collections.Counter(f"{subblock} {variant}" for layer in layers for subblock, variant in layer.items() if variant != "parent")
    return ", ".join(f"{number} {name}" for name, number in counted.most_common()) or "the parent"


def libraries(study: Study) -> list[dict]:
    """Of each variant: its KL score in each library that is there, median over the layers, and the time that it takes."""
    kept, medians = study.results / "tables", {}
    for name in LIBRARIES:
        if (kept / name / "scores.parquet").exists():
            scores = study.table(name, "scores").query("metric == 'kl' and variant != 'parent'")
            medians[name] = scores.groupby(["subblock", "variant"])["value"].median()
    if medians and (kept / "costs" / "costs.parquet").exists():
        costs = study.table("costs", "costs").query("subblock != 'outside'")
        costs = costs[costs["scenario"] == str(fill(Workload, study.cfg.workload).scenario)]
        for metric in ("prefill_ms", "decode_ms"):
            medians[metric] = costs[costs["metric"] == metric].groupby(["subblock", "variant"])["value"].median()
    records = pd.DataFrame(medians).reset_index().to_dict("records") if medians else []
    return [{key: value for key, value in record.items() if pd.notna(value)} for record in records]


def additivity(study: Study) -> dict[str, dict]:
    """How well the sum of scores tells the joint KL: of each group of architectures, and of all together."""
    groups = {path.stem: read_json(path)["rows"] for path in sorted((study.results / "additivity").glob("*.json"))}
    groups = {name: [{**row, "ratio": row["realised"] / row["predicted"] if row["predicted"] else None} for row in rows]
              for name, rows in groups.items()}  # fmt: skip
    if groups:
        groups["all"] = [row for rows in groups.values() for row in rows]
    return {name: {**agreement(rows), "pairs": [[row["predicted"], row["realised"]] for row in rows]} for name, rows in groups.items()}


def page(found: dict) -> str:
    asked, rows, parent = found["asked"], found["rows"], found["parent"]
    at, counted = asked["compared_at"], [task for task in found["tasks"] if f"{task}_retained" in (parent or {})]
    two_splits = any(RETIRED in one["command"] for one in found["commands"])
    lines = [
        "# Study: is it the search that did it?", "",
        "Written by `python -m benchmarks.study page` from what the commands below wrote; the JSON file beside it has all figures, each "
        "row's architecture and curve.", "",
        f"- Workload: {found['workload']} (sequences × prompt + generated tokens), hardware.serving {found['serving']} (on a GPU auto is "
        "cuda_graph). Realised speed-ups are of each architecture with random weights, in turn with the parent, alone on a GPU.",
        f"- Machine: {', '.join(found['machines']) or 'none yet'}; {'; '.join(found['versions'])}. GPU time of all commands together: "
        f"{found['gpu_minutes']:.1f} minutes.",
        f"- GKD: {found['gkd_tokens']:,} tokens for each row; {asked['ablation_tokens']:,} where losses and learning rates are compared, "
        f"and for brief GKD. Learning rate {found['lr']:g}: {found['lr_from']}.",
        "- Training tokens of a row: its GKD's and, where brief GKD chooses among a pool, those of all its children. Where they differ "
        "from the first row's, the ratio stands beside them. BLD's are apart: rows share a library, and dropping whole layers needs none.",
        f"- KL to the parent in nats a token, on {'text held out from training' if two_splits else 'test text'}; "
        "predicted is the sum of the chosen variants' KL scores.",
        "- Accuracy retained: child over parent, each less chance, over the tasks on which the parent is two standard errors above chance: "
        f"{', '.join(counted) or 'none'}. Asked were {', '.join(found['tasks']) or 'none'}.",
        "- ± is one standard error, over the text's sequences or the questions.",
        "- Seconds of choosing are those of the search and of what decides in a pool: its joint KLs, or brief GKD of each. Seconds of GKD, "
        f"of brief GKD too, are of {' or '.join(map(str, found['per_gpu'])) or 'no'} processes on each GPU at once.", "",
    ]  # fmt: skip
    if parent is not None:
        timed = found["parent_timed"]
        speed = f", {timed['throughput_tokens_per_s']:,.0f} generated tokens/s in the fastest of its timings" if timed else ""
        lines += [f"Parent: perplexity {parent['perplexity']:.4g}{speed}.", ""]
    missing = [row for row in rows if "missing" in row]
    lines += [f"{len(rows) - len(missing)} of {len(rows)} rows are there." + (" Missing ones say why." if missing else ""), ""]
    lines += history(rows, found["stages"])
    lines += in_short(rows, at)
    for group, heading in HEADINGS.items():
        mine = [row for row in rows if row["group"] in TOGETHER.get(group, (group,))]
        if not mine:
            continue
        where = "" if group == "mip" else f", at a speed-up of {at:g}"
        lines += [f"## {heading}{where}", ""]
        lines += table(["row", *COLUMNS], [cells(row, rows) for row in (mine if group in ("mip", "losses", "rates") else [rows[0], *mine])])
        lines += seeds(mine) if group == "mip" else pools(mine, asked) if group == "pool" else []
    lines += foretold_lines(found["foretold"]) + accuracies(rows, parent)
    lines += library_lines(found["libraries"]) + additivity_lines(found["additivity"], asked)
    lines += ["## Commands", "", f"As one command: `{as_one_command(asked, found['per_gpu'])}`.", ""]
    if two_splits:
        lines += [f"The study was made when a corpus had two splits: {RETIRED} is development_fraction and test_fraction today.", ""]
    lines += ["It was made by these:", ""]
    commands = [[f"`{one['command']}`", f"{one['seconds'] / 60:.1f}", str(one["gpus"]), one.get("note", "")] for one in found["commands"]]
    return "\n".join(lines + table(["command", "minutes", "GPUs", "note"], commands)).rstrip() + "\n"


def as_one_command(asked: dict, per_gpu: list[int]) -> str:
    """The command that asks for all of the study anew, with as many processes on a GPU at most."""
    others = {key: value for key, value in asked.items() if key != "overrides" and value != getattr(Asked(), key)}
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in others.items()}
    options = [word for key, text in texts.items() for word in (f"--{key.replace('_', '-')}", text)]
    start = ["python", "-m", "benchmarks.study", "all", "--out", "study", "--per-gpu", str(max(per_gpu, default=1))]
    return shlex.join([*start, *options, *today(asked["overrides"])])


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def label(row: dict) -> str:
    return f"{row['title']}, {row['speedup_asked']:g} ×, seed {row['seed']}" if row["group"] == "mip" else row["title"]


def cells(row: dict, rows: list[dict]) -> list[str]:
    """One line of a table; a row whose child is that of an earlier one says so."""
    name, predicted = label(row), row.get("predicted")
    same = next((other for other in rows if "healing" in row and other.get("healing") == row["healing"]), row)
    if same["name"] != row["name"]:
        name += f" (the same child as {label(same)})"
    if predicted is None:
        return [name, f"missing: {row['missing']}", *[""] * (len(COLUMNS) - 1)]
    known = [name, f"{predicted['speedup']:.2f} ×"]
    if "after" not in row:
        before = f"{row['before']['kl']:.4f}" if "before" in row else ""
        return [*known, f"missing: {row['missing']}", f"{predicted['kl']:.4f}", before, f"{row['tokens']:,}", *[""] * (len(COLUMNS) - 5)]
    times = row["tokens"] / rows[0].get("tokens", row["tokens"])
    after, realised = row["after"], f"{row['timed']['speedup']:.2f} ×" if row["timed"] else "not timed"
    return [
        *known, realised, f"{predicted['kl']:.4f}", _with_error(row["before"], "kl", "{:.4f}"),
        f"{row['tokens']:,}" + ("" if times == 1 else f" ({times:.2g} ×)"),
        _with_error(after, "kl", "{:.4f}") if row["gkd"] else "not trained", f"{after['perplexity']:.2f}", f"{after['top1_agreement']:.1%}",
        _with_error(after, "accuracy_retained", "{:.1%}"), f"{row['choosing_s']:.1f}, {row['seconds']['heal']:.0f}",
    ]  # fmt: skip


def _with_error(values: dict, name: str, form: str) -> str:
    if name not in values:
        return ""
    return f"{form.format(values[name])} ± {form.format(values[f'{name}_stderr'])}"


def best_other(rows: list[dict]) -> dict | None:
    """The rival whose child, another than the MIP's in the first row, has the least KL."""
    others = [row for row in rows if row["group"] == "rivals" and "after" in row and row["healing"] != rows[0]["healing"]]
    return min(others, key=lambda row: row["after"]["kl"], default=None)


def same_child(rows: list[dict]) -> list[str]:
    """The rivals that chose the child of the first row."""
    return [row["title"] for row in rows if row["group"] == "rivals" and row.get("healing") == rows[0]["healing"]]


def in_short(rows: list[dict], at: float) -> list[str]:
    """What was aimed at beside what came of it, as far as it is known."""
    mine, best, lines = rows[0], best_other(rows), []
    if "after" not in mine:
        return []
    kl, budget = mine["after"]["kl"], mine["tokens"]
    if "accuracy_retained" in mine["after"]:
        lines.append(f"- Accuracy over chance retained at {at:g} ×: {_with_error(mine['after'], 'accuracy_retained', '{:.1%}')}; aim 95 %.")
    lines.append(f"- KL after {budget:,} tokens of GKD at {at:g} ×: {kl:.4f}; aim 25 % less than the best rival's.")
    if same := same_child(rows):
        lines.append(f"- The very child that the MIP chose was chosen by: {', '.join(same)}. Its KL is 0 % less than theirs.")
    if best:
        least = best["after"]["kl"]
        lines.append(f"- The best of the rivals' other children ({best['title']}): KL {least:.4f}; the MIP's is {_less(kl, least)}.")
    for row in (row for row in rows if row["group"] == "pool" and "after" in row and row["healing"] != mine["healing"]):
        of_pool, kept = row["after"]["kl"], _with_error(row["after"], "accuracy_retained", "{:.1%}")
        known = f"KL {of_pool:.4f} after {row['tokens']:,} tokens in all, {_less(of_pool, kl)} than the MIP's"
        if row["tokens"] != budget:
            known += f" after {budget:,}; {_as_many(row, rows)}"
        lines.append(f"- The {label(row)}: {known}{kept and f'; accuracy over chance retained {kept}'}.")
    alike = [row for row in rows if row["speedup_asked"] == at and "after" in row and row["gkd"]]
    if (nearest := min(alike, key=lambda row: row["after"]["kl"]))["healing"] != mine["healing"]:
        what = f"{label(nearest)}, {nearest['tokens']:,} tokens"
        lines.append(f"- The least KL after GKD of all children at {at:g} ×: {nearest['after']['kl']:.4f} ({what}).")
    return [*lines, ""] if lines else []


def _as_many(row: dict, rows: list[dict]) -> str:
    """What the MIP's own child made of as many training tokens as the row took."""
    same = _with_as_many(row, rows)
    return "the MIP's own child with as many: " + (f"KL {same['after']['kl']:.4f}" if same else "not measured")


def _with_as_many(row: dict, rows: list[dict]) -> dict | None:
    """The row of the MIP's own child that trained on as many tokens as `row` took."""
    return next((one for one in rows if one["group"] == "tokens" and "after" in one and one["tokens"] == row["tokens"]), None)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def history(rows: list[dict], stages: dict[str, int]) -> list[str]:
    """Which rows another version of the stages made: their figures and those of this version are not to be compared."""
    old = [row["name"] for row in rows if "after" in row and row.get("stages") != stages]
    if not old:
        return []
    now = ", ".join(f"{name} {number}" for name, number in stages.items())
    which = f"all {len(old)}" if len(old) == sum("after" in row for row in rows) else ", ".join(old)
    text = f"Of the rows that are there, {which} were made by an earlier version of the stages; this one is {now}. Versions differ in how "
    return [text + "text is split and variants are trained, scored and timed: rows of different versions are not to be compared.", ""]


def _less(value: float, other: float) -> str:
    return f"{abs(1 - value / other):.1%} {'less' if value < other else 'more'}"


def headline(found: dict) -> str:
    """The study in a few lines, for the README; nothing before its first child is healed and timed."""
    mine, best = found["rows"][0], best_other(found["rows"])
    if "after" not in mine or mine["timed"] is None:
        return ""
    after, kept, rows = mine["after"], _with_error(mine["after"], "accuracy_retained", "{:.1%}"), found["rows"]
    lines = [
        f"[The study](docs/results/study.md): a child of {found['parent_name']}, asked to be {mine['speedup_asked']:g} × as fast, is "
        f"{mine['timed']['speedup']:.2f} × as fast on {' and '.join(found['machines'])}.",
        f"It keeps {kept} of its parent's accuracy over chance." if kept else "",
        f"Its KL to the parent is {after['kl']:.3f} after {mine['tokens']:,} tokens of GKD.",
    ]
    if same := same_child(rows):
        lines.append(_sentence(f"{' and '.join(same)} chose the same child."))
    if best:
        ends = f"ends at {best['after']['kl']:.3f} after {best['tokens']:,} tokens"
        lines.append(f"The best other child of a rival ({best['title']}) {ends}.")
    for row in rows:
        if row["name"] == "healed-pool" and "after" in row and row["healing"] != mine["healing"]:
            lines.append(f"The {label(row)} ends at {row['after']['kl']:.3f} after {row['tokens']:,} tokens in all.")
            alike = _with_as_many(row, rows)
            lines.append(f"The MIP's own child ends at {alike['after']['kl']:.3f} after as many." if alike else
                         "This study did not give the MIP's own child as many.")  # fmt: skip
    if history(rows, found["stages"]):
        lines.append("An earlier version of the stages made these rows.")
    lines.append(f"All of the study took {found['gpu_minutes']:.0f} GPU minutes. Written by `python -m benchmarks.study page --out study`.")
    return " ".join(filter(None, lines))


def equal_tokens(found: dict) -> str:
    """A healed pool beside the MIP's own child on as many tokens, for the README; nothing before both are there."""
    rows = found["rows"]
    mine, pool = rows[0], next((row for row in rows if row["name"] == "healed-pool" and "after" in row), None)
    alike = pool and _with_as_many(pool, rows)
    if "after" not in mine or not alike:
        return ""
    kl, of_pool = alike["after"]["kl"], pool["after"]["kl"]
    verdict = "loses to" if kl < of_pool else "beats"
    lines = [
        f"At equal tokens a pool {verdict} the MIP's own child ([baselines](docs/results/baselines.md), on "
        f"{' and '.join(found['machines'])}, at {mine['speedup_asked']:g} ×, one seed each).",
        f"After {pool['tokens']:,} training tokens the MIP's own child has a KL of {kl:.3f}. A pool of {len(pool['pool'])} that "
        f"took as many, those of brief GKD included, has {of_pool:.3f}.",
        f"After {mine['tokens']:,} tokens the MIP's child has {mine['after']['kl']:.3f}.",
    ]
    depths = [row for row in rows if row["name"].startswith("depth-") and row.get("tokens") == mine["tokens"] and "after" in row]
    if depths:
        best = min(depths, key=lambda row: row["after"]["kl"])
        lines.append(f"The best child by measured depth ({best['title']}) has {best['after']['kl']:.3f} after as many.")
    if history(rows, found["stages"]):
        lines.append("An earlier version of the stages made these rows.")
    return " ".join([*lines, "Written by `python -m benchmarks.study page --out baselines`."])


HEADLINES = {"study": headline, "baselines": equal_tokens}  # by the study's folder: README's block of that name


def seeds(rows: list[dict]) -> list[str]:
    """Mean and standard deviation over the seeds of GKD, where there are several."""
    lines = []
    for speedup in sorted({row["speedup_asked"] for row in rows}):
        kls = [row["after"]["kl"] for row in rows if row["speedup_asked"] == speedup and "after" in row]
        if len(kls) > 1:
            mean, spread = statistics.mean(kls), statistics.stdev(kls)
            lines.append(f"- {speedup:g} ×: KL after GKD {mean:.4f}, standard deviation over {len(kls)} seeds {spread:.4f}.")
    return [*lines, ""] if lines else []


def pools(rows: list[dict], asked: dict) -> list[str]:
    lines = []
    for row in (row for row in rows if row.get("pool")):
        known, healed = [], [one for one in row["pool"] if one["healed_kl"] is not None]
        text = f"{len(row['pool'])} solutions of {asked['pool']} asked for, found in {row['search_s']:.1f} s. Joint KL before GKD"
        text += f", and KL after {asked['ablation_tokens']:,} tokens of GKD each" if healed else ""
        lines += [f"{label(row)}: {text}; on other text than the rows' KL.", ""]
        for one in row["pool"]:
            kls = ("" if one[name] is None else f"{one[name]:.4f}" for name in ("predicted", "joint_kl", "healed_kl"))
            known.append([one["variants"], *kls, "taken" if one["taken"] else ""])
        lines += table(["variants", "sum of scores", "joint KL", "KL after brief GKD", ""], known)
        for some, of in ((healed, "all"), (sorted(healed, key=lambda one: one["predicted"])[: len(healed) // 2], "the half of least sums")):
            if len(some) > 2:
                told = rank_correlations(pd.DataFrame(some)[["predicted", "joint_kl", "healed_kl"]], "healed_kl")
                told = f"{told['predicted']:.2f} of the sum of scores, {told['joint_kl']:.2f} of the joint KL"
                lines += [f"Rank correlation with the KL after brief GKD, over {of}: {told}.", ""]
    return lines


def foretold(rows: list[dict], at: float) -> dict[str, dict[str, float | int]]:
    """How well the KL after GKD is told by what is known earlier: Spearman's rank correlation over distinct children of whole GKD.

    Over all of them, and over those that were fitted to the speed-up `at`, which is what a choice is made of; not over fewer than 3. The
    held-out KL during GKD is that of the same run's first look, where there is one before the last.
    """
    others = ("losses", "rates", "tokens")  # with fewer tokens, or more
    distinct = {row["healing"]: row for row in rows if "after" in row and row["seed"] == 0 and row["group"] not in others}
    fitted = [row for row in distinct.values() if at <= row["predicted"]["speedup"] <= FITTED * at]
    groups = {
        "all": list(distinct.values()),
        f"{at:g} × to {FITTED * at:g} × as fast": fitted,
        "of these, from the whole library": [row for row in fitted if row["group"] != "libraries"],
    }
    return {name: _rank_correlations(some) for name, some in groups.items() if len(some) > 2}


def _rank_correlations(rows: list[dict]) -> dict[str, float | int]:
    known = pd.DataFrame(
        {
            "sum of scores": row["predicted"]["kl"],
            "joint KL before GKD": row["before"]["kl"],
            "held-out KL at the first look during GKD": row["held_out"][1]["held_out_kl"] if len(row["held_out"]) > 2 else None,
            "after": row["after"]["kl"],
        }
        for row in rows
    )
    return {"children": len(rows), **rank_correlations(known, "after").dropna().to_dict()}


def foretold_lines(groups: dict[str, dict[str, float | int]]) -> list[str]:
    if not groups:
        return []
    names = list(dict.fromkeys(name for told in groups.values() for name in told))
    known = [[group, *(f"{told[name]:.3g}" if name in told else "" for name in names)] for group, told in groups.items()]
    text = "Rank correlation of the KL after GKD with what is known before, over different children that GKD healed with all its tokens."
    return ["## What tells the KL after GKD", "", text, "", *table(["of", *names], known)]


def accuracies(rows: list[dict], parent: dict | None) -> list[str]:
    names = [key.removesuffix("_accuracy") for key in parent or {} if key.endswith("_accuracy")]
    if not names:
        return []
    asked = [("parent", parent), *((label(row), row["after"]) for row in rows if "after" in row)]
    lines = [[title, *(_with_error(values, f"{name}_accuracy", "{:.3f}") for name in names)] for title, values in asked]
    chances = ["chance", *(f"{parent[f'{name}_chance']:.3f}" for name in names)]
    return ["## Accuracies", "", *table(["row", *names], [chances, *lines])]


def library_lines(medians: list[dict]) -> list[str]:
    if not medians:
        return []
    forms = {**{name: "{:.4f}" for name in LIBRARIES}, "prefill_ms": "{:.3f}", "decode_ms": "{:.4f}"}
    names = [name for name in forms if any(name in row for row in medians)]
    known = [[f"{row['subblock']} {row['variant']}", *(forms[n].format(row[n]) if n in row else "" for n in names)] for row in medians]
    text = "KL score in each library, median over the layers; where costs are known, milliseconds of a prefill and of a decode step."
    return ["## Variants", "", text, "", *table(["variant", *names], known)]


def additivity_lines(groups: dict[str, dict], asked: dict) -> list[str]:
    lines = ["## How well the sum of scores tells the joint KL", ""]
    if missing := [name for name in groups_of(Asked(**asked)) if name not in groups]:
        lines += [f"Missing: {', '.join(missing)}.", ""]
    if not groups:
        return lines
    forms = {"num_architectures": "{}", "spearman": "{:.3f}", "median_ratio": "{:.2f}"}
    known = [[name, *("" if of[key] is None else form.format(of[key]) for key, form in forms.items())] for name, of in groups.items()]
    return lines + table(["architectures", "number", "rank correlation", "median joint KL / sum"], known)
