"""What serving engines get: llama.cpp computes what the checkpoint computes, nemotron-nas reads back, refusals come by name."""
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from conftest import ROOT, architecture, pico_parent, stage, variants
from safetensors import safe_open
from test_search import SCENARIO, make_tables
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from puzzle_core import export_gguf, import_gguf, modeling_puzzle, nemotron, tables
from puzzle_core.children import make_child, save_child
from puzzle_core.errors import UserError
from puzzle_core.export import SavedChild
from puzzle_core.parents import load_parent
from puzzle_core.search import Settings, constraints_from, posed, solve
from puzzle_core.spec import LINEAR, NO_OP, PARENT, Architecture, Scenario, Variant
from puzzle_core.targets import TARGETS, expressible, target_named, why_not
from puzzle_core.tokens_gguf import PRE_TOKENIZERS

P = "parent parent"
PROMPT = list(range(40, 60))
TEXT = "The  layer's 12345 heads -- don't\n\n  skip naïve 汉字?\tx=3.14,  ok  "
MIXED = (P, "no_op w80", "kv1 no_op", "parent w48")
ARCHITECTURES = {
    "the parent": (P,) * 4,
    "fewer heads and channels everywhere": ("kv1 w80",) * 4,
    "heads and widths that differ": ("kv1 parent", "parent w80", P, "kv1 w48"),
    "skipped attention": (P, "no_op parent", "no_op w64", P),
    "skipped FFN": ("parent no_op", P, "kv1 no_op", P),
    "a skipped layer": (P, "no_op no_op", P, P),
    "a skipped last layer": (P, P, P, "no_op no_op"),
    "a last layer without FFN": (P, P, "no_op w80", "kv1 no_op"),
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PARENTS = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama untied": {"tie_word_embeddings": False},
    "llama with small heads": {"head_dim": 16},
    "llama with Llama 3's rope": {"rope_parameters": LLAMA3},
    "llama with linear rope": {"rope_parameters": LINEAR_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "qwen2 with linear rope": {"model_type": "qwen2", "head_dim": 16, "rope_parameters": LINEAR_ROPE},
}


def bpe(pre_tokenizer=None, **options) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that was really trained."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def saved(path, layers, tokenizer=None, **changes):
    """A child and its checkpoint in `path`."""
    parent = pico_parent(**{"head_dim": 32, "num_hidden_layers": 4, **changes})
    child = make_child(parent, architecture(*layers), variants(parent, path))
    save_child(child, tokenizer or bpe(), path / "child")
    return child, SavedChild.read(path / "child")


class LlamaCpp:
    """llama.cpp with one GGUF file: log-probabilities of the next token."""

    def __init__(self, path, precise=True):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
        params.warmup, params.verbosity, params.cpuparams.n_threads = False, 0, 1
        if precise:  # the KV cache and the fused attention work in float16 otherwise
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def next(self, prompt: list[int] | str, vocab_size=320) -> torch.Tensor:
        """[V]; the model's own, whatever token is taken: one of plain text, as others can leave the answer empty."""
        answer = self.server.handle_completions(
            {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocab_size, "logit_bias": [[66, 1000]]}
        )
        (token,) = answer["choices"][0]["logprobs"]["content"]
        logprobs = torch.full((vocab_size,), float("nan"))
        for entry in token["top_logprobs"]:
            logprobs[entry["id"]] = entry["logprob"]
        return logprobs


@torch.no_grad()
def assert_agrees(child, path, tolerance: float, num_tokens=6, **how) -> None:
    """Greedy continuations are the same, and so is every log-probability on the way."""
    llama_cpp, ids = LlamaCpp(path, **how), list(PROMPT)
    for _ in range(num_tokens):
        expected = child(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        found = llama_cpp.next(ids)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        assert found.argmax() == expected.argmax()
        ids.append(int(found.argmax()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_what_the_checkpoint_computes(name, tmp_path):
    child, export = saved(tmp_path, ARCHITECTURES[name])
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    assert_agrees(child, tmp_path / "child.gguf", tolerance=2e-4)


@pytest.mark.parametrize("layers", [(P,) * 4, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("name", PARENTS)
def test_llama_cpp_agrees_for_every_family_it_has(name, layers, tmp_path):
    child, export = saved(tmp_path, layers, **PARENTS[name])
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    assert_agrees(child, tmp_path / "child.gguf", tolerance=2e-4, num_tokens=3)


def test_more_layers_than_one_digit_counts(tmp_path):
    child, export = saved(tmp_path, (P, P, *MIXED[1:], P, P, P, P, "no_op w48", "kv1 parent", P), num_hidden_layers=12)
    assert export.architecture.layers[10] == (Variant("kv", 1), PARENT) and export.architecture.layers[2] == (NO_OP, Variant("w", 80))
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    assert_agrees(child, tmp_path / "child.gguf", tolerance=5e-4, num_tokens=2)


def test_qwen3_exports_where_its_layers_are_alike(tmp_path):
    child, export = saved(tmp_path, ("kv1 w80",) * 4, model_type="qwen3", use_sliding_window=False)
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    assert_agrees(child, tmp_path / "child.gguf", tolerance=2e-4)


def test_float16_agrees_within_its_precision(tmp_path):
    child, export = saved(tmp_path, MIXED)
    export_gguf.write(export, tmp_path / "child.gguf", "float16")
    assert_agrees(child, tmp_path / "child.gguf", tolerance=0.02, precise=False)


@torch.no_grad()
def test_without_the_zero_ffn_llama_cpp_would_lose_the_attention(tmp_path, monkeypatch):
    child, export = saved(tmp_path, ("parent no_op", P, P, P))
    monkeypatch.setattr(export_gguf, "_width", SavedChild.width)
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    expected = child(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert (LlamaCpp(tmp_path / "child.gguf").next(PROMPT) - expected).abs().max() > 0.1


def test_llama_cpps_loader_of_the_familys_own_architecture_refuses_layers_whose_widths_alone_differ(tmp_path, monkeypatch):
    _, export = saved(tmp_path, ("parent w80", P, P, "parent w48"))
    monkeypatch.setattr(export_gguf, "DECI", gguf.MODEL_ARCH.LLAMA)
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    with pytest.raises(RuntimeError, match="Failed to init server"):  # when it loads, deci is needed for skipped subblocks only
        LlamaCpp(tmp_path / "child.gguf")


def test_the_file_has_the_sizes_and_parameters_of_the_child(tmp_path):
    child, export = saved(tmp_path, MIXED)
    export_gguf.write(export, tmp_path / "child.gguf", "float16")
    file = gguf.GGUFReader(tmp_path / "child.gguf")
    field = {key: value.contents() for key, value in file.fields.items()}
    stand_in = 3 * 64 * export_gguf.ZERO_CHANNELS + 64  # layer 2 has attention and no FFN
    assert sum(tensor.n_elements for tensor in file.tensors) - stand_in == sum(p.numel() for p in child.parameters())
    assert field["general.architecture"] == "deci"
    assert field["deci.attention.head_count"] == [4, 0, 4, 4] and field["deci.attention.head_count_kv"] == [2, 0, 1, 2]
    assert field["deci.feed_forward_length"] == [160, 80, export_gguf.ZERO_CHANNELS, 48]


def test_layers_that_are_alike_get_the_familys_own_architecture(tmp_path):
    _, export = saved(tmp_path, ("kv1 w80",) * 4)
    export_gguf.write(export, tmp_path / "child.gguf", "float16")
    field = {key: value.contents() for key, value in gguf.GGUFReader(tmp_path / "child.gguf").fields.items()}
    assert (field["general.architecture"], field["llama.feed_forward_length"], field["llama.attention.head_count_kv"]) == ("llama", 80, 1)


def of_name(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits as the one which llama.cpp calls `name`."""
    ((steps, ignore_merges),) = [(steps, ignores) for steps, (known, ignores) in PRE_TOKENIZERS.items() if known == name]
    make = {
        "ByteLevel": lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "Split": lambda regex: pre_tokenizers.Split(Regex(regex), "isolated"),
    }
    return bpe(pre_tokenizers.Sequence([make[kind](argument) for kind, argument in steps]), ignore_merges=ignore_merges)


@pytest.mark.parametrize("name", [name for name, _ in PRE_TOKENIZERS.values()])
def test_llama_cpp_splits_text_as_the_checkpoints_tokenizer_does(name, tmp_path):
    tokenizer = of_name(name)
    _, export = saved(tmp_path, (P,) * 4, tokenizer)
    export_gguf.write(export, tmp_path / "child.gguf", "float32")
    llama_cpp = LlamaCpp(tmp_path / "child.gguf")
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT and len(ids) < len(TEXT.encode())
    for text in (TEXT, TEXT[:30], "a<eos>b 12 34"):
        torch.testing.assert_close(llama_cpp.next(text), llama_cpp.next(tokenizer(text).input_ids), atol=1e-4, rtol=0)


DIGITS = "x\n\n1. one  2\n   34 ½²"  # gpt-2 splits the spaces before digits otherwise than smollm


@pytest.mark.parametrize("name", [name for name, _ in PRE_TOKENIZERS.values()])
@torch.no_grad()
def test_a_gguf_parent_is_the_model_in_the_file_and_splits_text_as_the_file_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    model, export = saved(tmp_path, (P,) * 4, of_name(name))
    export_gguf.write(export, tmp_path / "model.gguf", "float32")
    parent = load_parent("gguf", path=str(tmp_path / "model.gguf"))
    for text in (TEXT, DIGITS):
        assert parent.tokenizer(text).input_ids == of_name(name)(text).input_ids
    torch.testing.assert_close(parent.model(torch.tensor([PROMPT])).logits, model(torch.tensor([PROMPT])).logits)
    (file,) = (tmp_path / "cache").rglob("tokenizer_config.json")
    file.write_text(file.read_text() + "\n")  # what transformers notes there differs from machine to machine
    assert load_parent("gguf", path=str(tmp_path / "model.gguf")).identity == parent.identity
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes() + bytes(32))
    assert load_parent("gguf", path=str(tmp_path / "model.gguf")).identity != parent.identity


def test_a_gguf_parent_whose_splitting_nobody_knows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    _, export = saved(tmp_path, (P,) * 4)
    with monkeypatch.context() as patch:
        patch.setitem(PRE_TOKENIZERS, (("ByteLevel", True),), ("poro-chat", False))
        export_gguf.write(export, tmp_path / "model.gguf", "float32")
    with pytest.raises(ValueError, match="splits text as llama.cpp's 'poro-chat' does, which is not known here; known: gpt-2, smollm"):
        load_parent("gguf", path=str(tmp_path / "model.gguf"))
    assert not list((tmp_path / "cache").rglob("*.json"))


# ------------------------------------------------------------------------------------------ GGUF files as parents


READ_BACK = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama untied, with small heads": {"tie_word_embeddings": False, "head_dim": 16},
    "llama without key-value heads of their own": {"num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "qwen3": {"model_type": "qwen3", "use_sliding_window": False, "head_dim": 24},
    "qwen3 with biases": {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": True},
}
ROPES = {"default rope": {"rope_type": "default", "rope_theta": 5e5}, "linear rope": LINEAR_ROPE, "Llama 3's rope": LLAMA3}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


@torch.no_grad()
def assert_same_model(found, expected) -> None:
    """The same weights, and the same logits at every position."""
    ids = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "rope"), [(name, r) for name in READ_BACK for r in ROPES if (name[:4], r[:5]) != ("qwen", "Llama")])
def test_an_export_reads_back_as_the_same_parent(name, rope, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    model, export = saved(tmp_path, (P,) * 4, tokenizer, **READ_BACK[name], rope_parameters=ROPES[rope])
    export_gguf.write(export, tmp_path / "model.gguf", "float32")
    parent = load_parent("gguf", path=str(tmp_path / "model.gguf"))
    assert_same_model(parent.model, model)
    assert parent.model.config.rope_parameters == pytest.approx(ROPES[rope])


def test_a_child_whose_layers_differ_is_no_parent_as_gguf_either(tokenizer, tmp_path):
    _, export = saved(tmp_path, MIXED, tokenizer)
    export_gguf.write(export, tmp_path / "model.gguf", "float32")
    with pytest.raises(UserError, match="is a child already: its layers differ .architecture deci."):
        load_parent("gguf", path=str(tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def exports(tokenizer, tmp_path_factory):
    """A model of each family that GGUF tells apart, and its file."""
    found = {}
    for model_type, more in {"llama": {}, "qwen2": {"head_dim": 16}, "qwen3": {"use_sliding_window": False}}.items():
        folder = tmp_path_factory.mktemp(model_type)
        model, export = saved(folder, (P,) * 4, tokenizer, model_type=model_type, num_key_value_heads=4, **more)
        export_gguf.write(export, folder / "model.gguf", "float32")
        found[model_type] = model, folder / "model.gguf"
    return found


def edited(source, path, keys=None, tensors=None):
    """A copy of a GGUF file with other metadata (None: without the key) and other tensors (None: without)."""
    reader, keys, tensors = gguf.GGUFReader(source), dict(keys or {}), dict(tensors or {})
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", reader.fields["general.architecture"].contents()))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value in keys.items():
        if value is not None:
            add[type(value)](name, value)
    for name, values in {**{tensor.name: tensor.data for tensor in reader.tensors}, **tensors}.items():
        if values is not None:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path


FFN = {f"blk.2.ffn_{part}.weight": None for part in ("gate", "up", "down")}
NOT_READ = {
    "yarn": ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "llama.rope.scaling.type is yarn"),
    "longrope": ("llama", {}, {"rope_factors_long.weight": [2.0] * 16}, "has, beside .* rope_factors_long.weight"),
    "a window of some layers": ("qwen2", {"qwen2.attention.sliding_window": 16}, {}, "sliding_window is 16, but not which of its layers"),
    "a pattern of windows": ("llama", {"llama.attention.sliding_window_pattern": 2}, {}, "sliding_window_pattern = 2: nothing"),
    "factors of a graph without": ("qwen3", {}, {"rope_freqs.weight": [1.0] * 15 + [8.0]}, "has, beside .* rope_freqs.weight"),
    "experts": ("llama", {"llama.expert_count": 8}, {}, "llama.expert_count is 8, read is only 0"),
    "capped logits": ("llama", {"llama.final_logit_softcapping": 30.0}, {}, "llama.final_logit_softcapping = 30.0: nothing here"),
    "scaled logits": ("qwen2", {"qwen2.logit_scale": 0.5}, {}, "qwen2.logit_scale = 0.5"),
    "scaled attention": ("qwen3", {"qwen3.attention.scale": 0.5}, {}, "qwen3.attention.scale = 0.5"),
    "scaled rotary attention": ("llama", {"llama.rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor is 1.2"),
    "part of a head rotated": ("llama", {"llama.rope.dimension_count": 16}, {}, "llama.rope.dimension_count is 16, read is only 32"),
    "values of another length": ("qwen3", {"qwen3.attention.value_length": 16}, {}, "value_length is 16, read is only 32"),
    "heads that differ": ("llama", {"llama.attention.head_count_kv": [4, 4, 2, 4]}, {}, "its layers differ .*head_count_kv is 4, 4, 2, 4"),
    "widths that differ": ("llama", {"llama.feed_forward_length": [160, 80, 160, 160]}, {}, "its layers differ .*feed_forward_length"),
    "a separator added": ("llama", {"tokenizer.ggml.add_sep_token": True}, {}, "tokenizer.ggml.add_sep_token is True, read is only False"),
    "an adapter": ("llama", {"general.type": "adapter"}, {}, "general.type is adapter, read is only model"),
    "a part": ("llama", {"split.count": 2}, {}, "split.count is 2.*--merge"),
    "another architecture": ("llama", {"general.architecture": "gemma2"}, {}, "architecture 'gemma2'; read are llama, qwen2, qwen3"),
    "fewer layers": ("llama", {"llama.block_count": 3}, {}, "has, beside .* blk.3.attn_norm.weight.* and 5 more"),
    "more layers": ("llama", {"llama.block_count": 5}, {}, "lacks blk.4"),
    "no count of layers": ("llama", {"llama.block_count": None}, {}, "has no llama.block_count"),
    "no FFN": ("llama", {}, FFN, "lacks blk.2.ffn_gate.weight, blk.2.ffn_up.weight, blk.2.ffn_down.weight"),
    "sinks": ("llama", {}, {"blk.0.attn_sinks.weight": [1.0] * 4}, "has, beside .* blk.0.attn_sinks.weight"),
    "some biases": ("llama", {}, {"blk.1.attn_q.bias": [1.0] * 128}, "has, beside .* blk.1.attn_q.bias"),
    "another vocabulary": ("llama", {"llama.vocab_size": 300}, {}, "vocab_size is 300, and tokenizer.ggml.tokens has 320 tokens"),
    "another width": ("llama", {"llama.feed_forward_length": 168}, {}, r"blk.0.ffn_gate.weight .160, 64., not .168, 64."),
    "factors of no rule": ("llama", {}, {"rope_freqs.weight": [1.0, 3.0, 2.0] + [8.0] * 13}, "_freqs.weight is 1.0, 3.0, 2.0.*not Llama"),
    "factors below one": ("llama", {}, {"rope_freqs.weight": [1.0] * 15 + [0.5]}, "rope_freqs.weight is 1.0.*not Llama 3's"),
    "too few factors": ("llama", {}, {"rope_freqs.weight": [1.0] * 8}, "rope_freqs.weight has 8 factors, expected 16"),
    "two scalings": ("llama", {"llama.rope.scaling.factor": 2.0}, {"rope_freqs.weight": [1.0] * 15 + [8.0]}, "rope_freqs.weight beside"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_what_a_gguf_file_says_and_nothing_here_computes_is_refused_by_name(name, exports, tmp_path):
    family, keys, tensors, words = NOT_READ[name]
    with pytest.raises(UserError, match=words) as refused:
        import_gguf.model_of(edited(exports[family][1], tmp_path / "model.gguf", keys, tensors))
    assert str(refused.value).startswith(str(tmp_path / "model.gguf"))


NEUTRAL = {
    "provenance": {"quantize.imatrix.file": "x", "general.tags": ["a"], "tokenizer.ggml.eot_token_id": 0},
    "counts of zero": {"llama.expert_count": 0, "llama.expert_used_count": 0, "split.count": 1, "split.no": 0},
    "factors of one": {"llama.rope.scaling.attn_factor": 1.0, "tokenizer.ggml.add_sep_token": False},
    "llama.cpp's defaults": {
        f"llama.{key}": None for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length",
                                         "rope.dimension_count", "rope.freq_base", "vocab_size")
    },
    "a name that transformers makes Mistral of": {"general.name": "mistral"},
    "no scaling": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_metadata_that_changes_nothing_is_no_reason(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    more = {"head_dim": 16, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model, export = saved(tmp_path, (P,) * 4, tokenizer, **more)
    export_gguf.write(export, tmp_path / "model.gguf", "float32")
    edited(tmp_path / "model.gguf", tmp_path / "edited.gguf", NEUTRAL[name])
    assert_same_model(load_parent("gguf", path=str(tmp_path / "edited.gguf")).model, model)


def test_a_window_of_all_layers_is_mistrals(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    model, export = saved(tmp_path, (P,) * 4, tokenizer, model_type="mistral", sliding_window=None)
    export_gguf.write(export, tmp_path / "model.gguf", "float32")
    parent = load_parent("gguf", path=str(edited(tmp_path / "model.gguf", tmp_path / "w.gguf", {"llama.attention.sliding_window": 16})))
    model.config.sliding_window = 16
    assert parent.model.config.model_type == "mistral"
    assert_same_model(parent.model, model)


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
@torch.no_grad()
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(key, exports, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_CACHE", str(tmp_path / "cache"))
    parent = load_parent("gguf", path=str(edited(exports["llama"][1], tmp_path / "model.gguf", {key: 4.0})))
    assert parent.model.config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert_agrees(parent.model, tmp_path / "model.gguf", tolerance=2e-4, num_tokens=1)


PUBLISHED = {"Llama 3.1": (8.0, 128), "Llama 3.2": (32.0, 64)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_3s_published_parameters_come_back_from_their_factors(name):
    factor, head_dim = PUBLISHED[name]
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    assert next(iter(import_gguf.llama3_parameters(import_gguf.llama3_factors(rope, head_dim), 5e5, 8192))) == rope


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 3.0), (0.5, 6.6)])
@pytest.mark.parametrize("original", [64, 5000])
def test_factors_of_any_parameters_are_reproduced(head_dim, low, high, original):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original}  # fmt: skip
    factors = import_gguf.llama3_factors(rope, head_dim)
    found = [import_gguf.llama3_factors(one, head_dim) for one in import_gguf.llama3_parameters(factors, 1e4, 8192)]
    assert any(torch.allclose(one, factors, rtol=1e-5, atol=0) for one in found)


@pytest.mark.parametrize(
    "factors", [[1, 2, 2, 2, 8, 8], [8, 8, 8, 8, 8, 8.000002], [1, 8, 1, 8], [8, 4, 1, 1], [2, 8, 2], [float("nan"), 8]]
)
def test_factors_of_no_rule_have_no_parameters_that_reproduce_them(factors):
    factors = torch.tensor(factors, dtype=torch.float32)
    for found in import_gguf.llama3_parameters(factors, 1e4, 8192):
        assert not torch.allclose(import_gguf.llama3_factors(found, 2 * len(factors)), factors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -4000])
def test_a_gguf_file_that_is_cut_off_is_named(size, exports, tmp_path):
    shutil.copy(exports["llama"][1], tmp_path / "cut.gguf")
    with open(tmp_path / "cut.gguf", "r+b") as file:
        file.truncate(size if size >= 0 else (tmp_path / "cut.gguf").stat().st_size + size)
    with pytest.raises(UserError, match="cut.gguf is no whole GGUF file .*fetch it again"):
        import_gguf.model_of(tmp_path / "cut.gguf")


def refused(exporter, layers, changes: dict, words: tuple[str, ...], tmp_path) -> None:
    """`exporter` refuses the child of these layers by name, in these words, and leaves nothing behind."""
    _, export = saved(tmp_path, layers, **changes)
    with pytest.raises(ValueError, match=f"cannot be exported to {exporter.TARGET}") as raised:
        exporter.write(export, tmp_path / "out" / "child", "float16")
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "out").exists()


REFUSED_BY_GGUF = {
    "linear": ((P, "linear linear", P, P), {}, ("layer 1 attention linear", "layer 1 ffn linear")),
    "linear in several layers": ((P, "parent linear", P, "kv1 linear"), {}, ("layer 1, 3 ffn linear",)),
    "no attention in layer 0": (("no_op parent", P, "no_op parent", P), {}, ("layer 0 attention no_op",)),
    "qwen3 with layers that differ": (MIXED, {"model_type": "qwen3"}, ("family qwen3 with layers that differ",)),
    "a sliding window": ((P,) * 4, {"model_type": "mistral", "sliding_window": 16}, ("sliding_window 16",)),
    "another activation": ((P,) * 4, {"hidden_act": "gelu"}, ("hidden_act gelu",)),
    "Llama 3's rope in qwen2": (
        (P,) * 4, {"model_type": "qwen2", "head_dim": 16, "rope_parameters": LLAMA3}, ("rope_type llama3 in family qwen2 (its graph",),
    ),
    "Llama 3's rope in qwen3": ((P,) * 4, {"model_type": "qwen3", "rope_parameters": LLAMA3}, ("rope_type llama3 in family qwen3",)),
    "large heads in qwen2": ((P,) * 4, {"model_type": "qwen2"}, ("head_dim 32 in family qwen2 (its heads split hidden_size 64)",)),
    "another rope": ((P,) * 4, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ("rope_type yarn",)),
}


@pytest.mark.parametrize("name", REFUSED_BY_GGUF)
def test_what_llama_cpp_has_no_form_for_is_refused_by_name(name, tmp_path):
    refused(export_gguf, *REFUSED_BY_GGUF[name], tmp_path)


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_and_leaves_no_file(pico, tmp_path):
    _, export = saved(tmp_path, (P,) * 4, pico.tokenizer)
    with pytest.raises(ValueError, match="BPE with 0 merges.*What can: byte-level BPE with merges.*gpt-2, smollm"):
        export_gguf.write(export, tmp_path / "out" / "child.gguf", "float16")
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_float16_cannot_hold_are_refused_and_leave_no_file(tmp_path):
    parent = pico_parent(intermediate_size=512)
    with torch.no_grad():
        parent.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    save_child(parent.model, bpe(), tmp_path / "child")
    for write in (export_gguf.write, nemotron.write):
        with pytest.raises(ValueError, match="float16 cannot hold|cannot hold.*float16"):
            write(SavedChild.read(tmp_path / "child"), tmp_path / "out" / "child", "float16")
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_that_nothing_can_read_says_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        SavedChild.read(tmp_path)
    _, export = saved(tmp_path, MIXED)
    config = json.loads((export.path / "config.json").read_text())
    config["per_layer_config"]["1"]["window"] = 128
    (export.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 1: per_layer_config has window: 128"):
        SavedChild.read(export.path)


WIDE = ("parent w256", "kv1 no_op", "no_op parent", "no_op no_op")


@pytest.fixture
def wide(tmp_path):
    """A parent whose FFN width engines can have, and a child of it with its checkpoint."""
    parent = pico_parent(intermediate_size=512)
    child = make_child(parent, architecture(*WIDE), wide_variants(parent, tmp_path))
    save_child(child, parent.tokenizer, tmp_path / "child")
    return parent, child, SavedChild.read(tmp_path / "child")


def wide_variants(parent, directory):
    """Random weights of the right shapes."""
    from safetensors.torch import save_file

    from puzzle_core.subblocks import build_subblock

    def weights_of(layer, subblock, variant):
        module = build_subblock(parent, layer, subblock, variant)
        generator = torch.Generator().manual_seed(layer)
        path = directory / f"{layer}-{subblock}.safetensors"
        save_file({name: torch.randn(p.shape, generator=generator) / 8 for name, p in module.named_parameters()}, path)
        return path, ""

    return weights_of


@torch.no_grad()
def test_a_nemotron_nas_export_reads_back_as_the_same_child(wide, tmp_path):
    parent, child, export = wide
    nemotron.write(export, tmp_path / "out", "float32")
    config = tmp_path / "out" / "config.json"
    again = nemotron.read_architecture(config)
    assert again == export.architecture == architecture(*WIDE)
    assert nemotron.num_params(config) == sum(p.numel() for p in child.parameters())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert nemotron.num_params(config) == sum(tensor.numel() for tensor in weights.values())  # tied: no lm_head
    rebuilt = make_child(parent, again, wide_variants(parent, tmp_path))
    for parameter in rebuilt.parameters():
        parameter.zero_()
    assert not rebuilt.load_state_dict(weights, strict=False).unexpected_keys
    assert isinstance(rebuilt.model.layers[2].self_attn, modeling_puzzle.NoOpAttention)
    ids = torch.tensor([PROMPT])
    assert torch.equal(rebuilt(ids).logits, child(ids).logits)


def test_engines_read_block_configs_by_attribute(wide, tmp_path):
    nemotron.write(wide[2], tmp_path / "out", "bfloat16")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    first, second, third, last = config.block_configs
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert (first.attention.n_heads_in_group, second.attention.n_heads_in_group) == (2, 4)
    assert [block.attention.no_op for block in config.block_configs] == [False, False, True, True]
    assert [block.ffn.no_op for block in config.block_configs] == [False, True, False, True]
    assert (nemotron.width_of(first.ffn.ffn_mult, 64), nemotron.width_of(third.ffn.ffn_mult, 64)) == (256, 512)
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "modeling_puzzle.py").exists()
    assert config.to_dict()["block_configs"][3]["attention"]["n_heads_in_group"] is None


REFUSED_BY_NEMOTRON = {
    "linear": ((P, "linear linear", P, P), {"intermediate_size": 512}, ("layer 1 attention linear", "layer 1 ffn linear")),
    "no attention in layer 0": (("no_op parent", P, P, P), {"intermediate_size": 512}, ("layer 0 attention no_op",)),
    "widths": ((P, "parent w80", P, P), {}, ("layer 1 ffn w80", "layer 0, 2, 3 ffn parent", "160")),
    "biases": ((P,) * 4, {"intermediate_size": 512, "attention_bias": True}, ("biases (model.layers.0.self_attn",)),
    "another family": ((P,) * 4, {"model_type": "qwen3"}, ("family qwen3",)),
}


@pytest.mark.parametrize("name", REFUSED_BY_NEMOTRON)
def test_what_nemotron_nas_has_no_form_for_is_refused_by_name(name, tmp_path):
    refused(nemotron, *REFUSED_BY_NEMOTRON[name], tmp_path)


# Llama-3_3-Nemotron-Super-49B-v1 as published, runs of equal layers: how many, with attention, FFN multipliers.
SUPER_49B = [
    (1, True, [2.625]), (5, True, [5.25]), (2, False, [2.625]), (3, True, [5.25]), (1, False, [3.28125]), (30, True, [5.25]),
    (10, False, [1.3125, 2.625, 2.625, 1.3125, 5.25, 1.3125, 2.625, 1.3125, 1.3125, 1.3125]), (1, True, [5.25]),
    (18, False, [1.3125, 1, 1, 1.3125, 1, 1, 1, 1.3125, 1.3125, 0.5, 0.5, 1, 1, 0.5, 0.5, 1, 0.5, 0.5]), (9, True, [5.25]),
]  # fmt: skip


def published(path, blocks, **changes):
    config = {"hidden_size": 8192, "num_attention_heads": 64, "vocab_size": 128256, "tie_word_embeddings": False,
              "num_key_value_heads": None, "intermediate_size": None, "block_configs": blocks, **changes}  # fmt: skip
    path.write_text(json.dumps(config))
    return path


def block(group=8, mult=5.25, linear=(), **ffn):
    return {
        "attention": {"n_heads_in_group": group, "no_op": group is None and "attention" not in linear, "window_length": None,
                      "replace_with_linear": "attention" in linear},
        "ffn": {"ffn_mult": mult, "no_op": mult is None and "ffn" not in linear, "replace_with_linear": "ffn" in linear, **ffn},
    }  # fmt: skip


def test_the_published_49b_becomes_an_architecture_with_its_exact_parameter_count(tmp_path):
    blocks = [block(8 if attends else None, mult) for num, attends, mults in SUPER_49B for mult in mults * (num // len(mults))]
    path = published(tmp_path / "config.json", blocks)
    found = nemotron.read_architecture(path, num_key_value_heads=8, intermediate_size=28672)
    assert found == nemotron.read_architecture(path) and len(found.layers) == 80
    assert found.layers[0] == (PARENT, Variant("w", 14336)) and found.layers[1] == (PARENT, PARENT)
    assert found.layers[11] == (NO_OP, Variant("w", 17920)) and found.layers[70] == (NO_OP, Variant("w", 2816))
    assert nemotron.num_params(path) == 49_867_145_216


def test_multipliers_become_the_published_widths():
    widths = {5.25: 28672, 3.28125: 17920, 2.625: 14336, 1.3125: 7168, 1.0: 5632, 0.5: 2816}
    assert {mult: nemotron.width_of(mult, 8192) for mult in widths} == widths
    assert nemotron.width_of(4.875, 16384) == 53248  # Llama 3.1 405B's own
    for hidden in (576, 2048, 4096, 5120, 8192):
        for width in range(256, 4 * hidden, 256):
            assert nemotron.width_of(3 * width / (2 * hidden), hidden) == nemotron.width_of(round(1.5 * width / hidden, 6), hidden) == width


def test_published_linear_subblocks_and_outright_widths_are_read(tmp_path):
    blocks = [block(), block(None, None, linear=("attention", "ffn")), block(16, None, intermediate_size=7168, no_op=False)]
    path = published(tmp_path / "config.json", blocks)
    layers = ((PARENT, PARENT), (LINEAR, LINEAR), (Variant("kv", 4), Variant("w", 7168)))
    assert nemotron.read_architecture(path) == Architecture(layers)


def test_a_published_layer_without_a_form_here_is_refused_by_name(tmp_path):
    cases = {
        "layer 1 ffn is w28672, which no variant of a parent with w14336": [block(mult=2.625), block()],
        "layer 0 attention has {'window_length': 4096}": [{**block(), "attention": {**block()["attention"], "window_length": 4096}}],
    }
    for words, blocks in cases.items():
        path = published(tmp_path / "config.json", blocks)
        with pytest.raises(ValueError) as raised:
            nemotron.read_architecture(path, num_key_value_heads=8, intermediate_size=14336)
        assert words in str(raised.value)


ANY_MODEL = {"attention": {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16",
                           "num_key_value_heads": 8, "llama4": None, "mamba": None},
             "ffn": {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16", "moe": None,
                     "intermediate_size": 28672},
             "parallel_blocks": None}  # fmt: skip


def in_any_model(of: str = "", **changes) -> dict:
    """A block as NVIDIA's AnyModel writes it: kv heads instead of their groups, a width instead of a multiplier."""
    return {**ANY_MODEL, of: {**ANY_MODEL[of], **changes}} if of else {**ANY_MODEL, **changes}


def test_blocks_that_say_kv_heads_and_widths_are_read_as_the_same_architecture(tmp_path):
    theirs = [
        in_any_model(),
        in_any_model("attention", num_key_value_heads=4),
        in_any_model("attention", num_key_value_heads=None, no_op=True),
        in_any_model("ffn", intermediate_size=14336),
        in_any_model("ffn", intermediate_size=None, no_op=True),
    ]
    path = published(tmp_path / "theirs.json", theirs, model_type="llama", hidden_act="silu", num_hidden_layers=5, attention_bias=False)
    same = published(tmp_path / "same.json", [block(), block(16), block(None), block(8, 2.625), block(8, None)])
    layers = ((PARENT, PARENT), (Variant("kv", 4), PARENT), (NO_OP, PARENT), (PARENT, Variant("w", 14336)), (PARENT, NO_OP))
    assert nemotron.read_architecture(path) == nemotron.read_architecture(same) == Architecture(layers)
    attention, ffn = 2 * 128 * (64 + 8) * 8192, 3 * 28672 * 8192
    expected = 2 * 128256 * 8192 + 4 * attention - 2 * 128 * 4 * 8192 + 3.5 * ffn + (1 + 4 + 4) * 8192
    assert nemotron.num_params(path) == nemotron.num_params(same) == expected


NOT_UNDERSTOOD = {
    "layer 0 has {'parallel_blocks': [{'attention'": [in_any_model(parallel_blocks=[block(), block()])],
    "layer 1 ffn has {'moe': {'num_local_experts': 8}}": [block(), in_any_model("ffn", moe={"num_local_experts": 8})],
    "layer 0 attention has {'mamba': {'state_dim': 128}}": [in_any_model("attention", num_key_value_heads=None, mamba={"state_dim": 128})],
    "layer 0 attention has {'llama4': {'use_rope': True}}": [in_any_model("attention", llama4={"use_rope": True})],
    "layer 0 attention has {'num_query_heads': 32}": [in_any_model("attention", num_query_heads=32)],
    "layer 0 ffn has {'hidden_act': 'relu2'}": [in_any_model("ffn", hidden_act="relu2")],
    "layer 0 has {'conv': {'kernel': 3}}": [in_any_model(conv={"kernel": 3})],
    "layer 0 lacks ffn": [{"attention": block()["attention"]}],
    "layer 1 attention lacks n_heads_in_group and num_key_value_heads": [block(), in_any_model("attention", num_key_value_heads=None)],
    "layer 0 ffn lacks ffn_mult and intermediate_size": [in_any_model("ffn", intermediate_size=None)],
    "{'n_heads_in_group': 16, 'num_key_value_heads': 8}: no size": [in_any_model("attention", n_heads_in_group=16)],
    "layer 0 attention has {'n_heads_in_group': 7}": [block(7)],
    "layer 0 ffn has {'ffn_mult': 2.625, 'intermediate_size': 28672}": [in_any_model("ffn", ffn_mult=2.625)],
    "layer 0 attention: no_op is 'false'; expected true or false": [in_any_model("attention", no_op="false")],
    "layer 0 ffn: replace_with_linear is 1; expected true or false": [in_any_model("ffn", replace_with_linear=1)],
    "layer 0 attention has {'n_heads_in_group': True}: no size": [block(True)],
    "layer 0 attention has {'n_heads_in_group': inf}: no size": [block(float("inf"))],
    "layer 0 ffn has {'ffn_mult': True}: no size": [block(mult=True)],
    "layer 0 ffn has {'ffn_mult': 1e-09}: no size": [block(mult=1e-9)],
    "layer 0 ffn has {'ffn_mult': nan}: no size": [block(mult=float("nan"))],
    "layer 0 ffn has {'ffn_mult': inf}: no size": [block(mult=float("inf"))],
    "layer 0 ffn has {'ffn_mult': 1e+308}: no size": [block(mult=1e308)],
    "layer 0 ffn has {'ffn_mult': '5.25'}: no size": [block(mult="5.25")],
    "layer 0 ffn has {'intermediate_size': True}: no size": [in_any_model("ffn", intermediate_size=True)],
    "layer 0 ffn has {'gated': False}": [in_any_model("ffn", gated=False)],
    "layer 0 attention in block_configs is '[1]'; expected an object": [{**block(), "attention": [1]}],
    "layer 0 ffn has both no_op and replace_with_linear": [in_any_model("ffn", no_op=True, replace_with_linear=True)],
}


@pytest.mark.parametrize("words", NOT_UNDERSTOOD)
@pytest.mark.parametrize("read", [nemotron.read_architecture, nemotron.num_params])
def test_a_published_block_that_is_not_understood_is_refused_by_its_key(tmp_path, words, read):
    with pytest.raises(UserError) as raised:
        read(published(tmp_path / "config.json", NOT_UNDERSTOOD[words]))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nemotron_h"}, "model_type is 'nemotron_h', whose layers are not known here; expected nemotron-nas"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "has attention_bias: only layers without biases"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but block_configs has 1"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"num_local_experts": 8}, "has num_local_experts: 8, which is not understood"),
        ({"num_experts": 8}, "has num_experts"),
        ({"moe_intermediate_size": 512}, "has moe_intermediate_size"),
        ({"use_qk_norm": True}, "has use_qk_norm"),
        ({"sliding_window": 4096}, "has sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "has layer_types"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; expected true or false"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a whole number of at least 1"),
        ({"hidden_size": float("nan")}, "hidden_size is nan"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": float("inf")}, "num_attention_heads is inf"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_dim": 128.5}, "head_dim is 128.5"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"intermediate_size": [28672]}, r"intermediate_size is \[28672\]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
        ({"block_configs": []}, r"block_configs is '\[\]'; expected a list"),
        ({"block_configs": None}, "block_configs is 'None'"),
        ({"block_configs": {"0": block()}}, "block_configs is .*; expected a list"),
        ({"block_configs": "blocks"}, "block_configs is 'blocks'"),
        ({"block_configs": ["block"]}, "layer 0 in block_configs is 'block'; expected an object"),
    ],
)
def test_a_published_config_that_is_not_understood_is_refused_by_its_key(tmp_path, changes, words):
    for read in (nemotron.read_architecture, nemotron.num_params):
        with pytest.raises(UserError, match=words):
            read(published(tmp_path / "config.json", [block()], **changes))


def test_a_published_config_with_all_its_keys_and_those_that_are_off_is_read(tmp_path):
    theirs = {
        "architectures": ["DeciLMForCausalLM"], "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "nemotron-nas", "num_hidden_layers": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3", "use_cache": True, "sliding_window": None, "num_experts": 0,
    }  # fmt: skip
    plain, full = published(tmp_path / "plain.json", [block()]), published(tmp_path / "full.json", [block()], **theirs)
    assert nemotron.read_architecture(full) == nemotron.read_architecture(plain) == Architecture(((PARENT, PARENT),))
    assert nemotron.num_params(full) == nemotron.num_params(plain)


def test_parameters_are_not_counted_where_a_size_is_missing(tmp_path):
    for changes, words in (
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"tie_word_embeddings": None}, "lacks tie_word_embeddings"),
        ({"hidden_size": 8200}, "lacks head_dim, and hidden_size 8200 is no multiple"),
    ):
        with pytest.raises(ValueError, match=words):
            nemotron.num_params(published(tmp_path / "config.json", [block()], **changes))


def test_what_has_no_block_configs_is_no_published_config():
    with pytest.raises(ValueError, match="no block_configs"):
        nemotron.read_architecture(ROOT / "docs" / "results" / "demo.json")


@pytest.mark.parametrize("name", TARGETS)
def test_the_search_never_chooses_what_its_export_target_has_no_form_for(name, tmp_path):
    space = {"attention": ["parent", "kv1", "linear", "no_op"], "ffn": ["parent", "w768", "w700", "linear"]}
    for kind, table in zip(("scores", "costs"), make_tables(**space, score=lambda layer, subblock, k: 1 / k), strict=True):
        tables.write(kind, table, tmp_path / f"{kind}.parquet")

    def found(target):
        problem = posed(tmp_path, Settings(export_target=target), Scenario.parse(SCENARIO))
        return problem, solve(problem, constraints_from({"params_fraction": 0.6}, problem)).architecture

    (_, free), (problem, restricted) = found(None), found(name)
    assert any(why_not(name, *choice) for choice in free.items())
    with pytest.raises(ValueError, match="no row for layer 0 attention .* unless it is what search.export_target leaves out"):
        problem.rows_of(free)
    assert [choice for choice in restricted.items() if why_not(name, *choice)] == []
    assert restricted[0, "attention"] != NO_OP and NO_OP in {restricted[layer, "attention"] for layer in (1, 2, 3)}


def test_an_unknown_export_target_is_answered_with_the_nearest():
    for call in (lambda: target_named("ggfu"), lambda: expressible(make_tables()[0], "ggfu")):
        with pytest.raises(ValueError, match="unknown export target 'ggfu'. Did you mean 'gguf'"):
            call()


def test_the_command_writes_the_file(tmp_path):
    saved(tmp_path, MIXED)
    done = stage("export", "target=gguf", "checkpoint=child", f"data={tmp_path}", f"out={tmp_path / 'out'}")
    assert f"export: {tmp_path}/out/child.gguf for llama.cpp, float16" in done.stdout
    fields = gguf.GGUFReader(tmp_path / "out" / "child.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
