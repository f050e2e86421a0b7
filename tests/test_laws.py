"""What every child can do, on one pico parent; the laws for every family are in test_families.py."""
import subprocess
import sys

import pytest
import torch
from conftest import architecture, variants
from torch import nn
from transformers import DynamicCache, StaticCache

from puzzle_core.children import load_child, make_child, save_child, verify_reload
from puzzle_core.spec import Architecture, Variant

MIXED = architecture("no_op w80", "kv1 no_op", "linear linear", "parent parent")
ARCHITECTURES = {
    "mixed": MIXED,
    "no attention anywhere": Architecture.uniform(4, Variant("no_op"), Variant("w", 32)),
    "layer 0 linear": architecture("linear parent", "parent w48", "no_op no_op", "kv1 w80"),
    "all kv1 w80": Architecture.uniform(4, Variant("kv", 1), Variant("w", 80)),
}
IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_decoding_equals_the_full_forward(pico, name, tmp_path):
    child = make_child(pico, ARCHITECTURES[name], variants(pico, tmp_path))
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


def test_a_loaded_child_saves_and_loads_again(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    save_child(child, pico.tokenizer, tmp_path / "child")
    again = load_child(tmp_path / "child", torch.float32, torch.device("cpu"))
    save_child(again, pico.tokenizer, tmp_path / "again")
    verify_reload(child, tmp_path / "again", IDS)


def test_a_checkpoint_that_does_not_match_is_refused(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    save_child(child, pico.tokenizer, tmp_path / "child")
    with torch.no_grad():
        child.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="does not load as the child"):
        verify_reload(child, tmp_path / "child", IDS)


def test_a_child_of_nan_is_refused(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    with torch.no_grad():
        child.model.norm.weight.fill_(float("nan"))
    save_child(child, pico.tokenizer, tmp_path / "child")
    with pytest.raises(ValueError, match="does not load as the child"):
        verify_reload(child, tmp_path / "child", IDS)


def test_stock_transformers_refuses_a_child_instead_of_answering_wrongly(pico, tmp_path):
    save_child(make_child(pico, MIXED, variants(pico, tmp_path)), pico.tokenizer, tmp_path / "child")
    code = f"from transformers import LlamaForCausalLM; LlamaForCausalLM.from_pretrained({str(tmp_path / 'child')!r})"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "per-layer attribute" in done.stderr


def test_skipped_subblocks_lose_their_norms(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    assert isinstance(child.model.layers[0].input_layernorm, nn.Identity)
    assert isinstance(child.model.layers[1].post_attention_layernorm, nn.Identity)
    assert not isinstance(child.model.layers[2].input_layernorm, nn.Identity)
