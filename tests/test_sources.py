"""Parents in: hub, folder, GGUF; safetensors only; and a parent larger than its memory budget, layer by layer from disk."""
import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
from conftest import EXCERPT, PICO, pico_parent
from test_config import composed

import stages.bld
import stages.profile_hardware
import stages.score
from puzzle_core import bld, scoring
from puzzle_core.corpus import Corpus
from puzzle_core.families import FAMILIES
from puzzle_core.parents import Parent, load_parent
from puzzle_core.plan import CUBLAS_BYTES, plan
from puzzle_core.spec import Variant
from puzzle_core.trace import ParentRun, layer_inputs

IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))
GIB = 2**30


@pytest.fixture(scope="module")
def folder(pico, tmp_path_factory):
    """The pico parent as a checkpoint of many shards."""
    folder = tmp_path_factory.mktemp("sources") / "pico"
    pico.model.save_pretrained(folder, max_shard_size="60KB")
    pico.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable:
    """A hub that is only what `hub("owner/name", commit)` has put into its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def snapshot(name: str, commit: str):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return repository / "snapshots" / commit

    return snapshot


@torch.no_grad()
def test_a_hub_parent_is_the_commit_behind_its_revision(pico, hub):
    other = pico_parent(hidden_size=32)
    for commit, parent in (("a" * 40, pico), ("b" * 40, other)):
        parent.model.save_pretrained(hub("owner/pico", commit))
        parent.tokenizer.save_pretrained(hub("owner/pico", commit))
    (hub("owner/pico", "b" * 40) / "README.md").write_text("---\nlicense: mit\n---\n# pico\n")
    pinned, newest = (load_parent("hub", id="owner/pico", revision=revision) for revision in ("a" * 40, "main"))
    assert torch.equal(pinned.model(IDS).logits, pico.model(IDS).logits)
    assert torch.equal(newest.model(IDS).logits, other.model(IDS).logits)
    assert pinned.identity != newest.identity and "b" * 40 in newest.origin.text
    assert (pinned.origin.license, newest.origin.license) == (None, "mit")


@torch.no_grad()
def test_a_pickle_is_refused_and_the_way_out_is_the_one_that_is_named(pico, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"directory": tmp_path / "old", "hub": hub("owner/old", "a" * 40)}
    for folder in folders.values():
        pico.model.config.save_pretrained(folder)
        pico.tokenizer.save_pretrained(folder)
        torch.save(pico.model.state_dict(), folder / "pytorch_model.bin")
    for source, preset in {"directory": {"path": str(folders["directory"])}, "hub": {"id": "owner/old", "revision": "main"}}.items():
        with pytest.raises(ValueError, match="old has no safetensors; pickled weights .* convert it once") as refused:
            load_parent(source, **preset)
        exec(re.search(r'python -c "(.*)" and', str(refused.value))[1])
        (path,) = re.findall(r"path: (\S+)`", str(refused.value))
        assert torch.equal(load_parent("directory", path=path).model(IDS).logits, pico.model(IDS).logits)


def test_code_that_comes_with_a_checkpoint_runs_only_if_the_user_says_so(pico, tmp_path):
    pico.tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="its own code for model type 'mine'.*set `trust_remote_code: true`.*conf/parent/"):
        load_parent("directory", path=str(tmp_path))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="unknown model family 'mine'"):
        load_parent("directory", path=str(tmp_path), trust_remote_code=True)


def test_a_child_is_not_a_parent(pico, tmp_path):
    config = {**pico.model.config.to_dict(), "per_layer_config": {"0": {"skip": ["attention"]}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a child already"):
        load_parent("directory", path=str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_a_parameter(folder, dtype):
    parent = load_parent("directory", path=str(folder), dtype=dtype)
    assert {str(p.dtype) for p in parent.model.parameters()} == {f"torch.{dtype}"}


def resident_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


def peak_while(parent: Parent, action: Callable) -> tuple[object, int]:
    """What `action` returns, and the most bytes of parameters that were in memory whenever a module ran."""
    seen = []
    handles = [m.register_forward_hook(lambda *_: seen.append(resident_bytes(parent.model))) for m in parent.model.modules()]
    result = action()
    for handle in handles:
        handle.remove()
    return result, max(seen)


def budget(parent: Parent, num_layers: float = 1.5) -> int:
    """Bytes of the parent with that many of its layers."""
    layer = resident_bytes(parent.layers[0])
    return int(resident_bytes(parent.model) - (len(parent.layers) - num_layers) * layer)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_parent_larger_than_its_budget_runs_layer_by_layer_to_the_same_logits(folder, dtype):
    whole = load_parent("directory", path=str(folder), dtype=dtype)
    limit = budget(whole)
    parts = load_parent("directory", path=str(folder), dtype=dtype, memory_gib=limit / GIB, in_parts=True)
    assert parts.identity == whole.identity and parts.device == whole.device
    assert resident_bytes(parts.model) < limit < resident_bytes(whole.model)
    logits, peak = peak_while(parts, lambda: parts.model(IDS).logits)
    assert torch.equal(logits, whole.model(IDS).logits)
    assert resident_bytes(parts.model) + resident_bytes(whole.layers[0]) == peak <= limit


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_runs_in_parts(name, tmp_path):
    whole = pico_parent(name)
    whole.model.save_pretrained(tmp_path, max_shard_size="60KB")
    whole.tokenizer.save_pretrained(tmp_path)
    limit = budget(whole, num_layers=1)
    parts = load_parent("directory", path=str(tmp_path), memory_gib=limit / GIB, in_parts=True)
    logits, peak = peak_while(parts, lambda: parts.model(IDS).logits)
    assert torch.equal(logits, whole.model(IDS).logits) and peak <= limit


@torch.no_grad()
def test_a_run_over_a_parent_in_parts_keeps_to_the_budget_and_reads_a_layer_once_a_pass(folder, pico):
    limit, batches = budget(pico), {"test": [IDS, IDS.flip(0)]}
    parts = load_parent("directory", path=str(folder), memory_gib=limit / GIB, in_parts=True)
    whole = ParentRun(pico, batches)
    run, peak = peak_while(parts, lambda: ParentRun(parts, batches))
    read = count_reads(parts)
    for layer in range(4):
        with parts.present(layer):
            calls, more = peak_while(parts, lambda: list(run.advance(layer, "test")))
        peak = max(peak, more)
        for ours, theirs in zip(calls, whole.advance(layer, "test"), strict=True):
            assert torch.equal(ours["ffn"].output_BTD, theirs["ffn"].output_BTD)
    assert peak <= limit
    assert len(read) == len(set(read)) == sum(len(list(layer.parameters())) for layer in pico.layers)


def count_reads(parent: Parent) -> list[str]:
    """Every name that is read from disk from now on."""
    read, tensors = [], parent.shards.tensors
    reading = type("Reading", (), {"__getitem__": lambda _, name: read.append(name) or tensors[name]})()
    object.__setattr__(parent.shards, "tensors", reading)
    return read


def test_scoring_a_parent_in_parts_reads_the_replaced_layer_and_those_above_once_a_batch(folder, pico):
    parts = load_parent("directory", path=str(folder), memory_gib=budget(pico) / GIB, in_parts=True)
    settings = scoring.Settings(256, 64, 4, ["kl"])
    scorer = scoring.Scorer(parts, scoring.make_tests(parts, Corpus(parts.tokenizer, EXCERPT), settings, {"kl"}))
    scorer.climb(2)
    read = count_reads(parts)
    _, peak = peak_while(parts, lambda: scorer.sums([{s: pico.module(2, s)} for s in ("attention", "ffn", "ffn")]))
    above = [f"model.layers.{layer}.{name}" for layer in (2, 3) for name, _ in pico.layers[layer].named_parameters()]
    assert sorted(read) == sorted(above) and peak <= budget(pico)


def test_a_forward_that_is_broken_off_leaves_no_layer_in_memory(folder, pico):
    parts = load_parent("directory", path=str(folder), memory_gib=budget(pico) / GIB, in_parts=True)
    layer_inputs(parts, IDS, last_layer=2)
    assert all(p.is_meta for layer in parts.layers for p in layer.parameters())


def test_a_parent_within_its_budget_is_loaded_whole(folder, pico):
    whole = load_parent("directory", path=str(folder), memory_gib=resident_bytes(pico.model) / GIB)
    assert whole.shards is None and resident_bytes(whole.model) == resident_bytes(pico.model)


def test_a_budget_that_cannot_work_says_what_is_needed(folder, pico):
    too_small = budget(pico, num_layers=0.5) / GIB
    with pytest.raises(ValueError, match="parent.memory_gib is .* needs .* GiB at least: its largest layer"):
        load_parent("directory", path=str(folder), memory_gib=too_small, in_parts=True)
    with pytest.raises(ValueError, match="needs the whole parent in memory.*memory_gib: null"):
        load_parent("directory", path=str(folder), memory_gib=too_small)
    with pytest.raises(ValueError, match="memory_gib needs a checkpoint"):
        load_parent("random", config={"model_type": "llama"}, memory_gib=1.0)


@pytest.mark.parametrize(("num_layers", "windows"), [(1, "one layer each"), (3, "two layers, those below run again")])
def test_bld_makes_the_library_of_a_parent_in_parts_within_its_budget(folder, pico, tmp_path, monkeypatch, capsys, num_layers, windows):
    peaks, tables, limit = [], {}, budget(pico, num_layers)
    parts = load_parent("directory", path=str(folder), memory_gib=limit / GIB, in_parts=True)
    wanted = [(n, s, v) for n in range(4) for s, v in (("attention", Variant("kv", 1)), ("ffn", Variant("w", 80)))]
    settings = bld.Settings(64, 4, 512, 4096, 256, [0.001, 0.01, 0.1, 1.0], 1e-3, 0.1, 0.0, 1.0)
    planned = plan(parts, wanted, settings)
    if num_layers == 1:
        with pytest.raises(ValueError, match="room for one layer.*raise parent.memory_gib"):
            plan(parts, wanted, replace(settings, memory_gib=(planned.peak_bytes - 1) / GIB))
    skeleton = load_parent("directory", path=str(folder), memory_gib=limit / GIB, skeleton=True)
    sketched = plan(skeleton, wanted, settings)
    assert sketched == replace(planned, peak_bytes=planned.peak_bytes + CUBLAS_BYTES)  # planned as for a GPU
    bld_gib = "null" if num_layers == 1 else (planned.peak_bytes - 1) / GIB  # then the hidden states do not fit
    load = stages.bld.load_parent

    @functools.wraps(load)
    def watched(*args, **kwargs):
        parent = load(*args, **kwargs)
        for module in parent.model.modules():
            module.register_forward_hook(lambda *_: peaks.append(resident_bytes(parent.model)))
        return parent

    monkeypatch.setattr(stages.bld, "load_parent", watched)
    space = ["search_space.attention=[kv1]", "search_space.ffn=[w80]", "bld.train_tokens=4096"]
    for how, memory_gib in {"whole": "null", "parts": limit / GIB}.items():
        peaks.clear()
        stages.bld.run(config(folder, tmp_path / how, memory_gib, *space, f"+bld.memory_gib={bld_gib if how == 'parts' else 'null'}"))
        tables[how] = pd.read_parquet(tmp_path / how / "library.parquet")
    assert max(peaks) == limit
    peaks.clear()
    stages.bld.run(config(folder, tmp_path / "dry", limit / GIB, *space, "bld.plan_only=true"))
    assert not peaks and not (tmp_path / "dry").exists() and "| 1 | 4 | 4 | " in capsys.readouterr().out
    pd.testing.assert_frame_equal(tables["parts"], tables["whole"])
    for file in (tmp_path / "whole" / "blocks").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / "blocks" / file.name).read_bytes()


def config(folder, out, memory_gib, *more: str):
    small = ["bld.train_tokens=1024", "bld.calibration_tokens=512", "bld.val_tokens=256", "score.num_tokens=256"]
    preset = [f"parent.path={folder}", "parent.dtype=float32", "parent.device=cpu", f"parent.memory_gib={memory_gib}"]
    cfg = composed(*[p for p in PICO if p != "parent=pico"], "parent=directory", *preset, *small, *more, f"data={out}")
    cfg.out = str(out)
    return cfg


def test_scores_are_those_of_the_whole_parent_and_timings_are_refused(folder, pico, tmp_path, capsys):
    stages.bld.run(config(folder, tmp_path, "null", "bld.train_tokens=0"))
    scores = []
    for memory_gib in ("null", budget(pico) / GIB):
        stages.score.run(config(folder, tmp_path, memory_gib))
        scores.append(pd.read_parquet(tmp_path / "scores.parquet"))
        (tmp_path / "scores.parquet").unlink()
    pd.testing.assert_frame_equal(*scores)
    with pytest.raises(SystemExit):
        stages.profile_hardware.run(config(folder, tmp_path, budget(pico) / GIB))
    assert "this stage needs the whole parent in memory" in capsys.readouterr().err
