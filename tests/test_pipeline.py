"""The real dvc.yaml on the pico parent: what each edit reruns, sweeps, experiments, sharing."""
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, copy_of_the_project, run
from test_evaluation import Page

from benchmarks import demo
from puzzle_core.spec import CLOCKED

pytestmark = pytest.mark.xdist_group("pipeline")
STAGES = ["bld", "score", "profile-hardware", "search", "frontier", "assemble", "gkd"]


def ran(done: subprocess.CompletedProcess) -> list[str]:
    """The stages that a `dvc repro` really ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in done.stdout]


def repro(project: Path, *options: str) -> list[str]:
    return ran(run(["dvc", "repro", *options], project))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project whose pipeline has run once, committed."""
    project = copy_of_the_project(tmp_path_factory.mktemp("pipeline") / "project")
    assert repro(project) == STAGES
    run(["git", "add", "-A"], project)
    run(["git", "commit", "-qm", "first run"], project)
    return project


@pytest.fixture
def undo(project):
    """Whatever a test edits is taken back; what it ran stays in DVC's run cache."""
    yield
    run(["git", "checkout", "-q", "--", "."], project)
    run(["git", "clean", "-qfd"], project)
    run(["dvc", "checkout", "-q", "--force"], project)


def edit(project: Path, file: str, old: str, new: str) -> None:
    text = (project / file).read_text()
    assert old in text, (file, old)
    (project / file).write_text(text.replace(old, new))


def would_run(project: Path) -> list[str]:
    """What `dvc status` finds changed, and all that follows it in the graph."""
    changed = {name for name in json.loads(run(["dvc", "status", "--json"], project).stdout)}
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    paths = {
        name: [next(iter(out)) if isinstance(out, dict) else out for kind in ("outs", "metrics", "plots") for out in s.get(kind, [])]
        for name, s in stages.items()
    }
    for name in STAGES:  # in topological order
        if any(dep in paths[other] for dep in stages[name]["deps"] for other in changed if other in paths):
            changed.add(name)
    return [name for name in STAGES if name in changed]


def test_a_run_answers_what_did_i_get(project):
    rows = {row: json.loads((project / f"data/metrics/{row}.json").read_text()) for row in ("parent", "predicted", "child", "distilled")}
    assert rows["parent"]["kl"] == 0 and rows["child"]["kl"] > 0
    assert rows["child"]["num_params"] == rows["predicted"]["num_params"] < 0.8 * rows["parent"]["num_params"] + 1
    assert rows["child"]["memory_mib"] == pytest.approx(rows["predicted"]["memory_mib"])
    shown = run(["dvc", "metrics", "show"], project).stdout
    assert all(f"{row}.json" in shown for row in rows) and "perplexity" in shown
    run(["dvc", "plots", "show"], project)
    page = (project / "dvc_plots" / "index.html").read_text()
    assert "GKD loss" in page and all(
        list((project / "dvc_plots" / "static").glob(f"*{name}.png")) for name in ("architecture", "predicted_realised")
    )


def disagreements(table: str, within: float) -> list[str]:
    """Lines of a Markdown table of metrics with a time that is no pair, or a pair whose ratio is not the line's speed-up."""
    titles, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n") if line.startswith("|")]
    timed, wrong = [n for n, title in enumerate(titles) if title.startswith(("latency", "tokens/s"))], []
    assert timed and "speed-up" in titles
    for cells in lines:
        speedup = float(cells[titles.index("speed-up")].removesuffix(" ×"))
        for n in (n for n in timed if cells[n]):
            pair = [float(time.replace(",", "")) for time in cells[n].split(" → ")]
            slow, fast = pair[:: 1 if titles[n].startswith("latency") else -1] if len(pair) == 2 else (0.0, 1.0)
            if slow / fast != pytest.approx(speedup, rel=within):
                wrong.append(" | ".join(cells))
    return wrong


