"""Bad input: one clear error that says what to do, exit code not 0, nothing half-written."""
import json
import re
import sys

import pandas as pd
import pytest
from conftest import ROOT, copy_of_the_project, run, stage

from benchmarks import families
from puzzle_core import tables
from puzzle_core.corpus import Corpus
from puzzle_core.families import FAMILIES, family_of
from puzzle_core.parents import load_parent, pick_device
from puzzle_core.spec import Variant
from puzzle_core.subblocks import resolve_layers, resolve_space


def one_error(done, *words: str) -> str:
    """The stage failed with one line that has all of `words`, and no traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.split("\n") if "error:" in line]
    assert all(word in line for word in words), line
    return line


def test_an_unknown_preset_is_answered_with_the_nearest(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("parent: pico", "parent: pcio"))
    done = run(["python", "-m", "stages.search"], project, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no preset 'pcio' in conf/parent/. Did you mean 'pico'?" in done.stderr


def test_an_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model family 'lama'. Did you mean 'llama'\? Known: .*llama, mistral"):
        family_of("lama")
    with pytest.raises(ValueError, match="unknown model family 'mamba'"):
        load_parent("random", config={"model_type": "mamba"})


def test_bad_corpora_say_what_is_wrong(pico, tmp_path):
    (tmp_path / "small.txt").write_text("Too short. " * 50)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    pd.DataFrame({"content": ["a"]}).to_parquet(tmp_path / "column.parquet")
    cases = {
        "missing": ("no corpus at", "conf/corpus/"),
        "small.txt": ("too small", "needed", "token budget"),
        "broken.parquet": ("broken.parquet cannot be read as parquet",),
        "column.parquet": ("no column 'text', only content",),
    }
    for name, words in cases.items():
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            preset = {"source": "files", "path": str(tmp_path / name), "development_fraction": 0.3, "test_fraction": 0.3}
            Corpus(pico.tokenizer, preset).sequences("train", 10**4, 64, seed="")
        assert all(word in str(raised.value) for word in words), raised.value


def test_a_stage_that_fails_leaves_no_table(tmp_path):
    one_error(stage("bld", f"corpus.path={tmp_path / 'missing'}", f"out={tmp_path}", check=False), "no corpus at", "conf/corpus/")
    assert not (tmp_path / "library.parquet").exists()


def pico_tables(data):
    """Scores and costs of one layer, enough for a search."""
    rows = [("attention", "parent", 0.0, 2.0), ("attention", "no_op", 0.5, 0.0), ("ffn", "parent", 0.0, 3.0), ("ffn", "w80", 0.2, 2.0)]
    common = {"layer": 0, "metric": "kl", "num_tokens": 1, "fingerprint": ""}
    scores = [{**common, "subblock": s, "variant": v, "value": score} for s, v, score, _ in rows]
    tables.write("scores", pd.DataFrame(scores), data / "scores.parquet")
    units = {"prefill_ms": "ms", "decode_ms": "ms", "param_bytes": "bytes", "num_params": "count", "kv_bytes_per_token": "bytes"}
    common = {"scenario": "b2p16g8", "source": "analytic", "hardware": "none"}
    costs = [
        {**common, "subblock": s, "variant": v, "metric": m, "value": cost, "unit": unit}
        for s, v, _, cost in [*rows, ("outside", "parent", 0.0, 1.0)]
        for m, unit in units.items()
    ]
    tables.write("costs", pd.DataFrame(costs), data / "costs.parquet")


def test_bad_searches_say_what_can_be_reached(tmp_path):
    pico_tables(tmp_path)
    where = [f"out={tmp_path}", f"data={tmp_path}", "constraints.speedup=null"]
    one_error(stage("search", *where, "constraints.speedup=9", check=False), "speedup 9.0", "largest reachable is 2")
    one_error(stage("search", *where, "search.metric=klx", check=False), "no metric 'klx'", "kl")
    one_error(stage("search", *where, "workload.batch_size=64", check=False), "no scenario 'b64p16g8'", "b2p16g8")
    one_error(stage("search", *where, "+constraints.speedupp=2", check=False), "did you mean 'speedup'")
    assert not (tmp_path / "solution.json").exists()
    (tmp_path / "costs.parquet").write_bytes(b"nothing")
    one_error(stage("search", *where, check=False), "costs.parquet is not a readable parquet file")
    (tmp_path / "costs.parquet").unlink()
    one_error(stage("search", *where, check=False), "costs.parquet is missing", "dvc pull")


def test_a_variant_outside_the_library_names_those_inside(tmp_path):
    library = pd.DataFrame({"layer": [0], "subblock": ["ffn"], "variant": ["w80"], "path": ["x"], "fingerprint": [""]})
    find = tables.variant_files(library, tmp_path)
    with pytest.raises(ValueError, match="variant w48 of ffn in layer 0 is not in the library; there are: w80"):
        find(0, "ffn", Variant("w", 48))


@pytest.mark.parametrize(
    ("subblock", "text", "complaint"),
    [
        ("attention", "kv3", "num_key_value_heads is 2; expected one of"),
        ("ffn", "w160", "intermediate_size is 160; expected between 1 and 159"),
        ("ffn", "kv1", "'kv1' is not a variant of ffn"),
        ("attention", "w80", "'w80' is not a variant of attention"),
        ("ffn", "lineal", "'lineal' is not a variant of ffn"),
    ],
)
def test_a_variant_that_the_parent_cannot_have_is_refused(pico, subblock, text, complaint):
    space = {"attention": [], "ffn": [], subblock: [text]}
    with pytest.raises(ValueError, match=complaint):
        resolve_space(space, pico.model.config, pico.family)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ({"1-2": {"attention": ["kv3"]}}, "search_space.layers.1-2.attention, layer 1: 'kv3' does not fit this parent"),
        ({"4": {"ffn": []}}, "'4' names no layers of this parent; expected for example 0 or 1,7-9, below 4"),
        ({"3-1": {"ffn": []}}, "'3-1' names no layers"),
        ({"0": {"fnn": []}}, "search_space.layers.0: unknown subblock 'fnn'. Did you mean 'ffn'?"),
        ({"3": {"block": ["kv1+w80"]}}, "search_space.layers.3.block, layer 3: 'kv1+w80' needs kv1 in the attention list"),
        ({"3": {"block": ["kv1"]}}, "'kv1' is not a joint variant; expected attention+ffn"),
        ({"0-2": {"ffn": []}, "2": {"ffn": ["w80"]}}, "search_space.layers.2.ffn: layer 2 has a list of its own already"),
    ],
)
def test_a_layers_own_list_that_cannot_be_names_the_layer(pico, layers, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        resolve_layers({"attention": [], "ffn": [], "layers": layers}, pico.model.config, pico.family)


def test_a_damaged_or_missing_parent_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF?")
    with pytest.raises(ValueError, match="sha256 is .*, expected 00"):
        load_parent("gguf", path=str(tmp_path / "model.gguf"), sha256="00")
    with pytest.raises(FileNotFoundError, match="no parent at .*conf/parent/"):
        load_parent("directory", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="package 'no_such_package', which is not installed"):
        load_parent("gguf", path="x", package="no_such_package")
    with pytest.raises(ValueError, match="unknown parent source 'web'"):
        load_parent("web")


def test_a_gpu_that_is_not_there_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees no GPU"):
        pick_device("cuda")


def test_a_parent_directory_loads_like_the_model_it_was_saved_from(pico, tmp_path):
    import torch

    pico.model.save_pretrained(tmp_path)
    pico.tokenizer.save_pretrained(tmp_path)
    loaded = load_parent("directory", path=str(tmp_path))
    ids = torch.randint(1, 257, (1, 8))
    assert torch.equal(loaded.model(ids).logits, pico.model(ids).logits)
    assert loaded.identity != pico.identity


def test_the_commands_of_the_readme_exist():
    commands = re.findall(r"^    (make|python -m|dvc) (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert ("make", "run") in commands and ("make", "test") in commands
    for program, what in commands:
        if program == "make":
            assert f"\n{what}:" in makefile
        elif program == "python -m":
            assert (ROOT / f"{what.replace('.', '/')}.py").exists()


def test_the_table_of_the_readme_is_that_of_the_families():
    assert f"-->\n{families.table()}\n<!-- /families -->" in (ROOT / "README.md").read_text()
    held = json.loads((ROOT / "docs/results/families.json").read_text())["laws_held"]
    assert held.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert set(held[name]) == {f"{s} {kind}" for s, kind in families.OPERATORS if families.has(family, s, kind)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parent.config.model_type=mamba"], ["unknown model family 'mamba'", "llama, mistral"]),
        (["parent.dtype=bf16"], ["parent.dtype is 'bf16'", "bfloat16"]),
        (["bld.train_tokens=1000000000"], ["too small", "needed", "token budget"]),
        (["+bld.trian_tokens=1"], ["unknown key 'trian_tokens'", "Did you mean 'train_tokens'"]),
        (["bld.ridge=null", "+parent.config.rms_norm_eps=-1.0e6"], ["in layer 0 is nan as it was initialised", "activations overflow"]),
    ],
)
def test_a_bld_that_cannot_work_says_why(tmp_path, overrides, words):
    one_error(stage("bld", f"out={tmp_path}", *overrides, check=False), *words)
    assert not (tmp_path / "library.parquet").exists() and not list(tmp_path.rglob("*.safetensors"))


def as_a_stage(body: str, tmp_path):
    """`body` as the body of the stage `search`."""
    script = ["from puzzle_core.config import stage", "from puzzle_core.errors import UserError", "def run(cfg):", f"    {body}"]
    script.append("stage('search')(run)()")
    where = [f"out={tmp_path}", f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
    return run([sys.executable, "-c", "\n".join(script), *where], ROOT, check=False)


def test_what_a_user_can_mend_is_one_line(tmp_path):
    done = as_a_stage("raise UserError('workload.batch_size is 0')", tmp_path)
    assert done.returncode == 1 and done.stderr == "search: error: workload.batch_size is 0\n"


@pytest.mark.parametrize("fault", ["list(zip([1], [], strict=True))", "1 // 0", "float('one')", "[][0]"])
def test_a_fault_of_ours_keeps_its_traceback(fault, tmp_path):
    done = as_a_stage(fault, tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "search: error:" not in done.stderr
