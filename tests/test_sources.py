"""Parents in: hub, folder, GGUF; safetensors only; and a parent larger than its memory budget, layer by layer from disk."""
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
from conftest import EXCERPT, PICO, architecture, pico_parent, variants
from safetensors.torch import load_file, save_file
from test_config import composed

import stages.bld
import stages.profile_hardware
import stages.score
from puzzle_core import bld, files, scoring
from puzzle_core.children import load_child, make_child, save_child
from puzzle_core.corpus import Corpus
from puzzle_core.errors import UserError
from puzzle_core.families import FAMILIES
from puzzle_core.parents import Parent, checkpoint_digest, load_parent
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
    assert newest.identity == load_parent("hub", id="owner/pico", revision="b" * 40).identity
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


def saved(folder, parent: Parent):
    """The parent as a checkpoint of one safetensors file."""
    parent.model.save_pretrained(folder)
    parent.tokenizer.save_pretrained(folder)
    return folder


def flip_last_bit(file, *tensors: str) -> list[str]:
    """Change one bit of each of these tensors where it lies; all their names."""
    with open(file, "r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        for name in tensors:
            handle.seek(8 + size + header[name]["data_offsets"][1] - 1)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 1]))
    return [name for name in header if name != "__metadata__"]


@pytest.mark.parametrize("hidden", [64, 256], ids=["pico", "18 MiB"])
def test_one_bit_of_any_tensor_makes_another_parent(hidden, tmp_path):
    saved(tmp_path, pico_parent(hidden_size=hidden, intermediate_size=2 * hidden + 128, vocab_size=32 * hidden))
    weights = tmp_path / "model.safetensors"
    names, seen = flip_last_bit(weights), {checkpoint_digest(tmp_path)}
    for name in names:
        flip_last_bit(weights, name)
        seen.add(checkpoint_digest(tmp_path))
    assert len(names) == 38 and len(seen) == 39


COUNTS = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
          "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json", "modeling_mine.py",
          "code/more.py", "config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "never heard of"]  # fmt: skip
COUNTS_NOT = ["README.md", "LICENSE", ".git/HEAD", ".cache/huggingface/x.json", "pytorch_model.bin", "optimizer.pt", "trainer_state.json",
              "checkpoint-5/model.safetensors", "model.Q4_1.gguf"]  # fmt: skip


def test_every_file_that_determines_a_parent_counts_and_no_other(pico, tmp_path):
    seen = {checkpoint_digest(saved(tmp_path, pico))}
    for name in COUNTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((tmp_path / name).read_text() + " " if (tmp_path / name).exists() else "")
        seen.add(checkpoint_digest(tmp_path))
    assert len(seen) == len(COUNTS) + 1
    for name in COUNTS_NOT:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
        assert checkpoint_digest(tmp_path) in seen, name


def test_a_parent_is_the_same_wherever_its_folder_lies_and_another_with_another_tokenizer(pico, tmp_path):
    first = load_parent("directory", path=str(saved(tmp_path / "here", pico)))
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert load_parent("directory", path=str(tmp_path / "link")).identity == first.identity
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert load_parent("directory", path=str(tmp_path / "there")).identity == first.identity
    edited = tmp_path / "copy" / "tokenizer.json"
    edited.write_text(edited.read_text().replace('"<eos>"', '"<end>"'))
    assert load_parent("directory", path=str(tmp_path / "copy")).identity != first.identity


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[str]:
    """Names of the files whose bytes are hashed, with an empty cache and files taken as old enough to be kept there."""
    seen, sha256 = [], files._sha256
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_GRAIN_NS", 0)
    monkeypatch.setattr(files, "_sha256", lambda file: seen.append(file.name) or sha256(file))
    return seen


def test_bytes_are_read_once_and_again_only_where_a_file_was_written(pico, tmp_path, reads):
    folder = saved(tmp_path / "pico", pico)
    first = load_parent("directory", path=str(folder)).identity
    assert sorted(reads) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    reads.clear()
    assert load_parent("directory", path=str(folder)).identity == first and reads == []
    weights, before = folder / "model.safetensors", (folder / "model.safetensors").stat()
    flip_last_bit(weights, "model.norm.weight")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, time and inode: only the change time tells
    assert load_parent("directory", path=str(folder)).identity != first and reads == ["model.safetensors"]


def test_a_skeleton_reads_no_weights(pico, tmp_path, reads):
    load_parent("directory", path=str(saved(tmp_path / "pico", pico)), skeleton=True)
    assert reads == []


