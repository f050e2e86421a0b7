"""The laws for every family and every operator it has, on pico parents: identity, slicing, round trip, decode, sizes.

`python -m benchmarks.families` runs this file and writes the README's table from it.
"""
import contextlib
import copy
import dataclasses
import functools
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import EXCERPT, PICO_CONFIG, pico_parent, variants
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from puzzle_core import bld, costs, layouts, scoring, tables
from puzzle_core.children import make_child, save_child
from puzzle_core.corpus import Corpus
from puzzle_core.errors import UserError
from puzzle_core.families import EXPERTS, FAMILIES, SIZED, Attention, Family, Ffn, family_for
from puzzle_core.modeling_puzzle import GroupedAttention, get_subblock
from puzzle_core.parents import Parent, load_parent
from puzzle_core.spec import ATTENTION, FFN, LINEAR, NO_OP, PARENT, SUBBLOCKS, Architecture, Scenario, Variant
from puzzle_core.subblocks import build_subblock, num_params, resolve_space, swapped
from puzzle_core.surgery import KV_HEADS, Basis, _merge_kv_heads, initialise, rows
from puzzle_core.trace import Call, KvCache, ParentRun, kv_cache

IDS = torch.randint(1, 257, (2, 16), generator=torch.Generator().manual_seed(0))
PICO_SIZES = {"kv": 1, "window": 5, "w": 80, "e": 4}
PARENTS = {name: {"model_type": name} for name in FAMILIES} | {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama untied": {"tie_word_embeddings": False},
    "mistral without window": {"model_type": "mistral", "sliding_window": None},
    "opt as 350m": {"model_type": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt bare": {"model_type": "opt", "enable_bias": False, "layer_norm_elementwise_affine": False},
}


@functools.cache
def parent_of(name: str) -> Parent:
    return pico_parent(**PARENTS[name])


def operators(family: Family) -> list[tuple[str, Variant]]:
    sized = [(s, Variant(kind, PICO_SIZES[kind])) for s in SUBBLOCKS for kind in SIZED[s] if kind in family.size_keys]
    return sized + [(s, variant) for s in SUBBLOCKS for variant in (LINEAR, NO_OP)]


def cell(name: str, *what: object) -> object:
    return pytest.param(name, *what, id="-".join(map(str, (name, *what))), marks=pytest.mark.xdist_group(name))


FAMILY_OF = {name: FAMILIES[config.get("model_type", "llama")] for name, config in PARENTS.items()}
every_parent = pytest.mark.parametrize("name", [cell(name) for name in PARENTS])
every_operator = pytest.mark.parametrize(
    ("name", "subblock", "variant"), [cell(name, *what) for name, family in FAMILY_OF.items() for what in operators(family)]
)
# The parents that are no family's plain one have their operators in one child, to be quick.
CHILDREN = [(name, *what) for name in FAMILIES for what in operators(FAMILIES[name])] + [(name, "all", "mixed") for name in PARENTS]
every_child = pytest.mark.parametrize(("name", "subblock", "variant"), [cell(*child) for child in CHILDREN])


def architecture_of(name: str, subblock: str, variant: Variant) -> Architecture:
    """The operator in every layer but layer 1; or all operators in one child, whose layer 0 has no attention."""
    num_layers = len(parent_of(name).layers)
    if variant == "mixed":
        of = {s: [v for at, v in operators(FAMILY_OF[name]) if at == s] for s in SUBBLOCKS}
        layers = [(NO_OP, of[FFN][0]), (of[ATTENTION][0], NO_OP), (of[ATTENTION][1], LINEAR), (PARENT, PARENT)]
        return Architecture(tuple(layers[:num_layers]))
    pair = (variant, PARENT) if subblock == ATTENTION else (PARENT, variant)
    return Architecture(tuple((PARENT, PARENT) if layer == 1 else pair for layer in range(num_layers)))


@functools.cache
def child_of(name: str, subblock: str, variant: Variant):
    with tempfile.TemporaryDirectory() as directory:
        return make_child(parent_of(name), architecture_of(name, subblock, variant), variants(parent_of(name), Path(directory)))


def calls(parent: Parent, layer: int) -> dict[str, Call]:
    run = ParentRun(parent, {"test": [IDS]})
    for before in range(layer):
        list(run.advance(before, "test"))
    return next(run.advance(layer, "test"))


def made(parent: Parent, layer: int, subblock: str, variant: Variant, importance: torch.Tensor | None = None):
    module = build_subblock(parent, layer, subblock, variant)
    initialise(parent.module(layer, subblock), module, parent.family.subblock(subblock), variant, Basis(importance))
    return module


@every_parent
@torch.no_grad()
def test_the_all_parent_child_is_the_parent_bit_for_bit(name, tmp_path):
    parent = parent_of(name)
    child = make_child(parent, Architecture.uniform(len(parent.layers)), variants(parent, tmp_path))
    assert torch.equal(child(IDS).logits, parent.model(IDS).logits)
    assert type(child) is type(parent.model) and "per_layer_config" not in child.config.to_dict()


def cut_kv(parent: Parent, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """All heads of the parent's keys and values made alike: their mean is each of them."""
    attention, names = parent.module(1, ATTENTION), parent.family.attention
    size = attention.head_dim
    for module in dict.fromkeys([attention.get_submodule(names.k), attention.get_submodule(names.v)]):
        for tensor in rows(module).values():
            first = rows(attention.get_submodule(names.last))["weight"].shape[1] if names.q == names.k else 0
            for part in tensor[first:].chunk(2) if names.q == names.k else [tensor]:
                part.copy_(part[:size].repeat(len(part) // size, *[1] * (part.ndim - 1)))
    for tensor in [m.weight for m in attention.children() if getattr(m, "weight", torch.zeros(0)).shape == (2 * size,)]:
        tensor[size:] = tensor[:size]  # olmo2's norm over all heads
    call = calls(parent, 1)[ATTENTION]
    return call.replay(made(parent, 1, ATTENTION, variant)), call.output_BTD


def cut_w(parent: Parent, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """The cut channels' columns of the last projection set to 0."""
    importance = torch.rand(160, generator=torch.Generator().manual_seed(1))
    narrow = made(parent, 0, FFN, variant, importance)
    last = parent.module(0, FFN).get_submodule(parent.family.ffn.last)
    rows(last)["weight"][:, importance.argsort()[: 160 - variant.size]] = 0
    call = calls(parent, 0)[FFN]
    return call.replay(narrow), call.output_BTD


def cut_e(parent: Parent, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """The router never picks the cut experts."""
    importance = torch.rand(8, generator=torch.Generator().manual_seed(1))
    few, whole = made(parent, 0, FFN, variant, importance), parent.module(0, FFN)
    hidden = torch.cat([torch.randn(2, 5, 63, generator=torch.Generator().manual_seed(2)), torch.ones(2, 5, 1)], dim=-1)
    whole.get_submodule(parent.family.ffn.router).weight[importance.argsort()[: 8 - variant.size], -1] = -1e4
    return few(hidden), whole(hidden)


def cut_window(parent: Parent, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """What is further away than the window is masked."""
    call, age = calls(parent, 1)[ATTENTION], torch.arange(16)[:, None] - torch.arange(16)[None]
    mask = torch.zeros(16, 16).masked_fill((age < 0) | (age >= variant.size), torch.finfo(torch.float32).min)[None, None]
    masked = Call(call.args, {**call.kwargs, "attention_mask": mask}, call.output_BTD)
    return call.replay(made(parent, 1, ATTENTION, variant)), masked.replay(parent.module(1, ATTENTION))


def without_nonlinearity(parent: Parent, hidden: torch.Tensor) -> torch.Tensor:
    """The parent's FFN of layer 0 with a gate, activation and router that let everything through alike."""
    ffn, names = parent.module(0, FFN), parent.family.ffn
    if names.router:
        up, down = ffn.get_parameter(names.first).chunk(2, dim=1)[1], ffn.get_parameter(names.last)
        return torch.stack([hidden @ u.T @ d.T for u, d in zip(up, down, strict=True)]).mean(dim=0)
    inner, last = ffn.get_submodule(names.first)(hidden), ffn.get_submodule(names.last)
    return last(inner.chunk(2, dim=-1)[1] if names.inner.count(names.first) > 1 else inner)


CUT = {"kv": cut_kv, "w": cut_w, "e": cut_e, "window": cut_window}


@every_operator
@torch.no_grad()
def test_a_variant_does_what_the_parent_does_without_what_was_cut(name, subblock, variant):
    parent = parent_of(name)
    if variant.kind in CUT:
        got, expected = CUT[variant.kind](dataclasses.replace(parent, model=copy.deepcopy(parent.model)), variant)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        return
    call, module = calls(parent, 0)[subblock], made(parent, 0, subblock, variant)
    if variant == NO_OP:
        assert not call.replay(module).any()
    elif subblock == ATTENTION:  # each token attends to itself: so does the first one in the parent
        torch.testing.assert_close(call.replay(module)[:, 0], call.output_BTD[:, 0], atol=1e-5, rtol=1e-4)
    else:
        hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(module(hidden), without_nonlinearity(parent, hidden), atol=1e-5, rtol=1e-4)


@every_child
@torch.no_grad()
def test_a_child_is_the_parent_with_its_variants_swapped_in(name, subblock, variant):
    parent, child = parent_of(name), child_of(name, subblock, variant)
    before, layers = parent.model(IDS, use_cache=False).logits, child.get_submodule(parent.family.layers)
    with contextlib.ExitStack() as stack:
        for layer, at, chosen in architecture_of(name, subblock, variant).items():
            if chosen != PARENT:
                module = build_subblock(parent, layer, at, chosen)
                module.load_state_dict(get_subblock(layers[layer], parent.family.subblock(at).modules).state_dict())
                stack.enter_context(swapped(parent, layer, at, module))
        torch.testing.assert_close(parent.model(IDS, use_cache=False).logits, child(IDS, use_cache=False).logits)
    assert torch.equal(parent.model(IDS, use_cache=False).logits, before)  # and nothing is left behind


# What a family's attention and FFN add to the residual stream is the output of these modules of a layer; by hand, not from FAMILIES.
ADDED = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neo": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
}
FIRST = {"gpt2": ("attn", "mlp"), "gpt_neo": ("attn.attention", "mlp"), "opt": ("self_attn", "fc1")}  # module of a layer that reads
LAST = FIRST | {"opt": ("self_attn", "fc2")}  # and that answers, before any norm
KEYS_AND_VALUES = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}


def answer(output, replacement: torch.Tensor):
    return (replacement, *output[1:]) if isinstance(output, tuple) else replacement


def do_no_op(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    added = ADDED.get(name, ("self_attn", "mlp"))[SUBBLOCKS.index(subblock)]
    zero = lambda module, args, output: answer(output, torch.zeros_like(output[0] if isinstance(output, tuple) else output))  # noqa: E731
    layer.get_submodule(added).register_forward_hook(zero)


def do_linear(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    read, seen = {}, SUBBLOCKS.index(subblock)
    first, last = (layer.get_submodule(where.get(name, ("self_attn", "mlp"))[seen]) for where in (FIRST, LAST))
    matrix = theirs.get_submodule(FIRST.get(name, ("self_attn", "mlp"))[seen])
    first.register_forward_pre_hook(
        lambda module, args, kwargs: read.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    last.register_forward_hook(
        lambda module, args, output: answer(output, read["x"] @ matrix.weight.T + (0 if matrix.bias is None else matrix.bias))
    )


def do_kv(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    """The parent's own module with the child's key-value heads as often as it has heads."""
    attention, few = (each.get_submodule(FIRST.get(name, ("self_attn",))[0]) for each in (layer, theirs))
    size = attention.head_dim
    for part, module in attention.named_modules():
        for key, tensor in rows(module).items():
            fewer = rows(few.get_submodule(part))[key]
            if tensor.shape != fewer.shape:
                num_queries = 4 * size if part in KEYS_AND_VALUES.get(name, []) else 0
                parts = fewer[num_queries:].unflatten(0, (-1, variant.size, size))  # keys and values, or one of them
                times = (len(tensor) - num_queries) // (len(fewer) - num_queries)
                tensor.copy_(torch.cat([fewer[:num_queries], parts.repeat_interleave(times, dim=1).flatten(0, 2)]))


def do_window(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    age = torch.arange(16)[:, None] - torch.arange(16)[None]
    mask = torch.zeros(16, 16).masked_fill((age < 0) | (age >= variant.size), torch.finfo(torch.float32).min)[None, None]
    layer.get_submodule(FIRST.get(name, ("self_attn",))[0]).register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )


def kept_of(whole: torch.Tensor, part: torch.Tensor) -> list[int]:
    """Which of the first dimension's entries `part` has."""
    return [next(i for i, entry in enumerate(whole) if torch.equal(entry, mine)) for mine in part]


def do_w(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    """The columns of the last projection that the child lacks are zero."""
    last = {"gpt2": "mlp.c_proj", "gpt_neo": "mlp.c_proj", "opt": "fc2"}.get(name, "mlp.down_proj")
    columns = rows(layer.get_submodule(last))["weight"].T
    cut = set(range(len(columns))) - set(kept_of(columns, rows(theirs.get_submodule(last))["weight"].T))
    assert len(cut) == len(columns) - variant.size
    columns[sorted(cut)] = 0


def do_e(name: str, layer, subblock: str, theirs, variant: Variant) -> None:
    """The router's logits of the experts that the child lacks are minus infinity."""
    router, whole = layer.mlp.gate, layer.mlp.gate.weight
    cut = sorted(set(range(8)) - set(kept_of(whole, theirs.mlp.gate.weight)))
    assert len(cut) == 8 - variant.size
    forward, linear = router.forward, torch.nn.functional.linear

    def masked(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda x, w: linear(x, w).index_fill(-1, torch.tensor(cut), float("-inf")))
            return forward(*args, **kwargs)

    router.forward = masked


DO = {"no_op": do_no_op, "linear": do_linear, "kv": do_kv, "window": do_window, "w": do_w, "e": do_e}


def far_from_hooked(parent: Parent, child, architecture: Architecture) -> float:
    """How far the child's logits are from those of the untouched parent, in whose modules hooks do what the variants should."""
    name, model = parent.model.config.model_type, copy.deepcopy(parent.model)
    layers, theirs = (each.get_submodule(parent.family.layers) for each in (model, child))
    for layer, subblock, variant in architecture.items():
        if variant != PARENT:
            DO[variant.kind](name, layers[layer], subblock, theirs[layer], variant)
    return (model(IDS, use_cache=False).logits - child(IDS, use_cache=False).logits).abs().max().item()


@every_child
@torch.no_grad()
def test_a_child_is_the_untouched_parent_in_which_hooks_do_what_its_variants_should(name, subblock, variant):
    child, architecture = child_of(name, subblock, variant), architecture_of(name, subblock, variant)
    assert far_from_hooked(parent_of(name), child, architecture) < 2e-5


@every_child
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(name, subblock, variant):
    child = child_of(name, subblock, variant)
    full = child(IDS, use_cache=False).logits
    caches = {"made by the model": None, "dynamic without config": DynamicCache()}
    if parent_of(name).model.config.model_type != "gpt_neo":  # transformers' own cannot read a static cache
        caches["static"] = StaticCache(config=child.config, max_cache_len=20)
    for kind, cache in caches.items():
        out = child(IDS[:, :9], past_key_values=cache, use_cache=True)
        logits = [out.logits]
        for start, end in ((9, 10), (10, 11), (11, 14), (14, 15), (15, 16)):
            logits.append(child(IDS[:, start:end], past_key_values=out.past_key_values, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, atol=2e-5, rtol=1e-4, msg=lambda m, k=kind: f"{k} cache: {m}")


@every_parent
@torch.no_grad()
def test_generate_gives_the_same_tokens_with_a_cache_and_with_padding(name):
    child = child_of(name, "all", "mixed")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    uncached = child.generate(IDS[:, :8], use_cache=False, **options)
    assert torch.equal(child.generate(IDS[:, :8], **options), uncached)
    if name in ("mistral", "qwen3", "gemma2"):  # whose layers make masks of their own, which generate's would take the place of
        assert torch.equal(child.generate(IDS[:, :8], cache_implementation="static", **options), uncached)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS[:, :8]], 1)
    assert torch.equal(child.generate(padded, attention_mask=(padded != 0).long(), **options)[:, 3:], uncached)


@every_parent
@torch.no_grad()
def test_another_attention_implementation_reaches_the_layers_that_differ_too(name):
    child = copy.deepcopy(child_of(name, "all", "mixed"))
    child.set_attn_implementation("eager")
    configs = [module.config for module in child.get_submodule(parent_of(name).family.layers).modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in [*configs, child.config]} == {"eager"}
    torch.testing.assert_close(child(IDS).logits, child_of(name, "all", "mixed")(IDS).logits, atol=1e-5, rtol=1e-4)


@every_child
@torch.no_grad()
def test_a_saved_child_loads_with_the_same_logits(name, subblock, variant, tmp_path):
    child = child_of(name, subblock, variant)
    save_child(child, parent_of(name).tokenizer, tmp_path / "child")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "child", trust_remote_code=True, output_loading_info=True)
    assert type(loaded).__module__.startswith("transformers_modules.")  # the file that travels, not this project's
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(IDS).logits, child(IDS).logits)


@every_child
@torch.no_grad()
def test_sizes_are_those_of_the_modules_and_the_cache(name, subblock, variant):
    parent, child = parent_of(name), child_of(name, subblock, variant)
    outside, blocks, kv_bytes = sum(p.numel() for p in parent.model.parameters()), 0, 0
    for layer, at, chosen in architecture_of(name, subblock, variant).items():
        original = parent.module(layer, at)
        module = original if chosen == PARENT else build_subblock(parent, layer, at, chosen)
        outside -= num_params(parent, layer, at, original)
        blocks += num_params(parent, layer, at, module)
        if at == ATTENTION:
            held = kv_cache(module, layer, calls(parent, layer)[ATTENTION])
            kept = min(IDS.shape[1], held.window - 1) if held.window else IDS.shape[1]  # of a full window the step adds the last itself
            kv_bytes += held.bytes_per_token * kept * len(IDS)
    assert blocks + outside == sum(p.numel() for p in child.parameters())
    cache = child(IDS, use_cache=True).past_key_values
    assert sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.layers) == kv_bytes


@torch.no_grad()
def test_a_copy_of_a_windowed_child_sees_its_own_padding():
    child = child_of("mistral", "all", "mixed")
    child(IDS, attention_mask=torch.ones_like(IDS))
    padded, mask = torch.cat([IDS[:, :3], IDS], dim=1), torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = copy.deepcopy(child)(padded, attention_mask=mask, position_ids=position_ids).logits[:, 3:]
    torch.testing.assert_close(logits, child(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "opt"])
@torch.no_grad()
def test_multi_head_families_get_a_cache_that_is_really_smaller(name):
    parent = parent_of(name)
    held = {
        str(variant): kv_cache(build_subblock(parent, 1, ATTENTION, variant), 1, calls(parent, 1)[ATTENTION])
        for variant in (Variant("kv", 1), Variant("kv", 2), NO_OP)
    }
    assert held == {"kv1": KvCache(2 * 16 * 4, 0), "kv2": KvCache(2 * 2 * 16 * 4, 0), "no_op": KvCache(0, 0)}
    assert kv_cache(parent.module(1, ATTENTION), 1, calls(parent, 1)[ATTENTION]) == KvCache(4 * 2 * 16 * 4, 0)


@torch.no_grad()
def test_our_attention_with_all_heads_is_the_family_s_own():
    for name in ("gpt2", "gpt_neo", "opt"):
        parent = parent_of(name)
        for layer in range(3):
            original, names = parent.module(layer, ATTENTION), parent.family.attention
            ours = GroupedAttention(original, parent.model.config, 4, [names.q, names.k, names.v, names.last], layer)
            for ours_now, theirs in zip(ours.parameters(), original.parameters(), strict=True):
                assert ours_now.shape == theirs.shape
            ours.load_state_dict(original.state_dict())
            call = calls(parent, layer)[ATTENTION]
            if getattr(original, "attention_type", "") != "local":  # whose window is a mask, see the window variants
                torch.testing.assert_close(call.replay(ours.eval()), call.output_BTD, atol=1e-5, rtol=1e-4)


def test_a_llama_like_family_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "granite", Family())  # the one line
    monkeypatch.setitem(PARENTS, "granite", {"model_type": "granite"})
    monkeypatch.setitem(FAMILY_OF, "granite", Family())
    test_the_all_parent_child_is_the_parent_bit_for_bit("granite", tmp_path)
    for what in operators(Family()):
        test_a_variant_does_what_the_parent_does_without_what_was_cut("granite", *what)
    for what in [*operators(Family()), ("all", "mixed")]:
        test_a_child_is_the_parent_with_its_variants_swapped_in("granite", *what)
        test_cached_decoding_equals_the_full_forward("granite", *what)
        test_a_saved_child_loads_with_the_same_logits("granite", *what, tmp_path)
        test_sizes_are_those_of_the_modules_and_the_cache("granite", *what)


@pytest.mark.parametrize(
    ("name", "subblock", "text", "complaint"),
    [
        ("llama", ATTENTION, "window8", "'window8' is not a variant of attention in llama parents; known kinds: kv, linear"),
        ("opt", ATTENTION, "window50%", "'window50%' is not a variant of attention in opt parents"),
        ("llama", FFN, "e4", "'e4' is not a variant of ffn in llama parents; known kinds: w, linear"),
        ("qwen3_moe", FFN, "w64", "'w64' is not a variant of ffn in qwen3_moe parents; known kinds: e, linear"),
        ("qwen3_moe", FFN, "e1", "num_experts is 8; expected between 2 and 7"),
        ("mistral", ATTENTION, "window12", "sliding_window is 12; expected between 2 and 11"),
        ("qwen2", ATTENTION, "window1", "sliding_window is 512; expected between 2 and 511"),
        ("gpt2", ATTENTION, "kv3", r"num_key_value_heads is 4; expected one of \[1, 2\]"),
    ],
)
def test_a_variant_that_the_family_cannot_have_is_refused(name, subblock, text, complaint):
    parent = parent_of(name)
    with pytest.raises(ValueError, match=complaint):
        resolve_space({ATTENTION: [], FFN: [], subblock: [text]}, parent.model.config, parent.family)


@pytest.mark.parametrize(
    ("name", "attention", "ffn"),
    [("qwen3_moe", ["kv1", "window256"], ["e4", "e2"]), ("gpt_neo", ["kv2", "window4"], ["w96", "w32"]), ("gpt2", ["kv2"], ["w96", "w32"])],
)
def test_shares_become_sizes_of_every_kind(name, attention, ffn):
    parent, kind = parent_of(name), ffn[0][0]
    window = ["window50%"] if "window" in parent.family.size_keys else []
    space = {ATTENTION: ["kv50%", *window], FFN: [f"{kind}55%", f"{kind}10%", f"{kind}100%"]}
    resolved = resolve_space(space, parent.model.config, parent.family)
    assert [*map(str, resolved[ATTENTION])] == ["parent", *attention] and [*map(str, resolved[FFN])] == ["parent", *ffn]


@pytest.mark.parametrize(
    ("model_type", "changes", "complaint"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"qwen3_moe parents with mlp_only_layers=\[1\] are not supported"),
        ("gpt2", {"add_cross_attention": True}, "gpt2 parents with add_cross_attention=True are not supported"),
    ],
)
def test_a_layout_that_the_family_does_not_cover_is_refused(model_type, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        pico_parent(model_type, **changes)


GPT_OSS = Ffn(inner=("experts.gate_up_proj",) * 2, last="experts.down_proj", router="router")
KV_OF_GPT2 = dataclasses.replace(FAMILIES["gpt2"], attention=dataclasses.replace(FAMILIES["gpt2"].attention, multi_head=False))
MISFITS = [
    ("cohere2", Family(), "ffn.norms is 'post_attention_layernorm', but Cohere2DecoderLayer of layer 0 has no such module. Modules .*mlp"),
    ("cohere2", Family(ffn=Ffn(norms=())), "attention.norms has 'input_layernorm', which attention does not have alone"),
    ("cohere2", Family(attention=Attention(norms=()), ffn=Ffn(norms=("input_layernorm",))), "ffn.norms has 'input_layernorm'"),
    ("gpt_oss", Family(ffn=EXPERTS), "ffn.router is 'gate', but the ffn of layer 0 has no such module. Modules .*mlp.router, mlp.experts"),
    ("gpt_oss", Family(ffn=GPT_OSS), r"ffn.module is 'mlp', which returns a tuple \(Tensor, Tensor\); expected one tensor"),
    ("bloom", Family(), "layers is 'model.layers', but BloomForCausalLM has its layers in transformer.h"),
    ("bitnet", Family(), r"size_keys\['w'\] is 'intermediate_size', which changes mlp.ffn_sub_norm.weight too, and no variant fills that"),
    ("gemma2", Family(), "ffn.norms has 'post_attention_layernorm', which ffn does not have alone"),
    ("llama", Family(attention=Attention("attn")), "attention.module is 'attn', but LlamaDecoderLayer of layer 0 has no such module"),
    ("llama", Family(attention=Attention(q="query")), "attention.q is 'query', but the attention of layer 0 has no such module"),
    ("llama", Family(attention=Attention(last="c_proj")), "attention.last is 'c_proj', but the attention"),
    ("llama", Family(attention=Attention(norms=("ln_1",))), "attention.norms is 'ln_1', but LlamaDecoderLayer"),
    ("llama", Family(attention=Attention(multi_head=True)), r"size_keys\['kv'\] is 'num_key_value_heads', but no layer can be made"),
    ("llama", Family(ffn=Ffn(inner=("up", "down"))), "ffn.inner is 'up', but the ffn of layer 0"),
    ("llama", Family(ffn=Ffn(inner=("up_proj", "up_proj"))), "ffn.inner has 'up_proj' 2 times, but its outputs are not 2 times"),
    ("llama", Family(ffn=Ffn(last="act_fn")), "ffn.last is 'act_fn', which is no projection: it has no weight"),
    ("llama", Family(ffn=Ffn(more=("act",))), "ffn.more is 'act', but LlamaDecoderLayer"),
    ("llama", Family(returns_tuple=True), r"returns_tuple is True, but a layer returns a Tensor of shape \(2, 5, 64\)"),
    ("llama", Family(size_keys={"w": "ffn_dim"}), r"size_keys\['w'\] is 'ffn_dim', by which a layer has 256; layer 0 has 160"),
    ("gpt2", KV_OF_GPT2, r"size_keys\['kv'\] is 'num_key_value_heads', by which a layer has 2; layer 0 has 4"),
]


@pytest.mark.parametrize(("model_type", "family", "complaint"), MISFITS, ids=[f"{name}-{words[:20]}" for name, _, words in MISFITS])
def test_a_descriptor_that_does_not_fit_the_modules_is_refused_by_its_field(model_type, family, complaint, monkeypatch):
    monkeypatch.setitem(FAMILIES, model_type, family)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "gpt_oss" else {}
    with pytest.raises(UserError, match=f"entry of FAMILIES in puzzle_core/families.py does not fit it: {complaint}"):
        load_parent("random", config={"model_type": model_type, **PICO_CONFIG, "pad_token_id": 0, **experts})


@pytest.mark.parametrize("memory_gib", [None, 1.0])
def test_a_skeleton_s_descriptor_is_checked_too(memory_gib, monkeypatch):
    for family, complaint in (
        (Family(layers="transformer.h"), "layers is 'transformer.h', but GraniteForCausalLM has its layers in model.layers"),
        (Family(ffn=Ffn(norms=("input_layernorm",))), "ffn.norms has 'input_layernorm', which ffn does not have alone"),
    ):
        monkeypatch.setitem(FAMILIES, "granite", family)
        with pytest.raises(UserError, match=complaint):
            load_parent("random", config={"model_type": "granite", **PICO_CONFIG}, skeleton=True, memory_gib=memory_gib)


@torch.no_grad()
def test_the_hooks_see_what_swapping_cannot(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "cohere2", Family(ffn=Ffn(norms=())))  # its attention and FFN read one norm
    monkeypatch.setattr(layouts, "check", lambda model, family: None)
    parent = pico_parent("cohere2", pad_token_id=0)
    architecture = Architecture(((NO_OP, PARENT),) + ((PARENT, PARENT),) * 3)
    child = make_child(parent, architecture, variants(parent, tmp_path))
    with swapped(parent, 0, ATTENTION, build_subblock(parent, 0, ATTENTION, NO_OP)):
        torch.testing.assert_close(parent.model(IDS).logits, child(IDS).logits)
    assert far_from_hooked(parent, child, architecture) > 0.1


def test_norms_on_the_residual_stream_stay_where_a_subblock_is_skipped():
    assert family_for(parent_of("opt as 350m").model.config).ffn.norms == ()
    child = child_of("opt as 350m", FFN, NO_OP)
    assert isinstance(child.model.decoder.layers[0].final_layer_norm, torch.nn.LayerNorm)
    assert isinstance(child_of("opt", FFN, NO_OP).model.decoder.layers[0].final_layer_norm, torch.nn.Identity)


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3", "gpt2"])
@torch.no_grad()
def test_the_best_head_of_each_group_moves_the_output_least(name):
    parent, call = parent_of(name), calls(parent_of(name), 0)[ATTENTION]
    names, original = parent.family.attention, parent.module(0, ATTENTION)

    def error(module) -> float:
        return (call.replay(module) - call.output_BTD).square().sum().item()

    errors = {}
    for how in KV_HEADS:
        module = build_subblock(parent, 0, ATTENTION, Variant("kv", 1))
        assert initialise(original, module, names, Variant("kv", 1), Basis(kv_heads=how, error=error)) == how
        errors[how] = error(module)
    heads = rows(original.get_submodule(names.v))["weight"][-parent.family.whole_size("kv", parent.model.config) * original.head_dim :]
    kept = rows(module.get_submodule(names.v))["weight"][-original.head_dim :]
    assert any(kept.equal(head) for head in heads.unflatten(0, (-1, original.head_dim)))
    each = []
    for head in range(parent.family.whole_size("kv", parent.model.config)):
        _merge_kv_heads(original, module, names, 1, [head])
        each.append(error(module))
    assert errors["best"] == min(each) < max(each) and errors["first"] == each[0] and errors["mean_pool"] not in each


@pytest.mark.parametrize("name", ["gpt_neo", "opt", "mistral", "qwen3_moe"])
def test_costs_count_what_the_cache_keeps(name):
    parent = parent_of(name)
    space = {s: [v for at, v in operators(parent.family) if at == s] for s in SUBBLOCKS}
    backend = costs.Torch(repeats=1, warmup=0, decode_steps=1)
    table, _ = costs.profile(parent, space, [Scenario(1, 14, 2)], backend, tables.read_known("costs"))
    table = table[table.subblock == ATTENTION].set_index(["variant", "metric", "layer"]).value
    layers = [0, 1, 2] if name == "gpt_neo" else [-1]  # whose layers are local, global, local
    heads = {"gpt_neo": 4, "opt": 4}.get(name, 2)
    for layer in layers:
        held = ("kv_bytes_per_token", "kv_window")
        own = {variant: tuple(table[variant, metric, layer] for metric in held) for variant, *_ in table.index}
        window = 12 if name == "mistral" else 0
        assert own["parent"] == (2 * heads * 16 * 4, window) and own["linear"] == own["no_op"] == (0, 0)
        assert own["kv1"] == (2 * 16 * 4, 8 if name == "gpt_neo" and layer != 1 else window)  # of gpt_neo's local layers ours alone slide
        assert own.get("window5", (2 * heads * 16 * 4, 5)) == (2 * heads * 16 * 4, 5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "qwen3_moe", "gemma3_text"])
def test_bld_refits_trains_and_scoring_scores_every_operator(name, tmp_path):
    parent, last_layer = parent_of(name), 2
    corpus = Corpus(parent.tokenizer, EXCERPT)
    made = {}
    for ridge in (None, [0.01]):
        settings = bld.Settings(32, 2, 256, 64, 128, ridge, 1e-3, 0.0, 0.0, 1.0)
        space = {s: [v for at, v in operators(parent.family) if at == s] for s in SUBBLOCKS}
        jobs = [job for job in bld.jobs(parent, [space] * 3, settings, 0, corpus) if job.layer == last_layer]
        table, _ = bld.train_library(parent, jobs, corpus, settings, 0, tmp_path / str(ridge))
        made[str(ridge)] = table.set_index(["subblock", "variant"])
    bare, fitted = made["None"], made["[0.01]"]
    refitted = fitted.init.str.contains("ridge")
    assert set(fitted.index[~refitted].get_level_values("variant")) <= {"no_op", "e4"} and refitted.sum() >= 3
    for what in ((ATTENTION, "kv1"), (ATTENTION, "linear"), (FFN, "linear")):
        assert fitted.loss_before[what] < bare.loss_before[what]
    trained = bare[bare.index.get_level_values("variant") != "no_op"]
    assert (trained.num_tokens == 64).all() and (trained.loss_after <= trained.loss_before).all()
    assert set(trained.outcome) <= {"trained", "rolled back"} and "trained" in set(trained.outcome)

    settings, blocks = scoring.Settings(64, 32, 2, ["kl", "lm_loss"]), tmp_path / str(ridge)
    empty = pd.DataFrame(columns=list(tables.SCHEMAS["scores"].columns))
    scores, _ = scoring.score_library(parent, table, blocks, corpus, settings, empty, lambda rows: None)
    scores = tables.check("scores", scores).set_index(["subblock", "variant", "metric"]).value
    ids = torch.as_tensor(corpus.batches("development", 64, 32, 2, seed="score")[0])
    for subblock, variant in ((ATTENTION, Variant("kv", 1)), (FFN, LINEAR)):
        pair = (variant, PARENT) if subblock == ATTENTION else (PARENT, variant)
        child = make_child(parent, Architecture(((PARENT, PARENT),) * last_layer + (pair,)), tables.variant_files(table, blocks))
        with torch.no_grad():
            p, c = (model(ids).logits.log_softmax(-1) for model in (parent.model, child))
        kl = (p.exp() * (p - c)).sum() / ids.numel()
        assert scores[subblock, str(variant), "kl"] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
