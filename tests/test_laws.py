"""What every child can do, on one pico parent; the laws for every family are in test_families.py."""
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from conftest import architecture, pico_parent, run, variants
from packaging.requirements import Requirement
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, StaticCache

from puzzle_core import modeling_puzzle
from puzzle_core.children import make_child, save_child, verify_reload
from puzzle_core.spec import Architecture, Variant

MIXED = architecture("no_op w80", "kv1 no_op", "linear linear", "parent parent")
ARCHITECTURES = {
    "mixed": MIXED,
    "no attention anywhere": Architecture.uniform(4, Variant("no_op"), Variant("w", 32)),
    "layer 0 linear": architecture("linear parent", "parent w48", "no_op no_op", "kv1 w80"),
    "all kv1 w80": Architecture.uniform(4, Variant("kv", 1), Variant("w", 80)),
}
OF_QWEN3 = {"first sliding layer without attention": architecture("parent parent", "no_op parent", "parent parent")}
IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OF_QWEN3])
def test_cached_decoding_equals_the_full_forward(pico, name, tmp_path):
    parent, layers = (pico_parent("qwen3"), OF_QWEN3[name]) if name in OF_QWEN3 else (pico, ARCHITECTURES[name])
    child = make_child(parent, layers, variants(parent, tmp_path))
    full = child(IDS, use_cache=False).logits
    caches = {
        "made by the model": None,
        "dynamic without config": DynamicCache(),
        "static": StaticCache(config=child.config, max_cache_len=32),
    }
    for kind, cache in caches.items():
        out = child(IDS[:, :10], past_key_values=cache, use_cache=True)
        logits = [out.logits]
        for t in range(10, IDS.shape[1]):
            logits.append(child(IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, atol=2e-5, rtol=1e-4, msg=lambda m, k=kind: f"{k} cache: {m}")


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_gives_the_same_tokens_with_any_cache_and_with_padding(pico, name, tmp_path):
    child = make_child(pico, ARCHITECTURES[name], variants(pico, tmp_path))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    uncached = child.generate(IDS[:, :8], use_cache=False, **options)
    assert torch.equal(child.generate(IDS[:, :8], **options), uncached)
    assert torch.equal(child.generate(IDS[:, :8], cache_implementation="static", **options), uncached)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS[:, :8]], 1)
    out = child.generate(padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(out[:, 3:], uncached)


def only(folder: Path, *names: str) -> Path:
    """A folder from which only these distributions, and what they require, can be imported."""
    wanted, found = list(names), set()
    while wanted:
        if (name := wanted.pop()) in found:
            continue
        found.add(name)
        package = distribution(name)
        for part in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(package.locate_file(part))
        required = map(Requirement, package.requires or [])
        wanted += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return folder


CLEAN = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert not [name for name in ("puzzle_core", "accelerate", "datasets", "pandas", "gguf") if importlib.util.find_spec(name)]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
for folder in sys.argv[2:]:
    expected, options = load_file(folder + ".expected"), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for where in (folder, folder + ".again"):
        child = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
        torch.testing.assert_close(child(expected["ids"]).logits, expected["logits"])
        assert torch.equal(child.generate(expected["ids"], **options), expected["generated"])
        child.save_pretrained(folder + ".again")
    assert AutoTokenizer.from_pretrained(folder).decode(expected["ids"][0]) is not None
LlamaForCausalLM.from_pretrained(sys.argv[2])
"""


@torch.no_grad()
def test_children_load_generate_and_save_with_nothing_but_torch_and_transformers_and_stock_classes_refuse_them(pico, tmp_path):
    folders = []
    for parent, layers in ((pico, MIXED), (pico_parent("gpt2"), architecture("no_op w80", "kv1 no_op", "linear linear"))):
        folders.append(tmp_path / parent.model.config.model_type)
        child = make_child(parent, layers, variants(parent, tmp_path))
        save_child(child, parent.tokenizer, folders[-1])
        generated = child.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
        save_file({"ids": IDS, "logits": child(IDS).logits, "generated": generated}, f"{folders[-1]}.expected")
    (tmp_path / "clean").mkdir()
    clean = only(tmp_path / "clean", "torch", "transformers")
    done = run([sys.executable, "-I", "-S", "-c", CLEAN, clean, *folders], tmp_path, check=False)
    assert done.returncode != 0 and modeling_puzzle.STOCK_REFUSES in done.stderr.split("\n")[-2], done.stderr  # the last line's own refusal


def test_a_checkpoint_that_does_not_match_is_refused(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    save_child(child, pico.tokenizer, tmp_path / "child")
    with torch.no_grad():
        child.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"does not load as the child it was saved from: \d"):  # how far its logits are off
        verify_reload(child, tmp_path / "child", IDS)


def test_a_child_of_nan_is_refused(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    with torch.no_grad():
        child.model.norm.weight.fill_(float("nan"))
    save_child(child, pico.tokenizer, tmp_path / "child")
    with pytest.raises(RuntimeError, match="does not load as the child it was saved from: nan"):
        verify_reload(child, tmp_path / "child", IDS)


def test_skipped_subblocks_lose_their_norms(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    assert isinstance(child.model.layers[0].input_layernorm, nn.Identity)
    assert isinstance(child.model.layers[1].post_attention_layernorm, nn.Identity)
    assert not isinstance(child.model.layers[2].input_layernorm, nn.Identity)