def test_times_stand_beside_those_of_a_parent_that_was_timed_with_them(project, undo):
    rows = {row: json.loads((project / f"data/metrics/{row}.json").read_text()) for row in ("parent", "predicted", "child", "distilled")}
    timed = {name: json.loads((project / f"data/{name}/evaluation.json").read_text()) for name in ("child", "distilled")}
    assert (timed["child"]["parent"], timed["child"]["child"]) == (rows["parent"], rows["child"])  # these two, in the same minutes
    assert not set(CLOCKED) & (set(rows["predicted"]) | set(rows["distilled"])) and rows["predicted"]["speedup"] > 0
    assert {key: value for key, value in timed["distilled"]["child"].items() if key not in CLOCKED} == rows["distilled"]
    run([sys.executable, "-m", "stages.report", "out=data", "continuations=null"], project)
    page = " ".join(Page((project / "data" / "report.html").read_text()).words.split())
    for name, pair in timed.items():
        assert pair["scenario"] == "b2p16g8" and ", eager, float32" in pair["hardware"]
        for of_parent, of_child in ((pair[row]["latency_ms"], pair[row]["throughput_tokens_per_s"]) for row in ("parent", "child")):
            assert of_parent * of_child == pytest.approx(2 * 8 * 1000)
        assert pair["parent"]["latency_ms"] / pair["child"]["latency_ms"] == pytest.approx(pair["child"]["speedup"])  # one turn, no medians
        took = f"{pair['parent']['latency_ms']:,.0f} → {pair['child']['latency_ms']:,.0f}"
        card = (project / f"data/{name}/README.md").read_text().partition("## Measured")[2].partition("\n\n")[2].partition("\n\n")[0]
        assert took in card and took in page
        assert disagreements(card, within=0.2) == []  # whole milliseconds of few
    assert disagreements(demo.table(rows, timed), within=0.2) == []


def test_the_readmes_table_does_not_contradict_itself():
    table = (ROOT / "README.md").read_text().partition("<!-- results:")[2].partition("<!-- /results")[0]
    assert disagreements(table, within=0.05) == []


def test_a_report_of_the_run_needs_no_network(project, undo):
    run(["python", "-m", "stages.report", "out=data", "continuations.num_tokens=4"], project)
    page = Page((project / "data" / "report.html").read_text())
    assert page.is_self_contained and len([value for value in page.fetched if value.startswith("data:image/png;base64,")]) >= 4
    chosen = json.loads((project / "data/metrics/distilled.json").read_text())
    words = ("after distillation", f"{chosen['kl']:.3f} ±", "wikilead", "Frontier", "Scores", "Global distillation", "Continuations",
             "params_fraction: 0.8", "torch 2.")  # fmt: skip
    assert all(word in page.words for word in words), [word for word in words if word not in page.words]


def test_what_was_predicted_is_held_against_what_the_children_lose(project, tmp_path):
    command = [sys.executable, "-m", "stages.realised", "architectures=[pool.json,frontier.json]", "random=3", f"out={tmp_path}"]
    done = run([*command, f"hydra.run.dir={tmp_path}"], project)
    rows, pool = json.loads((tmp_path / "realised.json").read_text()), json.loads((project / "data/plots/pool.json").read_text())
    assert {row["group"] for row in rows} == {"pool", "frontier", "random"} and "random 3" in done.stdout
    for row, of_pool in zip(rows, pool, strict=False):
        assert (row["predicted"], row["realised"]) == pytest.approx((of_pool["predicted"], of_pool["realised"]), rel=1e-6)
    assert json.loads((tmp_path / "metrics/realised.json").read_text())["num_architectures"] == len(rows)
    assert (tmp_path / "plots/realised.png").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("params.yaml", "params_fraction: 0.8", "params_fraction: 0.9", ["search", "frontier", "assemble", "gkd"]),
        ("params.yaml", "workload: pico", "workload: demo", ["profile-hardware", "search", "frontier", "assemble", "gkd"]),
        ("conf/hardware/cpu.yaml", "repeats: 5", "repeats: 4", ["profile-hardware", "search", "frontier", "assemble", "gkd"]),
        ("params.yaml", "parent: pico", "parent: smollm2-135m", STAGES),
        ("conf/parent/pico.yaml", "seed: 0", "seed: 1", STAGES),
        ("conf/gkd/pico.yaml", "lr: 1.0e-3", "lr: 2.0e-3", ["gkd"]),
        ("params.yaml", "repeats: 1", "repeats: 2", ["assemble", "gkd"]),
        ("params.yaml", "points: 50", "points: 9", ["frontier"]),
        ("params.yaml", "num_tokens: 1024", "num_tokens: 2048", ["assemble", "gkd"]),
        ("conf/score/pico.yaml", "num_tokens: 512", "num_tokens: 256", ["score", "search", "frontier", "assemble", "gkd"]),
        ("conf/search_space/pico.yaml", "[w80,", "[w80, w48,", STAGES),
        ("conf/parent/pico.yaml", "source: random", "source: random   # a comment", []),
        ("params.yaml", "seed: 0", "# another comment\nseed: 0", []),
        ("conf/parent/hub.yaml", "revision: main", "revision: other", []),
        ("conf/config.yaml", "debug: false", "debug: true", []),
        ("README.md", "#", "##", []),
    ],
)
def test_an_edit_reruns_what_depends_on_it(project, undo, file, old, new, expected):
    edit(project, file, old, new)
    assert would_run(project) == expected


