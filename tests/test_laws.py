"""The laws that every child obeys, on pico parents: identity, slicing, round trip, decode."""
import subprocess
import sys

import pytest
import torch
from conftest import architecture, pico_parent, variants
from torch import nn
from transformers import DynamicCache, StaticCache

from puzzle_core.children import load_child, make_child, save_child, verify_reload
from puzzle_core.families import FAMILIES
from puzzle_core.spec import ATTENTION, FFN, Architecture, Variant
from puzzle_core.subblocks import build_subblock, num_params
from puzzle_core.surgery import initialise
from puzzle_core.trace import ParentRun, kv_bytes_per_token

MIXED = architecture("no_op w80", "kv1 no_op", "linear linear", "parent parent")
ARCHITECTURES = {
    "mixed": MIXED,
    "no attention anywhere": Architecture.uniform(4, Variant("no_op"), Variant("w", 32)),
    "layer 0 linear": architecture("linear parent", "parent w48", "no_op no_op", "kv1 w80"),
    "all kv1 w80": Architecture.uniform(4, Variant("kv", 1), Variant("w", 80)),
}
IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))


PARENTS = {name: {"model_type": name} for name in sorted(FAMILIES)} | {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama untied": {"tie_word_embeddings": False},
}


@pytest.fixture(params=PARENTS)
def parent(request):
    return pico_parent(**PARENTS[request.param])


@torch.no_grad()
def test_the_all_parent_child_is_the_parent_bit_for_bit(parent, tmp_path):
    child = make_child(parent, Architecture.uniform(4), variants(parent, tmp_path))
    assert torch.equal(child(IDS).logits, parent.model(IDS).logits)
    assert type(child) is type(parent.model) and "per_layer_config" not in child.config.to_dict()


@torch.no_grad()
def test_pruning_ffn_channels_equals_zeroing_them(parent):
    importance = torch.rand(160, generator=torch.Generator().manual_seed(1))
    whole, narrow = parent.module(0, FFN), build_subblock(parent, 0, FFN, Variant("w", 80))
    initialise(whole, narrow, parent.family.ffn, Variant("w", 80), importance)
    hidden = torch.randn(3, 5, 64)
    cut = importance.argsort()[:80]
    kept = whole.down_proj.weight.clone()
    whole.down_proj.weight[:, cut] = 0
    zeroed = whole(hidden)
    whole.down_proj.weight.copy_(kept)
    torch.testing.assert_close(narrow(hidden), zeroed)


@torch.no_grad()
def test_pooling_equal_heads_changes_nothing(parent):
    attention = parent.module(1, ATTENTION)
    for projection in (attention.k_proj, attention.v_proj):  # both kv heads alike
        projection.weight[16:] = projection.weight[:16]
        if projection.bias is not None:
            projection.bias[16:] = projection.bias[:16]
    (calls,) = ParentRunAt(parent, 1)
    pooled = build_subblock(parent, 1, ATTENTION, Variant("kv", 1))
    initialise(attention, pooled, parent.family.attention, Variant("kv", 1))
    torch.testing.assert_close(calls[ATTENTION].replay(pooled), calls[ATTENTION].output_BTD)


def ParentRunAt(parent, layer):
    run = ParentRun(parent, {"test": [IDS]})
    for before in range(layer):
        list(run.advance(before, "test"))
    return list(run.advance(layer, "test"))


@torch.no_grad()
def test_linear_attention_starts_as_each_token_attending_to_itself(parent):
    attention, linear = parent.module(0, ATTENTION), build_subblock(parent, 0, ATTENTION, Variant("linear"))
    initialise(attention, linear, parent.family.attention, Variant("linear"))
    call = ParentRunAt(parent, 0)[0][ATTENTION]
    first_token = call.replay(linear)[:, 0]  # the first token can attend to nothing else
    torch.testing.assert_close(first_token, call.output_BTD[:, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_decoding_equals_the_full_forward(parent, name, tmp_path):
    child = make_child(parent, ARCHITECTURES[name], variants(parent, tmp_path))
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


@torch.no_grad()
def test_a_child_loads_where_the_project_is_not(parent, tmp_path):
    child = make_child(parent, MIXED, variants(parent, tmp_path))
    save_child(child, parent.tokenizer, tmp_path / "child")
    verify_reload(child, tmp_path / "child", IDS)


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


@torch.no_grad()
def test_sizes_are_those_of_the_modules_and_the_cache(parent, tmp_path):
    child = make_child(parent, MIXED, variants(parent, tmp_path))
    whole = sum(p.numel() for p in child.parameters())
    outside = sum(p.numel() for p in parent.model.parameters())
    blocks = kv_bytes = 0
    for layer, subblock, variant in MIXED.items():
        original = parent.module(layer, subblock)
        module = original if str(variant) == "parent" else build_subblock(parent, layer, subblock, variant)
        outside -= num_params(parent, layer, subblock, original)
        blocks += num_params(parent, layer, subblock, module)
        if subblock == ATTENTION:
            kv_bytes += kv_bytes_per_token(module, layer, ParentRunAt(parent, layer)[0][ATTENTION])
    assert blocks + outside == whole
    cache = child(IDS, use_cache=True).past_key_values
    assert sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.layers) == kv_bytes * IDS.numel()


def test_skipped_subblocks_lose_their_norms(pico, tmp_path):
    child = make_child(pico, MIXED, variants(pico, tmp_path))
    assert isinstance(child.model.layers[0].input_layernorm, nn.Identity)
    assert isinstance(child.model.layers[1].post_attention_layernorm, nn.Identity)
    assert not isinstance(child.model.layers[2].input_layernorm, nn.Identity)
