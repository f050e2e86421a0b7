"""Children out: generate, compile, save again; what comes along with a checkpoint; its model card; healed once."""
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXCERPT, PICO, architecture, pico_parent, variants
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_config import composed
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    StaticCache,
    pipeline,
)

import stages.assemble
import stages.gkd
from puzzle_core import cards, evaluation, gkd, modeling_puzzle, pools, realised, tables
from puzzle_core.bld import Settings, jobs, train_library
from puzzle_core.children import load_child, make_child, save_child
from puzzle_core.config import plain
from puzzle_core.corpus import Corpus
from puzzle_core.families import FAMILIES, family_for
from puzzle_core.files import read_json, write_json
from puzzle_core.parents import Origin, load_parent
from puzzle_core.schedule import lr_factor
from puzzle_core.spec import LINEAR, NO_OP, PARENT, Architecture, Constraint, Scenario, Solution, Variant

MIXED = architecture("no_op w80", "linear parent", "kv1 no_op", "parent linear")
CPU = torch.device("cpu")
HEAL = (
    "{seq_len:64,batch_size:4,train_tokens:1024,lr:2e-3,warmup_fraction:0.1,weight_decay:0,grad_clip:1,kl_weight:1,cosine_weight:1,"
    "save_every_steps:null}"
)
IDS = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parent():
    """A parent with a chat template and a generation config of its own."""
    parent = pico_parent()
    parent.tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    parent.model.generation_config = GenerationConfig(temperature=0.7, top_p=0.9, do_sample=True, eos_token_id=0, pad_token_id=0)
    return parent


@pytest.fixture(scope="module")
def folder(parent, tmp_path_factory) -> Path:
    """A child with every kind of variant, layer 0 without attention, as its user gets it."""
    folder = tmp_path_factory.mktemp("children") / "child"
    save_child(make_child(parent, MIXED, variants(parent, folder.parent)), parent.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def child(folder):
    return load_child(folder, torch.float32, CPU)


@torch.no_grad()
def greedy(model, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """The continuation of one prompt [T], token by token, by whole forwards without a cache."""
    ids = prompt[None]
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding_gives_the_uncached_greedy_continuation_token_by_token(child, cache):
    prompts = [IDS[0], IDS[1, :7]]
    padded = torch.stack([torch.cat([p.new_zeros(12 - len(p)), p]) for p in prompts])
    out = child.generate(
        padded, attention_mask=(padded != 0).long(), cache_implementation=cache, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert out[:, 12:].tolist() == [greedy(child, prompt, 10) for prompt in prompts]


def test_beam_search_moves_the_caches_of_all_layers(child):
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(child.generate(IDS, **options), child.generate(IDS, use_cache=False, **options))


@torch.no_grad()
def test_torch_compile_makes_one_graph_that_says_the_same(child):
    torch._dynamo.reset()
    compiled = torch.compile(child, fullgraph=True, backend="aot_eager")  # inductor would take a minute here
    torch.testing.assert_close(compiled(IDS).logits, child(IDS).logits)  # the model makes its own dynamic cache


@torch.no_grad()
def test_a_compiled_child_decodes_through_a_static_cache(child):
    torch._dynamo.reset()
    compiled, cache = torch.compile(child, fullgraph=True, backend="eager"), StaticCache(config=child.config, max_cache_len=16)
    parts = [compiled(ids, past_key_values=cache, use_cache=True).logits for ids in IDS.split([10, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), child(IDS, use_cache=False).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_loaded_child_saved_by_transformers_alone_loads_again(child, tmp_path):
    child.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(IDS).logits, child(IDS).logits)
    assert (tmp_path / "again" / "modeling_puzzle.py").read_text() == Path(modeling_puzzle.__file__).read_text()
    assert again.config.to_dict()["per_layer_config"] == child.config.to_dict()["per_layer_config"]


def test_tokenizer_chat_template_and_generation_config_come_along(parent, folder, child):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]Hello"
    assert tokenizer("a text")["input_ids"] == parent.tokenizer("a text")["input_ids"]
    assert child.generation_config.to_diff_dict() == parent.model.generation_config.to_diff_dict()


@torch.no_grad()
def test_an_all_parent_child_is_a_stock_checkpoint_bit_equal_to_the_parent(parent, tmp_path):
    same = make_child(parent, Architecture.uniform(4), variants(parent, tmp_path))
    save_child(same, parent.tokenizer, tmp_path / "same")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "same", trust_remote_code=False)
    assert type(loaded) is LlamaForCausalLM and torch.equal(loaded(IDS).logits, parent.model(IDS).logits)
    for name, tensor in parent.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    written = json.loads((tmp_path / "same" / "config.json").read_text())
    assert not {"per_layer_config", "auto_map", "puzzle", "linear_subblocks"} & set(written)
    assert not list((tmp_path / "same").glob("*.py"))


# ---------------------------------------------------------------------------------- every way in gives the child or an error

ROUTES = {
    "AutoModelForCausalLM, trusted": lambda path, stock: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True),
    "pipeline, trusted": lambda path, stock: pipeline("text-generation", model=str(path), trust_remote_code=True).model,
    "this project": lambda path, stock: load_child(path, torch.float32, CPU),
    "AutoModelForCausalLM": lambda path, stock: AutoModelForCausalLM.from_pretrained(path),
    "AutoModelForCausalLM, not trusted": lambda path, stock: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False),
    "AutoModel": lambda path, stock: AutoModel.from_pretrained(path),
    "AutoModel, trusted": lambda path, stock: AutoModel.from_pretrained(path, trust_remote_code=True),
    "AutoConfig": lambda path, stock: AutoConfig.from_pretrained(path),
    "pipeline": lambda path, stock: pipeline("text-generation", model=str(path)),
    "the parent's class": lambda path, stock: stock.from_pretrained(path),
    "the parent's class, by its config": lambda path, stock: stock.from_pretrained(path, config=stock.config_class.from_pretrained(path)),
    "the parent's class without a head": lambda path, stock: MODEL_MAPPING[stock.config_class].from_pretrained(path),
    "a parent of it": lambda path, stock: load_parent("directory", path=str(path)),
}
GIVE_THE_CHILD = [*ROUTES][:3]
KINDS = {
    "llama skips": ("llama", ("no_op parent", "parent no_op")),
    "llama linear": ("llama", ("linear parent", "parent linear")),
    "llama all alike": ("llama", ("kv1 w80",) * 4),
    "mistral windows": ("mistral", ("window5 parent", "parent parent")),
    "qwen2 windows": ("qwen2", ("window5 parent",) * 3),
    "gemma3 windows": ("gemma3_text", ("parent parent", "window5 parent")),
    "gemma3 skips": ("gemma3_text", ("no_op parent",)),
    "gpt_neo windows": ("gpt_neo", ("parent parent", "window5 parent")),
    "gpt2 skips": ("gpt2", ("no_op parent", "parent no_op")),
    "gpt2 kv": ("gpt2", ("kv1 parent",) * 3),
    "opt linear": ("opt", ("parent linear", "linear parent")),
    "phi3 skips": ("phi3", ("parent no_op",)),
    "mixtral experts": ("mixtral", ("parent e4",)),
    "qwen3_moe skips": ("qwen3_moe", ("no_op parent",)),
}