def test_a_sweep_leaves_dvc_clean_and_works_beside_a_repro(project, undo):
    edit(project, "conf/bld/pico.yaml", "train_tokens: 1024", "train_tokens: 2048")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    beside = subprocess.Popen(["dvc", "repro", "bld"], cwd=project, env=ENVIRONMENT, **pipe)
    while "Running stage 'bld'" not in beside.stdout.readline():
        assert beside.poll() is None
    beside.send_signal(signal.SIGSTOP)  # in the middle of its work, with all its locks, however long the sweep takes
    try:
        base = [sys.executable, "-m", "stages.search", "-m", "constraints.params_fraction=null"]
        sweep = run([*base, "constraints.speedup=1.01,1.02,1.03"], project)
    finally:
        beside.send_signal(signal.SIGCONT)
    output = beside.communicate()[0]
    assert beside.returncode == 0, output
    (day,) = (project / "multirun" / "search").iterdir()
    points = sorted(p.name for p in day.iterdir() if p.is_dir())
    assert points == [f"constraints.params_fraction=null,constraints.speedup={s}" for s in ("1.01", "1.02", "1.03")], sweep.stdout
    for point in points:
        assert json.loads((day / point / "solution.json").read_text())["status"] == "optimal"
        assert (day / point / "plots" / "solution.png").exists()
    run(["git", "checkout", "-q", "--", "."], project)
    run(["dvc", "checkout", "-q", "--force"], project)
    assert would_run(project) == []


def test_a_queued_experiment_runs_in_its_own_workspace(project, undo):
    run(["dvc", "exp", "run", "--queue", "-S", "constraints.params_fraction=0.75", "--name", "smaller"], project)
    run(["dvc", "exp", "run", "--run-all", "--jobs", "1"], project)
    shown = json.loads(run(["dvc", "exp", "show", "--json"], project).stdout)
    text = json.dumps(shown)
    assert "smaller" in text
    run(["dvc", "exp", "apply", "smaller"], project)
    parent, child = (json.loads((project / f"data/metrics/{row}.json").read_text())["num_params"] for row in ("parent", "child"))
    assert child <= 0.75 * parent


def test_a_second_clone_searches_a_shared_library_without_training(project, undo, tmp_path):
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    run(["dvc", "remote", "add", "-d", "-f", "shared", remote], project)
    run(["dvc", "push", "-q"], project)
    run(["git", "add", "-A"], project)
    run(["git", "commit", "-qm", "remote"], project)
    run(["git", "clone", "-q", project, clone], tmp_path)
    run(["dvc", "pull", "-q", "data/scores.parquet", "data/costs.parquet"], clone)
    assert not (clone / "data/blocks").exists()
    edit(clone, "params.yaml", "params_fraction: 0.8", "params_fraction: 0.85")
    assert repro(clone, "--allow-missing", "search") == ["search"]
    assert not (clone / "data/blocks").exists()
    assert repro(clone, "--pull", "--allow-missing") == ["frontier", "assemble", "gkd"]
    tables = [pd.read_parquet(where / "data" / "library.parquet") for where in (project, clone)]
    pd.testing.assert_frame_equal(*tables)


def test_growing_the_search_space_through_dvc_trains_and_measures_the_new_variant_only(project, undo):
    edit(project, "conf/search_space/pico.yaml", "[w80,", "[w80, w48,")
    done = run(["dvc", "repro", "score", "profile-hardware"], project)
    assert "profile-hardware: 1 costs measured" in done.stdout and ", 9 kept" in done.stdout
    assert "bld: 4 variants made, 32 kept" in done.stdout and "score: 4 variants scored, 32 kept" in done.stdout
    shutil.rmtree(project / "multirun", ignore_errors=True)


def test_coupled_training_adds_joint_blocks_to_the_library(project, undo):
    chosen = run([sys.executable, "-m", "stages.couple", "couple.attention=2", "couple.ffn=2"], project).stdout
    assert "couple: 16 joint blocks in" in chosen and "set `search_space: coupled` in params.yaml" in chosen
    edit(project, "params.yaml", "search_space: pico", "search_space: coupled")
    done = run(["dvc", "repro", "score"], project)
    new = len(pd.read_parquet(project / "data/library.parquet").query("subblock == 'block'"))
    assert 16 <= new <= 20 and f"bld: {new} variants made, 32 kept" in done.stdout
    assert f"score: {new} variants scored, 32 kept" in done.stdout