def test_stages_that_start_together_read_a_file_once(tmp_path, reads):
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(files.digest, [tmp_path / "large"] * 8))) == 1
    assert reads == ["large"]


def test_a_file_just_written_is_not_trusted_to_its_times(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(files, "_GRAIN_NS", 10**12)
    (tmp_path / "new").write_bytes(b"1")
    assert files.digest(tmp_path / "new") == files.digest(tmp_path / "new") and reads == ["new", "new"]


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "growing").write_bytes(b"1")
    state = files._state
    monkeypatch.setattr(files, "_state", lambda file: [*state(file)[:-1], time.time_ns()])
    with pytest.raises(UserError, match="growing was written to while it was read"):
        files._sha256(tmp_path / "growing")


# ---------------------------------------------------------------------------------- tensors that are not the model's


def tensors_changed(folder, change: Callable[[dict], object]) -> None:
    """Let `change` work on the tensors of the one safetensors file in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config_changed(folder, **changes) -> None:
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))


def without(part: str) -> Callable[[dict], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


GAPS = {
    "a missing FFN": (without("layers.2.mlp."), {}, r"lacks model.layers.2.mlp.down_proj.weight, .*gate_proj.weight, .*up_proj.weight\."),
    "a missing embedding": (without("embed_tokens"), {}, "lacks lm_head.weight, model.embed_tokens.weight"),
    "fewer layers than the config": (None, {"num_hidden_layers": 6}, r"lacks model.layers.4.input_layernorm.weight, .* and 14 more"),
    "more layers than the config": (None, {"num_hidden_layers": 3}, "has, beside what its config describes, model.layers.3.input"),
    "a tensor of nothing": (lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)}), {}, "describes, .*0.self_attn.sinks"),
    "another width": (None, {"intermediate_size": 168}, r"has in another shape .*0.mlp.down_proj.weight \(64, 160\), not \(64, 168\)"),
    "untied all the same": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), {}, "output embeddings of their own.*tie_word_emb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("memory_gib", [None, "some"], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", GAPS)
def test_a_parent_whose_tensors_are_not_the_models_is_refused_by_name(name, memory_gib, pico, tmp_path):
    change, config, words = GAPS[name]
    saved(tmp_path, pico)
    if change:
        tensors_changed(tmp_path, change)
    config_changed(tmp_path, **config)
    more = {"memory_gib": budget(pico) / GIB, "in_parts": True} if memory_gib else {}
    with pytest.raises(UserError, match=words) as refused:
        load_parent("directory", path=str(tmp_path), **more)
    assert str(refused.value).startswith(f"{tmp_path} ") and "make the checkpoint again, or mend its config.json" in str(refused.value)


@torch.no_grad()
def test_tied_weights_that_are_written_and_buffers_of_old_are_no_fault(pico, tmp_path):
    saved(tmp_path, pico)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    tensors_changed(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(), **more}))
    assert torch.equal(load_parent("directory", path=str(tmp_path)).model(IDS).logits, pico.model(IDS).logits)


def test_a_child_whose_tensors_are_not_the_models_is_refused_by_name(pico, tmp_path):
    child = make_child(pico, architecture("parent parent", "no_op w80", "linear no_op", "parent parent"), variants(pico, tmp_path))
    save_child(child, pico.tokenizer, tmp_path / "child")
    load_child(tmp_path / "child", torch.float32, pico.device)
    tensors_changed(tmp_path / "child", without("layers.1.mlp.up_proj"))
    with pytest.raises(UserError, match="child lacks model.layers.1.mlp.up_proj.weight"):
        load_child(tmp_path / "child", torch.float32, pico.device)


LAYERS_THAT_DIFFER = {
    "block_configs": [{"attention": {"no_op": True}}], "layers_block_type": ["attention", "mamba"], "ffn_multipliers": [0.5, 1.0],
    "num_key_value_heads": [2, 2, 1, 1], "intermediate_size": [160, 80, 160, 160], "num_query_heads": [4, 4, 2, 2],
}  # fmt: skip


@pytest.mark.parametrize("key", LAYERS_THAT_DIFFER)
@pytest.mark.parametrize("model_type", ["llama", "nemotron-nas"])
def test_a_config_whose_layers_differ_is_refused_before_anything_is_read(key, model_type, pico, tmp_path):
    config = {**pico.model.config.to_dict(), "model_type": model_type, key: LAYERS_THAT_DIFFER[key]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"its layers differ \({key} in config.json\). Use a parent whose layers are alike"):
        load_parent("directory", path=str(tmp_path))


def test_quantised_weights_are_not_a_parents(pico, tmp_path):
    config = {**pico.model.config.to_dict(), "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised .fp8.*Use the original or a dequantised copy"):
        load_parent("directory", path=str(tmp_path))


def test_an_adapter_is_not_a_parent(pico, tmp_path):
    (saved(tmp_path, pico) / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, whose base model lies elsewhere. Merge it"):
        load_parent("directory", path=str(tmp_path))


DAMAGED = {
    "config.json": ["[]", '{"model_type": "llama", "hidden_size": "many"}', '{"model_type": "llama", "rope_scaling": 8}'],
    "tokenizer.json": ["{}", '{"model": {"type": "BPE"}}', "not json"],
    "tokenizer_config.json": ['{"tokenizer_class": 7}', '{"extra_special_tokens": 5}'],
    "model.safetensors": ["", "x" * 400],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, contents in DAMAGED.items() for content in contents])
def test_what_libraries_say_of_a_damaged_file_is_an_error_of_the_users(name, content, pico, tmp_path):
    (saved(tmp_path, pico) / name).write_text(content)
    with pytest.raises((UserError, OSError), match=re.escape(str(tmp_path))):
        load_parent("directory", path=str(tmp_path))


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


def test_old_gpt_neo_checkpoints_hold_masks_that_are_no_fault(tmp_path):
    parent = pico_parent("gpt_neo")
    saved(tmp_path, parent)
    masks = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9)}
    more = {f"transformer.h.{layer}.attn.attention.{name}": mask.clone() for layer in range(3) for name, mask in masks.items()}
    tensors_changed(tmp_path, lambda t: t.update(more))
    assert torch.equal(load_parent("directory", path=str(tmp_path)).model(IDS).logits, parent.model(IDS).logits)
    tensors_changed(tmp_path, lambda t: t.update({"transformer.h.0.attn.attention.other": torch.ones(2)}))
    with pytest.raises(UserError, match="attn.attention.other"):
        load_parent("directory", path=str(tmp_path))


def test_a_path_is_no_hub_id_and_a_file_no_directory(pico, tmp_path):
    saved(tmp_path, pico)
    with pytest.raises(UserError, match="is a path of this machine; use conf/parent/directory.yaml"):
        load_parent("hub", id=str(tmp_path))
    with pytest.raises(UserError, match="config.json, which is a file; name its folder"):
        load_parent("directory", path=str(tmp_path / "config.json"))


def test_shards_in_folders_within_count(pico, tmp_path):
    pico.model.save_pretrained(tmp_path, max_shard_size="100KB")
    pico.tokenizer.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "within").mkdir()
    for shard in set(index["weight_map"].values()):
        (tmp_path / shard).rename(tmp_path / "within" / shard)
    index["weight_map"] = {name: f"within/{shard}" for name, shard in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = load_parent("directory", path=str(tmp_path)).identity
    shard = tmp_path / index["weight_map"]["model.norm.weight"]
    save_file({name: tensor * 1.3 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert load_parent("directory", path=str(tmp_path)).identity != before


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ({"source": "random"}, "parent.config is not set"),
        ({"source": "directory"}, "parent.path is not set"),
        ({"source": "hub"}, "parent.id is not set"),
        ({"source": "random", "config": {"hidden_size": 64}}, "unknown model family 'None'"),
        ({"source": "random", "config": {"model_type": "llama", "hidden_size": 65}}, "parent.config holds no model"),
    ],
)
def test_a_preset_that_lacks_what_its_source_needs_says_what(preset, words):
    with pytest.raises(UserError, match=words):
        load_parent(**preset)


def test_a_cache_that_cannot_be_written_or_read_is_no_riddle(pico, tmp_path, monkeypatch):
    saved(tmp_path / "parent", pico)
    for file in (tmp_path / "parent").iterdir():
        os.utime(file, (1e9, 1e9))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(files, "_GRAIN_NS", 0)
    with pytest.raises(UserError, match="cannot be written .*set PUZZLE_CACHE"):
        load_parent("directory", path=str(tmp_path / "parent"))
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    whole = load_parent("directory", path=str(tmp_path / "parent")).identity
    for entry in (tmp_path / "cache" / "digests").glob("*.json"):
        entry.write_text(entry.read_text()[:20])
    assert load_parent("directory", path=str(tmp_path / "parent")).identity == whole
