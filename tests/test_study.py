"""The study's script, from libraries to page: what it does once, what it goes on with, and what it says is missing."""
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ENVIRONMENT, EXCERPT, PICO, architecture, pico_parent, quick_starts
from test_search import SCENARIO, make_tables

from benchmarks import demo, study, study_children, study_page, study_rows
from puzzle_core import evaluation, realised, rivals
from puzzle_core.children import make_child
from puzzle_core.config import ROOT
from puzzle_core.constraints import constraints_from
from puzzle_core.corpus import Corpus
from puzzle_core.files import write_json
from puzzle_core.problem import Problem
from puzzle_core.spec import CLOCKED, NO_OP, Architecture
from puzzle_core.tasks import Answers

ROWS = ("mip-1.2-0", "mip-1.2-1", "greedy", "initialised", "unrefitted", "depth-alone", "depth-run", "depth-iterative", "pool",
        "healed-pool", "mip-1.2-tokens", "losses-none", "losses-lm", "rate-0.001", "rate-0.004")  # fmt: skip
ASKED = [
    "--rows", ",".join(ROWS),
    "--seeds", "2", "--speedups", "1.2", "--compared-at", "1.2", "--pool", "3", "--ablation-tokens", "256", "--random", "4",
    "--frontier", "3", "--rates", "1e-3,4e-3", *[preset for preset in PICO if preset != "hardware=cpu"], "hardware=h100",
    f"corpus.path={EXCERPT['path']}", "evaluation.repeats=1", "+evaluation.tasks.sample={path:data/questions/sample.jsonl}",
    "evaluation.text={num_tokens:512,seq_len:64,batch_size:4}", "gkd.train_tokens=512",
    "gkd.eval_tokens=0",  # else so few steps, which do harm, would be taken back, and rows have one child
    "score.questions=null", "score.metrics=[kl]", "rivals.rl_steps=40", "search.pool_distance=1",
]  # fmt: skip


