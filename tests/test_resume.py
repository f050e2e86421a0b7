"""kill -9 in the middle, then the same command: finished work is kept, results equal an uninterrupted run's."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, run, stage, started
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("resume")


def kill_when(name: str, overrides: list[str], reached) -> None:
    """Start a stage, kill -9 it as soon as `reached()` is true; fails if it ends before."""
    process = started(name, overrides, reached)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of bld, score and what gkd needs."""
    out = tmp_path_factory.mktemp("whole")
    where = [f"out={out}", f"data={out}"]
    for name in ("bld", "score", "profile_hardware"):
        stage(name, *where, *SLOW[name])
    stage("search", *where, "constraints.speedup=null", "constraints.params_fraction=0.7")
    stage("assemble", *where)
    stage("gkd", *where, *SLOW["gkd"])
    return out


SLOW = {
    "bld": ["bld.train_tokens=12288"],
    "score": ["score.num_tokens=8192", "score.memory_gib=null"],
    "profile_hardware": [],
    "gkd": ["gkd.train_tokens=12288"],
}


def test_bld_keeps_finished_variants(whole, tmp_path):
    blocks = tmp_path / "blocks"
    overrides = [f"out={tmp_path}", *SLOW["bld"]]
    kill_when("bld", overrides, lambda: len(list(blocks.glob("001-*.safetensors"))) == 8)
    assert not (tmp_path / "library.parquet").exists()
    finished = {f.name: f.stat().st_mtime_ns for f in blocks.glob("*.safetensors")}
    again = stage("bld", *overrides)
    assert f"{32 - len(finished)} variants made, {len(finished)} kept" in again.stdout
    assert all((blocks / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    tables = [pd.read_parquet(where / "library.parquet") for where in (tmp_path, whole)]
    pd.testing.assert_frame_equal(*tables)
    for name in tables[0].path:
        assert (blocks / name).read_bytes() == (whole / "blocks" / name).read_bytes()
    assert not list(tmp_path.rglob(".*.part"))


def test_score_keeps_finished_layers(whole, tmp_path):
    overrides = [f"out={tmp_path}", f"data={whole}", *SLOW["score"]]
    partial = tmp_path / ".scores.partial.parquet"
    kill_when("score", overrides, partial.exists)
    assert not (tmp_path / "scores.parquet").exists()
    finished = pd.read_parquet(partial).groupby(["layer", "subblock", "variant"]).ngroups
    assert 0 < finished < 32
    again = stage("score", *overrides)
    assert f"{32 - finished} variants scored, {finished} kept" in again.stdout
    pd.testing.assert_frame_equal(*[pd.read_parquet(where / "scores.parquet") for where in (tmp_path, whole)])
    assert not partial.exists()


def test_gkd_goes_on_from_its_last_checkpoint(whole, tmp_path):
    overrides = [f"out={tmp_path}", f"data={whole}", *SLOW["gkd"]]
    kill_when("gkd", overrides, lambda: any(tmp_path.glob(".gkd-*/phase/checkpoint-1[0-9]/trainer_state.json")))
    assert not (tmp_path / "distilled").exists()
    again = stage("gkd", *overrides)
    assert 0 < again.stdout.count("{'loss'") < 48, "the first steps were trained again"
    curves = [json.loads((where / "plots" / "gkd_curve.json").read_text()) for where in (tmp_path, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 48
    one, two = (load_file(where / "distilled" / "model.safetensors") for where in (tmp_path, whole))
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)
    assert not list(tmp_path.glob(".gkd-*"))


def test_two_runs_of_one_stage_do_not_fight(whole, tmp_path):
    holder = f"from puzzle_core.files import lock\nwith lock({str(tmp_path)!r}, 'score'): print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    second = stage("score", f"out={tmp_path}", f"data={whole}", check=False)
    process.communicate("\n")
    assert second.returncode == 1 and "another 'score' is still writing" in second.stderr


def test_damaged_weights_are_made_again_by_bld_and_refused_by_others(whole, tmp_path):
    run(["cp", "-r", f"{whole}/.", tmp_path], ROOT)
    damaged = tmp_path / "blocks" / "000-ffn-w80.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "scores.parquet").unlink()
    refused = stage("score", f"out={tmp_path}", f"data={tmp_path}", *SLOW["score"], check=False)
    assert refused.returncode == 1 and "000-ffn-w80.safetensors: not the weights of this variant" in refused.stderr
    assert not (tmp_path / "scores.parquet").exists()
    assert "1 variants made, 31 kept" in stage("bld", f"out={tmp_path}", *SLOW["bld"]).stdout
    assert damaged.read_bytes() == (whole / "blocks" / damaged.name).read_bytes()


def test_gkd_names_a_damaged_child_and_a_loss_that_is_nan(whole, tmp_path):
    run(["cp", "-r", f"{whole}/.", tmp_path], ROOT)
    where = [f"out={tmp_path / 'out'}", f"data={tmp_path}"]
    hot = stage("gkd", *where, "gkd.lr=1.0e30", check=False)
    assert hot.returncode == 1 and "gkd: error: gkd loss is nan" in hot.stderr and "lower `lr`" in hot.stderr
    damaged = tmp_path / "child" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    refused = stage("gkd", *where, check=False)
    assert refused.returncode == 1 and "holds a damaged safetensors file" in refused.stderr
    assert not (tmp_path / "out" / "distilled").exists()