@functools.cache
def saved(kind: str) -> tuple[Path, type, torch.Tensor]:
    """A child's folder, its parent's class and its logits."""
    model_type, changed = KINDS[kind]
    parent, folder = pico_parent(model_type), Path(tempfile.mkdtemp())
    unchanged = ("parent parent",) * (len(parent.layers) - len(changed))
    child = make_child(parent, architecture(*changed, *unchanged), variants(parent, folder))
    save_child(child, parent.tokenizer, folder / "child")
    with torch.no_grad():
        return folder / "child", type(parent.model), child(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
@torch.no_grad()
def test_whatever_loads_a_child_gets_the_child_or_an_error(route, kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "n")  # whether to run the child's code
    path, stock, logits = saved(kind)
    if route in GIVE_THE_CHILD:
        loaded = ROUTES[route](path, stock).eval()
        assert family_for(loaded.config) == family_for(stock.config_class())
        assert loaded.config.model_type == "puzzle_" + stock.config_class.model_type and torch.equal(loaded(IDS).logits, logits)
        return
    refusals = "contains custom code which must be executed|this is a Puzzle child|Unrecognized configuration class|is a child already"
    with pytest.raises(ValueError, match=refusals):
        ROUTES[route](path, stock)


@pytest.mark.parametrize("kind", ["llama skips", "gpt2 kv", "gemma3 windows"])
def test_a_child_s_tokenizer_needs_no_trust(kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    path, _, _ = saved(kind)
    assert AutoTokenizer.from_pretrained(path)("a text").input_ids == pico_parent().tokenizer("a text").input_ids


def test_this_project_runs_no_code_of_a_child_s_folder(tmp_path):
    path = shutil.copytree(saved("llama skips")[0], tmp_path / "child")
    with open(path / "modeling_puzzle.py", "a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="modeling_puzzle.py is not the modelling file of this version"):
        load_child(path, torch.float32, CPU)
    assert not (tmp_path / "ran").exists()


def test_a_child_inherits_no_code_of_its_parent(parent, tmp_path):
    parent.model.config.auto_map = {"AutoModel": "theirs.Model", "AutoModelForCausalLM": "theirs.ForCausalLM"}
    try:
        for chosen, own in (
            (MIXED, {"AutoConfig": "modeling_puzzle.PuzzleLlamaConfig", "AutoModelForCausalLM": "modeling_puzzle.PuzzleLlamaForCausalLM"}),
            (Architecture.uniform(4), None),
        ):
            save_child(make_child(parent, chosen, variants(parent, tmp_path)), parent.tokenizer, tmp_path / str(own))
            assert read_json(tmp_path / str(own) / "config.json").get("auto_map") == own
    finally:
        del parent.model.config.auto_map


# ---------------------------------------------------------------------------------- every tensor is the parent's or a variant's


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_tensor_of_a_child_is_left_as_it_was_allocated(model_type, tmp_path):
    parent = pico_parent(model_type)
    ffn = Variant("e", 4) if "e" in parent.family.size_keys else Variant("w", 80)
    layers = [(Variant("kv", 1), LINEAR), (LINEAR, ffn), (NO_OP, PARENT), (PARENT, NO_OP)]
    weights_of = variants(parent, tmp_path)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        child = make_child(parent, Architecture(tuple(layers[: len(parent.layers)])), weights_of)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in [*child.named_parameters(), *child.named_buffers()]:
        assert tensor.isfinite().all(), name


def test_a_tensor_that_neither_the_parent_nor_a_variant_has_is_named(parent, tmp_path):
    weights_of = variants(parent, tmp_path)

    def forgets(layer, subblock, variant):
        path, fingerprint = weights_of(layer, subblock, variant)
        save_file({name: tensor for name, tensor in load_file(path).items() if name != "o_proj.weight"}, path)
        return path, fingerprint

    with pytest.raises(ValueError, match='(?s)3-attention-kv1.safetensors: not the weights of this variant.*"o_proj.weight"'):
        make_child(parent, architecture(*["parent parent"] * 3, "kv1 parent"), forgets)


def test_a_tensor_whose_shape_changes_outside_of_its_variant_is_named(parent, tmp_path, monkeypatch):
    build_layer = modeling_puzzle.build_layer

    def with_norm_that_changes(layer, config, changes, index, puzzle):
        built = build_layer(layer, config, changes, index, puzzle)
        if "num_key_value_heads" in changes:
            built.input_layernorm = torch.nn.RMSNorm(32)
        return built

    weights_of, chosen = variants(parent, tmp_path), architecture("kv1 parent", *["parent parent"] * 3)
    monkeypatch.setattr(modeling_puzzle, "build_layer", with_norm_that_changes)
    with pytest.raises(AssertionError, match=r"layers.0.input_layernorm.weight of the child is .*\(32,\), the parent's .*\(64,\)"):
        make_child(parent, chosen, weights_of)


def solution_of(chosen: Architecture) -> Solution:
    totals = {"latency_ms": 5.0, "memory_mib": 3.0, "num_params": 1000.0}
    parent_totals = {name: 2 * value for name, value in totals.items()}
    constraints = (Constraint("speedup", 1.5, "latency_ms", 6.7), Constraint("memory_mib", 0.75, "memory_mib", 4.5, relative=True))
    return Solution(chosen, Scenario(2, 16, 4), "kl", 0.25, 0.25, "optimal", 0.0, totals, parent_totals, constraints)


ROW = {"speedup": 1.0, "latency_ms": 10.0, "memory_mib": 6.0, "num_params": 2000.0, "kl": 0.0, "perplexity": 20.5, "top1_agreement": 1.0}


@pytest.mark.parametrize("license", ["apache-2.0", None])
def test_a_model_card_says_parent_licence_constraints_prediction_and_measurement(parent, tmp_path, license):
    origin = Origin("owner/model", "[owner/model](https://huggingface.co/owner/model) at revision abc", license, "owner/model")
    object.__setattr__(parent, "origin", origin)
    answers = {"piqa_accuracy": 0.6, "piqa_accuracy_stderr": 0.01, "piqa_chance": 0.5}
    answers |= {"accuracy_retained": 0.9, "accuracy_retained_stderr": 0.05}
    measured = {"parent": {**ROW, **answers, "latency_ms": 20.0}, "child": {**ROW, **answers, "speedup": 1.875, "kl": 0.375}}
    cards.write(tmp_path, parent, solution_of(MIXED), measured, "Put together.", "excerpt")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == (license, "owner/model", "text-generation")
    assert {"puzzle", "custom_code"} <= set(card.data.tags)
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {"kl": 0.375, "perplexity": 20.5, "top1_agreement": 1.0, "accuracy": 0.6}
    rows = ("| 2.00 × |  |", "| 1.88 × | 20 → 10 |", "| 2 | kv1 | no_op |", "| this child | 0.600 ± 0.010 | 90.0% ± 5.0% |")
    asked = "Asked for: speedup 1.5, memory_mib 75%"
    for words in (asked, "at revision abc", *rows, "- attention: 1 × no_op, 1 × linear", "Put together.", cards.SPEEDUP):
        assert words in card.text, words
    assert ("apache-2.0" if license else "not recorded") in card.text
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)' in card.text


def test_a_card_of_a_gguf_parent_never_calls_it_the_original(pico, tmp_path, monkeypatch):
    pico.model.save_pretrained(tmp_path / "cache")
    pico.tokenizer.save_pretrained(tmp_path / "cache")
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("puzzle_core.parents._dequantised", lambda file, sha256: tmp_path / "cache")
    parent = load_parent("gguf", path=str(tmp_path / "model.Q4_1.gguf"), license="mit")
    cards.write(tmp_path, parent, solution_of(Architecture.uniform(4)), {"parent": ROW, "child": ROW}, "", "excerpt")
    card = ModelCard.load(tmp_path / "README.md")
    assert "`model.Q4_1.gguf`, *dequantised from GGUF*: not the original checkpoint" in card.text
    assert card.data.base_model is None and "trust_remote_code" not in card.text and str(tmp_path) not in str(card)


# ---------------------------------------------------------------------------------- assemble and gkd, as stages


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What assemble and gkd read, and an assembled child."""
    data = tmp_path_factory.mktemp("stages")
    chosen = architecture("no_op parent", "parent w80", "parent no_op", "parent parent")
    cfg = config(data)
    parent = load_parent(**plain(cfg.parent))
    corpus, settings = Corpus(parent.tokenizer, plain(cfg.corpus)), Settings(64, 4, 512, 0, 256, None, 1e-3, 0.1, 0.0, 1.0)
    space = {"attention": [Variant("no_op"), Variant("parent")], "ffn": [Variant("no_op"), Variant("w", 80), Variant("parent")]}
    library, _ = train_library(parent, jobs(parent, [space] * 4, settings, 0, corpus), corpus, settings, 0, data / "blocks")
    tables.write("library", library, data / "library.parquet")
    write_json(data / "pool.json", [solution_of(one).to_json() for one in (Architecture.uniform(4, Variant("no_op")), chosen)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.assemble, "verify_reload", lambda *_: None)  # a process of its own; the pipeline's tests run it
        stages.assemble.run(cfg)
    return data


def config(data: Path, *more: str):
    small = ["evaluation.text.num_tokens=512", "evaluation.text.seq_len=64", "evaluation.repeats=1", "gkd.train_tokens=1024"]
    cfg = composed(*PICO, *small, f"data={data}", *more)
    cfg.out = str(data)
    return cfg


def figures(folder: Path) -> dict[str, float]:
    return {result.metric_type: result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results}


def test_assemble_writes_a_child_that_is_whole_or_not_there(data, tmp_path, monkeypatch):
    measured = json.loads((data / "metrics" / "child.json").read_text())
    assert figures(data / "child") == {key: pytest.approx(measured[key]) for key in ("kl", "perplexity", "top1_agreement")}
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("child", ".*"))
    monkeypatch.setattr(stages.assemble, "verify_reload", lambda *_: None)
    begun = []

    def write(folder, *_) -> None:
        begun.extend(file.name for file in folder.iterdir())
        read_json(tmp_path / "missing")

    monkeypatch.setattr(cards, "write", write)
    with pytest.raises(SystemExit):
        stages.assemble.run(config(tmp_path / "data"))
    assert "model.safetensors" in begun and not list((tmp_path / "data").glob("*child*"))


def test_assemble_keeps_the_solution_of_the_pool_whose_child_is_nearest_to_the_parent(data):
    pool, rows = read_json(data / "pool.json"), read_json(data / "plots" / "pool.json")
    assert [row["solution"] for row in rows] == [1, 2] and rows[0]["realised"] > rows[1]["realised"] > 0
    assert [row["chosen"] for row in rows] == [0, 1] and read_json(data / "chosen.json") == pool[1]
    assert set(read_json(data / "child" / "config.json")["per_layer_config"]) == {"0", "1", "2"}
    assert pools.choice(rows).startswith("solution 2 of 2, joint KL ") and {row["healed"] for row in rows} == {None}
    alone, rows = pools.best_of(None, [solution_of(MIXED)], None, None, [], None)  # nothing is run where there is no choice
    assert pools.choice(rows) == "solution 1 of 1"
    assert alone == solution_of(MIXED) and rows == [{"solution": 1, "predicted": 0.25, "realised": None, "healed": None, "chosen": 1}]


def test_assemble_keeps_the_solution_whose_child_is_nearest_after_brief_gkd_and_heals_none_twice(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("child", ".*"))
    data, healed_kl, killed_at = tmp_path / "data", pools.healed_kl, [2]
    calls = []

    def healed(*arguments) -> float:
        calls.append(arguments[1])
        if len(calls) == killed_at[0]:
            raise KeyboardInterrupt
        return healed_kl(*arguments)

    monkeypatch.setattr(pools, "healed_kl", healed)
    cfg = config(data, "realised.heal=" + HEAL)
    with pytest.raises(KeyboardInterrupt):
        stages.assemble.run(cfg)
    killed_at[0] = 0
    stages.assemble.run(cfg)
    pool, rows = read_json(data / "pool.json"), read_json(data / "plots" / "pool.json")
    assert calls == [Architecture.from_json(pool[n]["architecture"]) for n in (0, 1, 1)]  # the killed run's first is not done again
    assert all(0 < row["healed"] < row["realised"] for row in rows)
    stages.assemble.run(config(data, "realised.heal=" + HEAL, "evaluation.repeats=2"))
    stages.assemble.run(config(data, "realised.heal=" + HEAL, "evaluation.text.num_tokens=1024"))  # which is of other documents
    assert len(calls) == 3
    stages.assemble.run(config(data, "realised.heal=" + HEAL, "realised.num_tokens=1536"))
    assert len(calls) == 5
    least = min(rows, key=lambda row: row["healed"])
    assert least["chosen"] and read_json(data / "chosen.json") == pool[least["solution"] - 1]
    assert "after brief GKD" in pools.choice(rows)
    stale = list((data / ".pool").glob("*.json"))
    monkeypatch.setattr(pools, "healed_kl", lambda *arguments: None)  # it diverges
    with pytest.raises(SystemExit):
        stages.assemble.run(config(data, "realised.heal=" + HEAL.replace("2e-3", "100")))
    assert "lower lr in realised.heal" in capsys.readouterr().err and not any(path.exists() for path in stale)


def test_a_child_that_diverges_in_brief_gkd_has_no_kl(parent, tmp_path):
    corpus, batches = Corpus(parent.tokenizer, EXCERPT), [np.ones((2, 24), dtype=np.int64)]
    healing = gkd.Settings(32, 2, 640, 1e30, 0.1, 0.0, 1e30, 1.0, 1.0, None)
    assert pools.healed_kl(parent, MIXED, variants(parent, tmp_path), corpus, batches, healing, 0) is None


def test_the_pool_is_compared_on_development_text_and_reported_on_the_tests(parent):
    corpus = Corpus(parent.tokenizer, EXCERPT)
    reported = evaluation.Settings({"num_tokens": 500, "seq_len": 64, "batch_size": 2}, 0, 1, None, 1).batches(corpus)
    batches = realised.Settings(300, 32, 4).batches(corpus)
    assert [batch.shape for batch in batches] == [(4, 32)] * 3
    for split, some in (("development", batches), ("test", reported)):
        words = parent.tokenizer.decode(some[0][0])[:30]
        assert [name for name, documents in corpus.splits.items() if any(words in d.text for d in documents)] == [split]


def test_architectures_are_read_from_any_list_of_them(tmp_path):
    layers = MIXED.to_json()
    of_rivals = [{"method": "rl", "score": 1.0, "architecture": layers}, {"method": "depth", "architecture": None}]
    write_json(tmp_path / "some.json", [layers, *of_rivals])
    rows = realised.read_architectures(tmp_path / "some.json")
    assert [(row["group"], row["name"]) for row in rows] == [("some", "some 1"), ("some", "rl")]
    assert all(row["architecture"] == MIXED for row in rows)
    write_json(tmp_path / "other.json", [{"layers": layers}])
    with pytest.raises(ValueError, match="other.json is no list of architectures .*expected such as rivals.json"):
        realised.read_architectures(tmp_path / "other.json")


@pytest.mark.parametrize("memory_gib", [None, 1e-4])
def test_the_joint_kl_of_an_architecture_is_that_of_its_child(parent, tmp_path, memory_gib):
    weights_of, read = variants(parent, tmp_path), []
    several = [MIXED, Architecture.uniform(4), architecture("no_op w80", "linear parent", "kv1 w80", "linear w80"), MIXED]
    batches = [np.random.default_rng(seed).integers(1, 257, (2, 24)) for seed in range(2)]
    settings = realised.Settings(96, 24, 2, head_tokens=20, memory_gib=memory_gib)
    kls = realised.joint_kl(parent, several, lambda *row: read.append(row) or weights_of(*row), batches, settings)
    expected = [evaluation.compare(parent.model, make_child(parent, one, weights_of), batches)["child"]["kl"] for one in several]
    assert kls == pytest.approx(expected, rel=1e-5, abs=1e-7) and abs(kls[1]) < 1e-7 < kls[0]
    assert len(read) == len(set(read)) or memory_gib  # weights are read once, unless memory is short
    assert evaluation.compare(parent.model, parent.model, batches)["child"]["kl"] == pytest.approx(0, abs=1e-7)  # all is back in place


def test_what_too_few_architectures_cannot_say_is_null():
    rows = [{"predicted": p, "realised": r, "ratio": r / p if p else None} for p, r in ((0.0, 0.0), (0.5, 0.4), (0.8, 0.8))]
    assert realised.in_words(realised.agreement(rows)) == "rank correlation with the prediction 1.000, median ratio 0.900"
    assert realised.agreement(rows[:1]) == {"num_architectures": 1, "spearman": None, "median_ratio": None}
    assert realised.in_words(realised.agreement(rows[:1])) == "rank correlation with the prediction unknown, median ratio unknown"


def trains(monkeypatch, cfg) -> bool:
    """Whether gkd trains when it is run."""
    trained, distill = [], gkd.distill
    with monkeypatch.context() as patch:
        patch.setattr(gkd, "distill", lambda *arguments: trained.append(True) or distill(*arguments))
        stages.gkd.run(cfg)
    return bool(trained)


def test_gkd_measures_again_without_training_again_when_only_the_evaluation_changed(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    data, distilled = tmp_path / "data", tmp_path / "data" / "distilled"
    stages.gkd.run(config(data))
    curve, before = (data / "plots" / "gkd_curve.json").read_bytes(), figures(distilled)
    weights = (distilled / "model.safetensors").stat()
    (data / "plots" / "gkd_curve.json").unlink()  # as DVC does
    assert not trains(monkeypatch, config(data, "evaluation.text.num_tokens=1024"))
    assert (distilled / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert (data / "plots" / "gkd_curve.json").read_bytes() == curve and figures(distilled) != before
    how = ["gkd.log_every_steps=2", "gkd.save_every_steps=null", "gkd.micro_batch_size=1", "gkd.head_tokens=50", "gkd.kl_weight=1"]
    assert not trains(monkeypatch, config(data, *how))
    hot = "gkd.lr=2.0e-3"
    assert trains(monkeypatch, config(data, hot)) and not trains(monkeypatch, config(data, hot))
    (distilled / "model.safetensors").unlink()
    (distilled / "model.safetensors").write_bytes(b"damaged")
    assert trains(monkeypatch, config(data, hot)) and not trains(monkeypatch, config(data, hot))
    load_child(distilled, torch.float32, CPU)
    assert not list(data.glob(".gkd-*")) and not list(data.glob("*.part"))


def test_gkd_trains_from_its_first_step_to_its_last(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    cfg = config(tmp_path / "data", "gkd.train_tokens=5120", "gkd.save_every_steps=100")
    stages.gkd.run(cfg)
    rates = [row["learning_rate"] for row in json.loads((tmp_path / "data" / "plots" / "gkd_curve.json").read_text())]
    assert rates == pytest.approx([cfg.gkd.lr * lr_factor(step, 20, cfg.gkd.warmup_fraction) for step in range(20)])
    assert min(rates) > 0 and rates[:3] == [cfg.gkd.lr / 2, cfg.gkd.lr, cfg.gkd.lr]