class Guesser:
    """Stands in for an exam: importing lm-eval takes seconds. Its parent is always right, its children every second time."""

    def __init__(self, tasks: list, batch_size: int):
        self.tasks = tasks

    def ask(self, model, tokenizer) -> dict[str, Answers]:
        right_N = np.ones(8) if "Puzzle" not in type(model).__name__ else np.arange(8.0) % 2
        return {task.name: Answers(right_N, 0.25) for task in self.tasks}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of the small files of a study of few rows, whose page does not go into the docs."""
    quick_starts()
    monkeypatch.setattr(study, "PYTHON", shutil.which("python", path=ENVIRONMENT["PATH"]))
    monkeypatch.setattr(study, "devices", lambda: [None])
    monkeypatch.setattr(study, "LIBRARIES", {"full": [], "initialised": ["bld.train_tokens=0"]})
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(evaluation, "Exam", Guesser)
    return tmp_path / "study" / "results"


def step(results, name: str, *more: str) -> None:
    study.main([name, "--out", str(results.parent), *more])


def test_a_study_from_libraries_to_page(results, tmp_path, capsys, monkeypatch):
    times = {name: {"speedup": s, "latency_ms": 30 / s, "throughput_tokens_per_s": s} for name, s in (("parent", 1.0), ("child", 1.25))}
    monkeypatch.setattr(study_children, "side_by_side", lambda *models, **how: times)  # on a busy machine few of them would count
    step(results, "libraries", *ASKED)
    step(results, "choose")
    step(results, "parent")
    step(results, "heal", "--minutes", "0")
    assert not list(results.glob("healed/*"))
    step(results, "heal")
    assert "heal: unrefitted, depth-alone, depth-run, depth-iterative, pool; speeds: mip-1.2-0, " in capsys.readouterr().out
    step(results, "joint")
    step(results, "speeds")
    step(results, "heal")
    first = list(results.glob("healed/*"))
    shutil.rmtree(results.parent / "full")
    step(results, "libraries")
    assert not (results.parent / "full").exists()  # nothing that is left to do needs it
    assert "missing of heal: unrefitted; speeds: unrefitted; joint: nothing" in capsys.readouterr().out
    lost = next(path for path in first if json.loads(path.read_text())["row"] == "losses-lm")
    before = json.loads(lost.read_text())
    lost.unlink()
    step(results, "libraries")
    kept, made = (pd.read_parquet(folder / "full/library.parquet") for folder in (results / "tables", results.parent))
    assert 0 < len(made) < len(kept)  # the variants of one row's child
    step(results, "heal")
    assert json.loads(lost.read_text())["after"] == before["after"]
    (results / "pools" / "healed-pool.json").unlink()
    step(results, "libraries")  # more variants than are there: of those whose joint KL is not known any more
    assert len(made) <= len(pd.read_parquet(results.parent / "full/library.parquet")) <= len(kept)
    step(results, "joint")
    assert (results / "pools" / "healed-pool.json").exists()
    step(results, "page")
    written = json.loads((tmp_path / "docs/results/study.json").read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert set(rows) == set(ROWS) and "not there" in rows["unrefitted"]["missing"]
    done = [row for row in rows.values() if "after" in row]
    assert len({row["healing"] for row in done}) == len(first) < len(done)
    mip, other_seed, untrained = (rows[name] for name in ("mip-1.2-0", "mip-1.2-1", "losses-none"))
    assert mip["before"] == other_seed["before"] and mip["after"]["kl"] != other_seed["after"]["kl"]
    assert untrained["after"]["kl"] == mip["before"]["kl"] and untrained["gkd"] is None
    assert rows["losses-lm"]["gkd"] | {"train_tokens": 512, "kl_weight": 1.0, "cosine_weight": 1.0, "lm_weight": 0.0} == mip["gkd"]
    healed = {path.stem: json.loads(path.read_text()) for path in results.glob("healed/*.json")}
    best = min((rows["rate-0.001"], rows["rate-0.004"]), key=lambda row: healed[row["healing"]]["development_kl"])
    assert mip["gkd"] == best["gkd"] | {"train_tokens": 512} and written["lr"] == best["gkd"]["lr"]
    assert mip["after"]["accuracy_retained"] == pytest.approx((0.5 - 0.25) / (1 - 0.25))
    assert mip["timed"]["speedup"] == 1.25 and mip["timed"] == other_seed["timed"] and "latency_ms" not in mip["after"]
    assert mip["predicted"]["speedup"] >= 1.2 and len(rows["pool"]["pool"]) == 3
    brief = [one["healed_kl"] for one in rows["healed-pool"]["pool"]]
    assert min(brief) > 0 and [one["taken"] for one in rows["healed-pool"]["pool"]] == [kl == min(brief) for kl in brief]
    assert all(one["healed_kl"] is None for one in rows["pool"]["pool"])
    took_s = sum(json.loads(path.read_text())["took_s"] for path in results.glob("briefly/*"))
    assert rows["healed-pool"]["choosing_s"] == rows["healed-pool"]["search_s"] + took_s > took_s > 0
    assert rows["pool"]["choosing_s"] > rows["pool"]["search_s"] and mip["choosing_s"] == mip["search_s"]
    assert [written["additivity"][name]["num_architectures"] for name in ("random-1.2", "frontier", "all")] == [4, 3, 7]
    depths = {name: rows[f"depth-{name}"]["architecture"] for name in ("alone", "run", "iterative")}
    assert all(set(one.split(" | ")) == {"parent parent", "no_op no_op"} for one in depths.values())
    pooled, alike = rows["healed-pool"], rows["mip-1.2-tokens"]
    assert pooled["tokens"] == alike["tokens"] == alike["gkd"]["train_tokens"] == 512 + 2 * 256 and alike["before"] == mip["before"]
    assert {row["name"]: row["tokens"] for row in done if row["tokens"] != 512} == {
        "healed-pool": 1024, "mip-1.2-tokens": 1024, "losses-none": 0, "losses-lm": 256, "rate-0.001": 256, "rate-0.004": 256,
    }  # fmt: skip
    page = (tmp_path / "docs/results/study.md").read_text()
    for row in done:  # as many tokens as the first, or the ratio stands beside them
        flagged = {512: "| 512 |", 1024: "| 1,024 (2 ×) |", 256: "| 256 (0.5 ×) |", 0: "| 0 (0 ×) |"}[row["tokens"]]
        assert any(f"| {study_page.label(row)}" in line and flagged in line for line in page.split("\n")), row["name"]
    kl = f"{alike['after']['kl']:.4f}"
    assert study_page._as_many(pooled, written["rows"]) == f"the MIP's own child with as many: KL {kl}" and kl in page
    assert "earlier version" not in page
    assert "after 512 tokens of GKD" in (tmp_path / "README.md").read_text()
    assert not any(set(CLOCKED) & set(row[kind]) for row in done for kind in ("timed", "predicted"))
    assert rows["greedy"]["healing"] == mip["healing"] and "The very child that the MIP chose was chosen by: greedy." in page
    assert "14 of 15 rows" in page and "Missing: " not in page and "(the same child as" in page
    assert f"asked to be 1.2 × as fast, is {mip['timed']['speedup']:.2f} × as fast" in (tmp_path / "README.md").read_text()


def test_layers_that_are_dropped_by_what_their_children_lose_are_those_of_brute_force(tmp_path):
    parent = pico_parent(num_hidden_layers=6)
    corpus, text = Corpus(parent.tokenizer, EXCERPT), realised.Settings(num_tokens=256, seq_len=64, batch_size=2)
    batches = corpus.batches("train", 256, 64, 2, seed="any")

    def loss(dropped) -> float:
        layers = ["no_op no_op" if layer in dropped else "parent parent" for layer in range(6)]
        return evaluation.compare(parent.model, make_child(parent, architecture(*layers), None), batches)["child"]["kl"]

    alone = [loss([layer]) for layer in range(6)]
    kinds = ["parent", "no_op"]
    misled = {layer: rank for rank, layer in enumerate(sorted(range(6), key=lambda layer: -alone[layer]))}  # scores in the wrong order
    scores, costs = make_tables(6, kinds, kinds, lambda layer, *_: 1.0 + misled[layer], lambda subblock, k, metric: float(k == 0))
    problem = Problem.from_tables(scores, costs, "kl", SCENARIO)
    constraints = constraints_from({"params_fraction": 7 / 13}, problem)  # three of six layers, and what is outside

    def measured(architectures: list[Architecture]) -> list[float]:
        return realised.joint_kl(parent, architectures, None, batches, text)

    def dropped(method: str) -> set[int]:
        found = rivals.measured(method, problem, constraints, rivals.Settings(), measured)
        return {layer for layer, pair in enumerate(found.layers) if pair == (NO_OP, NO_OP)}

    assert dropped("depth-alone") == set(sorted(range(6), key=lambda layer: alone[layer])[:3])
    assert dropped("depth-run") == set(min((range(first, first + 3) for first in range(4)), key=loss))
    greedily: list[int] = []
    for _ in range(3):
        greedily.append(min(set(range(6)) - set(greedily), key=lambda layer: loss([*greedily, layer])))
    assert dropped("depth-iterative") == set(greedily)
    by_scores = next(entry for entry in rivals.compete(problem, constraints, rivals.Settings(rl_steps=1)) if entry.method == "depth")
    assert measured([by_scores.architecture])[0] > 1.1 * loss(greedily)
    impossible = constraints_from({"params_fraction": 0.01}, problem)
    assert all(rivals.measured(name, problem, impossible, rivals.Settings(), measured) is None for name in rivals.MEASURED)


@pytest.mark.parametrize("name", ["study", "baselines"])
def test_a_page_and_the_block_in_the_readme_are_those_of_the_json_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "docs/results").mkdir(parents=True)
    shutil.copy(ROOT / f"docs/results/{name}.json", tmp_path / "docs/results")
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    demo.write_into("README.md", name, "")
    study.main(["page", "--out", str(tmp_path / name)])
    assert (tmp_path / "README.md").read_text() == text
    for file in (f"docs/results/{name}.md", f"docs/results/{name}.json"):
        assert (tmp_path / file).read_text() == (ROOT / file).read_text()
    with pytest.raises(SystemExit):
        study.main(["page", "--out", str(tmp_path / "neither")])


def test_the_readme_says_who_wins_at_equal_tokens():
    found = json.loads((ROOT / "docs/results/baselines.json").read_text())
    kl = {row["name"]: row["after"]["kl"] for row in found["rows"]}
    said = study_page.equal_tokens(found)
    assert kl["mip-1.5-tokens"] < kl["healed-pool"] and said.startswith("At equal tokens a pool loses to the MIP's own child")
    for name in ("mip-1.5-0", "mip-1.5-tokens", "healed-pool", "depth-iterative"):
        assert f"{kl[name]:.3f}" in said, name
    pool = next(row for row in found["rows"] if row["name"] == "healed-pool")
    pool["after"]["kl"] = kl["mip-1.5-tokens"] / 2
    assert study_page.equal_tokens(found).startswith("At equal tokens a pool beats the MIP's own child")
    pool["tokens"] += 1  # the MIP's child had fewer
    assert study_page.equal_tokens(found) == ""
    del found["rows"][0]["after"]
    assert study_page.equal_tokens(found) == study_page.headline(found) == ""


def test_a_page_says_by_which_keys_an_older_command_is_given_today():
    old, new = (json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in ("study", "baselines"))
    said = "validation_fraction is development_fraction and test_fraction today"
    assert said in study_page.page(old) and said not in study_page.page(new)
    command = study_page.as_one_command(old["asked"], old["per_gpu"])
    assert "corpus.development_fraction=0.03 corpus.test_fraction=0.03" in command and "validation" not in command


def test_text_is_read_again_in_another_order_where_a_row_trains_on_more_tokens(pico):
    corpus = Corpus(pico.tokenizer, EXCERPT)
    again = study_children.ReadAgain(corpus, epoch_tokens=1024)
    one, more = (again.sequences("train", tokens, 64, seed="gkd-0") for tokens in (1024, 2560))
    assert (one == corpus.sequences("train", 1024, 64, seed="gkd-0")).all() and (more[:16] == one).all() and more.shape == (40, 64)
    assert (more[16:32] != one).any() and (more[16:24] != more[32:]).any()


def test_only_the_rows_that_are_named_are_made_beside_the_first():
    asked = study_rows.Asked(rows=["healed-pool", "mip-1.5-tokens", "depth-run"])
    assert [row.name for row in study_rows.rows_of(asked)] == ["mip-1.5-0", "depth-run", "healed-pool", "mip-1.5-tokens"]
    with pytest.raises(ValueError, match="no row 'depth-runs'. Did you mean 'depth-run'"):
        study_rows.rows_of(study_rows.Asked(rows=["depth-runs"]))
    with pytest.raises(ValueError, match="mip-1.5-tokens trains on as many tokens as healed-pool, which is not among the rows"):
        study_rows.rows_of(study_rows.Asked(rows=["mip-1.5-tokens"]))
    assert study_rows.groups_of(study_rows.Asked(random=0, frontier=0)) == {}


def test_rows_of_an_earlier_version_of_the_stages_are_named():
    stages = {"old": {}, "older": {"stages": {"gkd": 2}}, "new": {"stages": {"gkd": 3}}}
    rows = [{"name": name, "after": {}, **known} for name, known in stages.items()]
    assert "old, older were made by an earlier version" in study_page.history([*rows, {"name": "none"}], {"gkd": 3})[0]
    assert "all 2 were made" in study_page.history(rows[:2], {"gkd": 3})[0] and study_page.history(rows[2:], {"gkd": 3}) == []


def test_two_workers_on_a_device_go_on_where_killed_ones_stopped(results, capfd):
    step(results, "libraries", *ASKED, "evaluation.tasks=null")
    step(results, "choose")
    step(results, "heal", "--per-gpu", "2", "--minutes", "0.02")
    step(results, "speeds", "--minutes", "0.02")
    out = capfd.readouterr().out
    assert "heal: stopped before its end" in out and "speeds: stopped before its end" in out
    assert not [*results.glob("healed/*.json"), *results.glob("speeds/*.json")]
    step(results, "heal", "--per-gpu", "2")
    out = capfd.readouterr().out
    assert "missing of heal: unrefitted, depth-alone, depth-run, depth-iterative, pool; speeds: mip-1.2-0" in out
    healed = [json.loads(file.read_text()) for file in results.glob("healed/*.json")]
    assert len(healed) == out.count("healed ") and {one["per_gpu"] for one in healed} == {2}  # each by one of them
    step(results, "all", "--minutes", "5")
    out = capfd.readouterr().out  # a speed does not count where another program was on the machine
    assert "heal: unrefitted; speeds: unrefitted" in out and "; joint: nothing" in out


def test_a_row_is_begun_only_where_it_can_end(monkeypatch):
    monkeypatch.setattr(study_children.time, "time", lambda: 140.0)
    turn = study_children.Turn(until=200.0, start=100.0)
    assert turn.allows([10.0, 59.0]) and not turn.allows([10.0, 60.0])
    assert turn.allows([])  # of an unknown length: 60 seconds are left, 40 have gone by
    assert not study_children.Turn(until=170.0, start=100.0).allows([])


def test_a_time_does_not_count_where_the_parent_was_slower_than_at_best(tmp_path):
    begun, one, other = study_rows.Study(tmp_path), Architecture.uniform(2), Architecture.uniform(3)
    assert study_children.speed(begun, one) is None

    def timed(architecture: Architecture, parent_ms: float, machine: str = "some GPU") -> bool:
        times = {"parent": {"latency_ms": parent_ms}, "machine": machine, "versions": {"torch": "2"}}
        write_json(begun.file("speeds", study_children.speed_of(architecture)), times)
        return study_children.speed(begun, architecture) is not None

    assert timed(other, 100.0) and timed(one, 104.0) and not timed(one, 106.0)
    assert timed(one, 106.0, "another GPU") and study_children.speed(begun, other) is not None


def test_a_pool_whose_children_all_diverge_is_settled_and_the_page_says_so(tmp_path, monkeypatch):
    begun = study_rows.Study(tmp_path)
    begun.ask({"overrides": []})
    row = next(row for row in begun.rows if row.name == "healed-pool")
    kls = [math.inf, None]
    monkeypatch.setattr(study_children, "brief_kls", lambda study, row: kls)
    solution = {"kl": 0.1, "speedup": 1.5, "architecture": Architecture.uniform(2).to_json()}
    write_json(begun.file("chosen", row.name), {"seconds": 1.0, "pool": [solution, solution]})
    assert not study_children.is_settled(begun, row)
    assert study_page.row_of(begun, row)["missing"] == "the pool's children were not all measured"
    kls[1] = math.inf
    assert study_children.is_settled(begun, row)
    assert study_page.row_of(begun, row)["missing"] == "brief GKD of all its children diverged"


def test_rows_that_need_a_library_of_their_own_come_right_after_the_first():
    rows = study_rows.rows_of(study_rows.Asked())
    assert [row.library for row in rows[:3]] == ["full", "initialised", "unrefitted"]
    assert {row.library for row in rows[3:]} == {"full"} and rows[-1].seed == 2


def test_children_are_the_same_where_bld_changed_no_variant_of_theirs(tmp_path, monkeypatch):
    begun = study_rows.Study(tmp_path)
    outcomes = {"full": ("untrained", "trained", "rolled back"), "initialised": ("untrained",) * 3}

    def table(library, name):
        rows = zip(("linear", "kv1", "kv2"), ("product+ridge0.1", "mean_pool", "mean_pool"), outcomes[library], strict=True)
        rows = [(0, "attention", *row) for row in rows] + [(0, "ffn", "parent", "parent", "untrained")]
        rows.append((0, "block", "linear+no_op", "halves", "rolled back"))
        return pd.DataFrame(rows, columns=["layer", "subblock", "variant", "init", "outcome"])

    monkeypatch.setattr(begun, "table", table)

    def same(layer: dict[str, str]) -> bool:
        architecture = Architecture.from_json([layer])
        return study_children.origins(begun, "full", architecture) == study_children.origins(begun, "initialised", architecture)

    assert same({"attention": "linear", "ffn": "parent"}) and same({"attention": "kv2", "ffn": "parent"})
    assert not same({"attention": "kv1", "ffn": "parent"})
    assert not same({"block": "linear+no_op"})  # its halves were trained in one of them


def test_what_tells_the_kl_after_gkd_is_asked_of_distinct_children_of_whole_gkd():
    def row(healing: str, told: float, after: float, group: str = "mip", seed: int = 0, speedup: float = 1.5) -> dict:
        looks = [{"held_out_kl": kl} for kl in (9.0, -after, after)]
        known = {"healing": healing, "group": group, "seed": seed, "held_out": looks, "before": {"kl": told}, "after": {"kl": after}}
        return {**known, "predicted": {"kl": told, "speedup": speedup}}

    rows = [row("a", 1.0, 2.0), row("a", 1.0, 2.0, "rivals"), row("b", 2.0, 1.0), row("c", 3.0, 3.0), row("g", 4.0, 0.5, speedup=2.0)]
    others = [row("d", 0.0, 9.0, "losses"), row("e", 0.0, 9.0, seed=1), {"healing": "f", "missing": "not healed"}]
    told = study_page.foretold([*rows, *others], 1.5)
    assert told["all"]["children"] == 4 and told["all"]["sum of scores"] == pytest.approx(-0.4)
    fitted, whole = told["1.5 × to 1.53 × as fast"], told["of these, from the whole library"]
    assert fitted["children"] == 3 and fitted["sum of scores"] == fitted["joint KL before GKD"] == pytest.approx(0.5)
    assert fitted == whole and study_page.foretold([*rows, row("h", 5.0, 1.0, "libraries")], 1.5)[list(told)[1]]["children"] == 4
    assert fitted["held-out KL at the first look during GKD"] == pytest.approx(-1.0)
    assert study_page.foretold([*rows[:3], *others], 1.5) == {} and study_page.foretold_lines({}) == []


def test_questions_that_cannot_be_asked_are_an_error_before_anything_is_begun(tmp_path, monkeypatch, capsys):
    def exam(tasks, batch_size):
        raise ValueError("evaluation.tasks needs lm-eval")

    monkeypatch.setattr(evaluation, "Exam", exam)
    with pytest.raises(SystemExit):
        study.main(["libraries", "--out", str(tmp_path), *ASKED])
    assert "needs lm-eval" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_study_goes_on_only_as_it_was_begun(tmp_path):
    begun = study_rows.Study(tmp_path)
    begun.ask({"seeds": 2, "overrides": ["seed=1"]})
    begun.ask({})
    with pytest.raises(ValueError, match="begun with seeds 2, not 3"):
        begun.ask({"seeds": 3})
