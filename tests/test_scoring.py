"""A score is what the whole model loses with one subblock replaced, however it is computed and by however many processes."""
import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, architecture, pico_parent, variants
from safetensors.torch import save_file
from test_ranks import in_two_processes
from torch import nn

from benchmarks import demo, kl_floor
from benchmarks import scoring as benchmark
from puzzle_core import evaluation, ranks, realised, scoring, tables
from puzzle_core.children import make_child
from puzzle_core.corpus import Corpus
from puzzle_core.losses import Comparison, Weights
from puzzle_core.parents import Parent
from puzzle_core.quality import Questions, Text, sequence_sums
from puzzle_core.questions import Question, read_questions, tokenize
from puzzle_core.scoring import Settings, score_library
from puzzle_core.spec import Variant
from puzzle_core.trace import head, head_of, last_hidden, layer_inputs, run_layers, start_at

EXCERPT = {"source": "files", "path": str(ROOT / "data/corpus/excerpt.parquet"), "development_fraction": 0.1, "test_fraction": 0.1}
NO_ROWS = pd.DataFrame(columns=list(tables.SCHEMAS["scores"].columns))
KEY = ["layer", "subblock", "variant", "metric"]
QUESTIONS = {"sample": {"path": str(ROOT / "data/questions/sample.jsonl"), "num_questions": 12, "length_normalised": True}}
SPACE = {"attention": ["parent", "kv1", "linear", "no_op"], "ffn": ["parent", "w80", "no_op"]}


@pytest.fixture(scope="module")
def corpus(pico) -> Corpus:
    return Corpus(pico.tokenizer, EXCERPT)


@pytest.fixture(scope="module")
def library(pico, tmp_path_factory):
    """Every variant of SPACE as it is initialised: its table and its folder."""
    blocks = tmp_path_factory.mktemp("library") / "blocks"
    blocks.mkdir()
    weights_of, rows = variants(pico, blocks), []
    for layer in range(4):
        for subblock, names in SPACE.items():
            for name in names:
                path = "" if name == "parent" else weights_of(layer, subblock, Variant.parse(name))[0].name
                rows.append({"layer": layer, "subblock": subblock, "variant": name, "path": path, "fingerprint": ""})
    words, counts = {"init": "", "outcome": "untrained"}, dict.fromkeys(("num_tokens", "num_params", "kv_bytes_per_token"), 0)
    table = pd.DataFrame(rows).assign(**words, **counts, loss_before=0.0, loss_after=0.0)
    return tables.check("library", table), blocks


def settings(**changes) -> Settings:
    return Settings(**{"num_tokens": 512, "seq_len": 64, "batch_size": 4, "metrics": ["kl", "lm_loss"], **changes})


def score(parent: Parent, library, corpus: Corpus, known=NO_ROWS, keep=lambda rows: None, mine=ranks.ALONE, **changes):
    table, made = score_library(parent, *library, corpus, settings(**changes), known, keep, mine)
    return tables.check("scores", table), made


@pytest.fixture(scope="module")
def scored(pico, library, corpus) -> pd.DataFrame:
    return score(pico, library, corpus, metrics=list(scoring.TEXT_METRICS), questions=QUESTIONS)[0]


def child_with(parent: Parent, blocks, layer: int, attention: str, ffn: str):
    layers = ["parent parent"] * 4
    layers[layer] = f"{attention} {ffn}"
    return make_child(parent, architecture(*layers), variants(parent, blocks))


@pytest.mark.parametrize("replaced", [(0, "kv1", "parent"), (2, "parent", "w80"), (3, "linear", "parent"), (0, "no_op", "parent")])
@torch.no_grad()
def test_a_score_is_what_the_child_with_that_one_replacement_loses(pico, library, corpus, scored, replaced):
    layer, attention, ffn = replaced
    child = child_with(pico, library[1], *replaced)
    subblock, variant = ("ffn", ffn) if attention == "parent" else ("attention", attention)
    got = scored.query("layer == @layer and subblock == @subblock and variant == @variant").set_index("metric").value
    ids = torch.as_tensor(np.concatenate(corpus.batches("development", 512, 64, 4, seed="score")))
    on_train = torch.as_tensor(np.concatenate(corpus.batches("train", 512, 64, 4, seed="score-train")))

    def loss(model, ids):
        return nn.functional.cross_entropy(model(ids).logits.double()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    p, c = (model(ids, output_hidden_states=True) for model in (pico.model, child))
    log_p, log_c = (out.logits.double().log_softmax(-1) for out in (p, c))
    expected = {
        "kl": nn.functional.kl_div(log_c, log_p, log_target=True, reduction="sum") / ids.numel(),
        "lm_loss": loss(child, ids) - loss(pico.model, ids),
        "lm_loss_train": loss(child, on_train) - loss(pico.model, on_train),
        "top1_disagreement": (log_p.argmax(-1) != log_c.argmax(-1)).double().mean(),
        "cosine_distance": 1 - nn.functional.cosine_similarity(p.hidden_states[-1].double(), c.hidden_states[-1].double(), dim=-1).mean(),
    }
    for metric, value in expected.items():
        assert got[metric] == pytest.approx(value.item(), rel=2e-5, abs=2e-7), metric
    compared = evaluation.compare(pico.model, child, list(ids.numpy().reshape(-1, 4, 64)))["child"]
    assert compared["kl"] == pytest.approx(got["kl"], rel=1e-5)
    of_sequences = nn.functional.kl_div(log_c, log_p, log_target=True, reduction="none").sum(-1).mean(-1)
    assert compared["kl_stderr"] == pytest.approx(of_sequences.std().item() / len(ids) ** 0.5, rel=1e-4)
    assert compared["perplexity"] == pytest.approx(loss(child, ids).exp().item(), rel=1e-5)


def accuracy(model, tokenizer, normalised: bool) -> float:
    right = 0
    for question in read_questions(QUESTIONS["sample"]["path"], 12):
        sums = []
        for choice in question.choices:
            prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (question.prompt, f"{question.prompt} {choice}"))
            log_c = model(whole).logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
            sums.append(log_c[prompt.shape[1] - 1 :].sum().item() / (len(choice) if normalised else 1))
        right += int(np.argmax(sums)) == question.answer
    return right / 12


@torch.no_grad()
def test_accuracy_drop_is_the_share_of_questions_answered_rightly_less(pico, library, corpus, scored):
    got = scored.set_index(KEY).value
    assert scored.query("metric == 'accuracy_drop:sample'").value.abs().max() > 0
    child = child_with(pico, library[1], 0, "kv1", "parent")  # normalised or not: another drop
    expected = accuracy(pico.model, pico.tokenizer, True) - accuracy(child, pico.tokenizer, True)
    assert got[0, "attention", "kv1", "accuracy_drop:sample"] == pytest.approx(expected)
    plain = {"sample": {**QUESTIONS["sample"], "length_normalised": False}}
    table = library[0].query("layer == 0 and variant == 'kv1'")
    alone, _ = score(pico, (table, library[1]), corpus, metrics=[], questions=plain, head_tokens=7, seq_len=16)
    unnormalised = accuracy(pico.model, pico.tokenizer, False) - accuracy(child, pico.tokenizer, False)
    assert alone.set_index(KEY).value[0, "attention", "kv1", "accuracy_drop:sample"] == pytest.approx(unnormalised)
    assert unnormalised != pytest.approx(expected)


@pytest.mark.parametrize("how", [{"variants_at_once": 3}, {"head_tokens": 37}, {"memory_gib": 0.0012}, {"memory_gib": 0.0014}])
def test_how_much_is_computed_at_once_does_not_change_a_score(pico, library, corpus, scored, how):
    other, _ = score(pico, library, corpus, metrics=list(scoring.TEXT_METRICS), questions=QUESTIONS, **how)
    assert list(other.fingerprint) == list(scored.fingerprint)
    np.testing.assert_allclose(other.value, scored.value, rtol=1e-4, atol=1e-7)


def test_logits_of_the_parent_are_held_as_far_as_memory_goes_in_float32(pico, in_bfloat16, corpus):
    for parent, budgets in ((pico, (None, 1e-3, 5e-4)), (in_bfloat16[0], (None, 3e-3, 1e-3))):
        held = []
        for memory_gib in budgets:
            tests = scoring.make_tests(parent, corpus, settings(num_tokens=1024), {"kl"})
            scoring.Scorer(parent, tests, memory_gib)
            logits = [chunk.logits_NV for chunks in tests[0].chunks for chunk in chunks if chunk.logits_NV is not None]
            room = math.inf if memory_gib is None else memory_gib * 2**30 - tests[0].hidden_bytes
            assert sum(part.nbytes for part in logits) <= room
            held.append(sum(len(part) for part in logits) // 256)
        assert held == [4, 1, 0]
    with pytest.raises(ValueError, match=r"score.memory_gib is 1e-05, but hidden states of all scoring tokens take .* GiB: lower"):
        scoring.Scorer(pico, scoring.make_tests(pico, corpus, settings(), {"kl"}), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_running_the_parent_in_parts_equals_the_whole_forward(family):
    parent = pico_parent(family)
    ids = torch.randint(1, 257, (2, 16))
    hiddens, _ = layer_inputs(parent, ids)
    whole = parent.model(ids).logits
    hidden, num_layers = None, len(parent.layers)
    for layer in range(num_layers):
        hidden = run_layers(parent, ids, hidden, max(layer - 1, 0), layer) if layer else None
        assert hidden is None or torch.equal(hidden, hiddens[layer])
        with start_at(parent, layer, hiddens[layer]):
            torch.testing.assert_close(parent.model(ids, use_cache=False).logits, whole)
        last = last_hidden(parent, ids, hiddens[layer], layer).flatten(0, 1)
        torch.testing.assert_close(head(parent, last), whole.flatten(0, 1))
    assert torch.equal(last_hidden(parent, ids, run_layers(parent, ids, None, 0, num_layers), num_layers).flatten(0, 1), last)
    assert torch.equal(parent.model(ids).logits, whole)  # and nothing is left behind


def test_scales_and_caps_of_the_logits_are_part_of_the_head(pico):
    parent = pico_parent("gemma2", final_logit_softcapping=0.5)
    hidden = torch.randn(5, 64)
    torch.testing.assert_close(head(parent, hidden), 0.5 * torch.tanh(parent.model.lm_head(hidden) / 0.5))
    torch.testing.assert_close(head(pico, hidden), pico.model.lm_head(hidden))


def bfloat16(parent: Parent) -> Parent:
    """The parent in bfloat16, with logits of the size that those of real models have: the likeliest are between 10 and 20."""
    for parameter in parent.model.parameters():
        parameter.data = parameter.data.bfloat16()
    parent.model.lm_head.weight.data *= 4
    return parent


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """A parent in bfloat16, a child of it that is close, and a `weights_of` for its only variant."""
    parent, directory = bfloat16(pico_parent(tie_word_embeddings=False, vocab_size=2048)), tmp_path_factory.mktemp("bfloat16")
    weights_of = variants(parent, directory)
    return parent, make_child(parent, CLOSE, weights_of), weights_of


CLOSE = architecture("parent parent", "parent parent", "parent parent", "parent w152")
TEXT = torch.randint(1, 257, (6, 64), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def float64(model) -> torch.Tensor:
    """Logits [B, T, V] in float64 of the model's own last hidden states and head."""
    hidden = model.base_model(input_ids=TEXT, use_cache=False).last_hidden_state
    return hidden.double() @ model.lm_head.weight.double().T


def kl_loss_other(p, c) -> tuple[torch.Tensor, ...]:
    """Means over tokens of the KL and of either's LM loss; how many of the likeliest next tokens differ."""
    log_p, log_c = p.log_softmax(-1), c.log_softmax(-1)
    losses = [nn.functional.nll_loss(x[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()) for x in (log_p, log_c)]
    kl = nn.functional.kl_div(log_c, log_p, log_target=True, reduction="sum") / TEXT.numel()
    return kl, *losses, (p.argmax(-1) != c.argmax(-1)).sum()


def test_the_kl_of_bfloat16_models_is_that_of_their_hidden_states_and_heads_in_float64(in_bfloat16):
    parent, child, weights_of = in_bfloat16
    kl, of_parent, of_child, other = (value.item() for value in kl_loss_other(float64(parent.model), float64(child)))
    in_their_dtype = kl_loss_other(*(model(TEXT).logits.double() for model in (parent.model, child)))
    assert 1e-3 < kl < 0.05 and in_their_dtype[0] - kl > 2e-4  # there is something to lose

    close = lambda value: pytest.approx(value, abs=1e-6)  # noqa: E731
    sums = sequence_sums(parent.model, child, TEXT).sum(0)
    assert (sums[[0, 2, 3]] / torch.tensor([384, 378, 378])).tolist() == close([kl, of_parent, of_child]) and sums[1] == other
    metrics = {"kl": "kl", "lm_loss": "lm_loss", "top1_disagreement": "top1_disagreement"}
    for room in (0, math.inf):
        text = Text(parent, [TEXT], metrics, head_tokens=100)
        text.prepare(room)
        hidden = child.base_model(input_ids=TEXT, use_cache=False).last_hidden_state
        values = text.values(text.measure(0, hidden[None])[0].tolist())
        assert values == {"kl": close(kl), "lm_loss": close(of_child - of_parent), "top1_disagreement": other / 384}
    how = realised.Settings(num_tokens=384, seq_len=64, batch_size=6, head_tokens=100)
    assert realised.joint_kl(parent, [CLOSE], weights_of, [TEXT], how) == [close(kl)]


@torch.no_grad()
def test_log_likelihoods_of_choices_are_those_of_float64(in_bfloat16):
    parent, limit = in_bfloat16[0], 256
    asked = Questions(parent, read_questions(QUESTIONS["sample"]["path"], 12), "acc", False, limit, head_tokens=100)
    for index, ids in enumerate(asked.batches):
        hidden, (where, targets, whose) = last_hidden(parent, ids), asked.asked[index]
        log_p = (hidden.flatten(0, 1)[where].double() @ parent.model.lm_head.weight.double().T).log_softmax(-1)
        expected = torch.zeros(len(asked.choices), dtype=torch.float64).index_add(0, whose, log_p.gather(1, targets[:, None])[:, 0])
        torch.testing.assert_close(asked.measure(index, hidden[None])[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_gkd_beside_a_bfloat16_parent_has_the_losses_and_gradients_of_float64(in_bfloat16, dtype, error):
    parent, child = in_bfloat16[0], copy.deepcopy(in_bfloat16[1]).to(getattr(torch, dtype))
    child.requires_grad_(False).lm_head.requires_grad_(True)
    p, weight = float64(parent.model), child.lm_head.weight.detach().double().requires_grad_(True)
    c = child.base_model(input_ids=TEXT, use_cache=False).last_hidden_state.double() @ weight.T
    kl, _, loss, _ = kl_loss_other(p, c)
    (expected,) = torch.autograd.grad(kl + 0.5 * loss, weight)
    comparison = Comparison(parent.model, child, Weights(1.0, 0.0, 0.5, 1.0), head_tokens=100)
    with comparison.installed():
        losses = child(input_ids=TEXT)
        losses["loss"].backward()
        with torch.no_grad():
            held_out = child(input_ids=TEXT, held_out=True)
    for found in (losses, held_out):
        assert (found["kl"].item(), found["lm"].item()) == pytest.approx((kl.item(), loss.item()), abs=1e-6)
    assert losses["loss"].item() == pytest.approx((kl + 0.5 * loss).item(), abs=1e-6)
    assert (child.lm_head.weight.grad - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_head_multiplies_16_bits_and_adds_up_in_float32(pico, dtype):
    hidden = torch.randn(7, 64, requires_grad=True)
    rounded = [x.detach().to(dtype).double().requires_grad_(True) for x in (hidden, pico.model.lm_head.weight)]
    expected, scale = rounded[0] @ rounded[1].T, torch.randn(7, 320)
    with torch.autocast("cpu", dtype):
        logits = head_of(pico.model, pico.family, hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    (of_hidden,) = torch.autograd.grad(logits, hidden, scale)
    torch.testing.assert_close(of_hidden.double(), torch.autograd.grad(expected, rounded[0], scale.double())[0], rtol=1e-5, atol=1e-5)
    assert pico.model.lm_head(hidden).dtype == torch.float32 and "forward" not in vars(pico.model.lm_head)


@torch.no_grad()
def test_the_kl_of_a_model_to_itself_is_0_and_of_one_that_is_next_to_it_not_less(pico, in_bfloat16):
    for parent in (pico, in_bfloat16[0]):
        text = Text(parent, [TEXT], {"kl": "kl", "lm_loss": "lm_loss"}, head_tokens=100)
        text.prepare(0)
        hidden = last_hidden(parent, TEXT)
        assert text.measure(0, hidden[None]).tolist() == [[0, 0]]
        assert (sequence_sums(parent.model, parent.model, TEXT)[:, :2] == 0).all()
        child = copy.deepcopy(parent.model)
        with Comparison(parent.model, child, Weights(1.0, 0.0, 0.0, 2.0), head_tokens=100).installed():
            assert child(input_ids=TEXT)["kl"] == child(input_ids=TEXT, held_out=True)["kl"] == 0
    apart = []
    for seed in range(50):  # of one token: no other makes up for it
        text = Text(pico, [TEXT[:1, :1]], {"kl": "kl"}, head_tokens=1)
        text.prepare(math.inf)
        hidden = last_hidden(pico, TEXT[:1, :1])
        near = hidden + 1e-6 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        apart.append(text.measure(0, near[None]).item())
    assert min(apart) > -1e-7


def test_another_metric_is_measured_alone_and_the_others_are_kept(pico, library, corpus, scored):
    known = scored[scored.metric.isin(["kl", "lm_loss"])]
    changed = known.assign(value=known.value.where(known.variant == "parent", 7.0))
    more, made = score(pico, library, corpus, changed, metrics=["kl", "cosine_distance"])
    assert made == len(library[0]) and list(more.metric.unique()) == ["kl", "cosine_distance"]
    assert set(more[(more.metric == "kl") & (more.variant != "parent")].value) == {7.0}
    expected = scored[scored.metric == "cosine_distance"].value
    np.testing.assert_allclose(more[more.metric == "cosine_distance"].value, expected, rtol=1e-4, atol=1e-7)
    fewer, made = score(pico, library, corpus, scored)
    assert made == 0 and set(fewer.metric) == {"kl", "lm_loss"}


def test_a_score_is_measured_again_where_anything_that_determines_it_changed(pico, library, corpus):
    def marks(parent=pico, table=library[0], text=corpus, **changes) -> dict:
        return scoring.fingerprints(parent, table, text, settings(**{"questions": QUESTIONS, **changes}))

    def changed(others: dict) -> set[str]:
        return {metric for (row, metric), mark in marks().items() if others[row, metric] != mark}

    assert len(set(marks().values())) == len(marks()) == 3 * len(library[0])
    everything, of_text, asked = {*settings().names, "accuracy_drop:sample"}, set(settings().names), QUESTIONS["sample"]
    assert changed(marks(replace(pico, identity="another"))) == changed(marks(table=library[0].assign(fingerprint="another"))) == everything
    assert changed(marks(text=SimpleNamespace(fingerprint="another"))) == of_text
    for change in ({"num_tokens": 256}, {"seq_len": 32}, {"batch_size": 2}):
        assert changed(marks(**change)) == of_text
    for change in ({"num_questions": 6}, {"length_normalised": False}):
        assert changed(marks(questions={"sample": {**asked, **change}})) == {"accuracy_drop:sample"}
    assert not changed(marks(variants_at_once=3, head_tokens=37, memory_gib=1.0))


def test_finished_layers_are_kept_and_only_the_rest_is_scored(pico, library, corpus):
    kept = []
    whole, made = score(pico, library, corpus, keep=kept.append)
    assert made == 28 and [table.layer.max() for table in kept] == [0, 1, 2, 3]
    rest, made = score(pico, library, corpus, tables.check("scores", kept[1]), variants_at_once=2)
    assert made == 14
    np.testing.assert_allclose(rest.value, whole.value, rtol=1e-4, atol=1e-7)
    assert (rest.value[rest.layer < 2] == whole.value[whole.layer < 2]).all()


def score_as_a_rank(mine: ranks.Ranks, parent, library, corpus, folder) -> None:
    def keep(rows):
        tables.write("scores", rows, folder / mine.tag("partial"))

    table, made = score(parent, library, corpus, keep=keep, mine=mine, variants_at_once=2)
    table.to_parquet(folder / f"{mine.tag('table')}.parquet")
    assert made == 28


def test_two_processes_write_the_table_that_one_writes(pico, library, corpus, tmp_path):
    in_two_processes(score_as_a_rank, pico, library, corpus, tmp_path)
    alone, _ = score(pico, library, corpus, variants_at_once=2)
    for name in ("table", "table.1"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), alone)
    parts = [pd.read_parquet(tmp_path / name) for name in ("partial", "partial.1")]
    assert [set(part.layer) for part in parts] == [{0, 3}, {1, 2}]  # the work of low layers is greater
    rest, made = score(pico, library, corpus, parts[0], variants_at_once=2)  # as if the other had been lost
    assert made == 14
    pd.testing.assert_frame_equal(rest, alone)


def test_weights_that_overflow_are_named(pico, library, corpus, tmp_path):
    table = library[0].query("layer == 1 and variant == 'linear'").assign(path="hot.safetensors")
    save_file({"weight": torch.full((64, 64), float("nan"))}, tmp_path / "hot.safetensors")
    with pytest.raises(FloatingPointError, match=r"variant linear of attention in layer 1 is .*hot.safetensors overflow"):
        score(pico, (table, tmp_path), corpus)


def test_settings_that_measure_nothing_or_something_unknown_are_refused():
    for changes, words in {
        ("metrics", ("kll",)): r"unknown metric 'kll'. Did you mean 'kl'\? Known: kl, lm_loss",
        ("metrics", ()): "nothing would be measured",
        ("variants_at_once", 0): "score.variants_at_once is 0; expected at least 1",
    }.items():
        with pytest.raises(ValueError, match=words):
            settings(**{changes[0]: list(changes[1]) if isinstance(changes[1], tuple) else changes[1]})
    with pytest.raises(ValueError, match=r"score.questions.a: file\? Expected path"):
        settings(questions={"a": {"path": "x", "file": "y"}})


def test_questions_are_read_whatever_their_columns_are_called(tmp_path):
    rows = [
        {"question": "one", "choices": ["a", "b"], "answer": "b"},
        {"prompt": "two", "choices": ["a", "b"], "label": 0},
        {"query": "three\n", "choices": ["a", "b", "c"], "gold": 2},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = [Question("one", ("a", "b"), 1), Question("two", ("a", "b"), 0), Question("three\n", ("a", "b", "c"), 2)]
    assert read_questions(file) == expected
    pd.DataFrame({"question": ["one"], "choices": [["a", "b"]], "answer": [1]}).to_parquet(tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == expected[:1]
    assert read_questions(file, 2) == read_questions(file, 2) and len(read_questions(file, 2)) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "question 0: expected a text in question or prompt or query and a list of two texts"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "answer or gold or label is 2; expected a choice or its index, 0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "answer": "c"}, "is 'c'; expected a choice"),
        ("nonsense", "cannot be read as jsonl"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(tmp_path, row, words):
    (tmp_path / "q.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match=words):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(FileNotFoundError, match="conf/score/"):
        read_questions(tmp_path / "none.jsonl")


def test_of_a_long_prompt_the_end_is_kept(pico):
    (choice, _) = tokenize([Question("a" * 50, ("bb", "cc"), 0)], pico.tokenizer, 10)
    assert len(choice.input_ids) == 10 and choice.start == 7 and pico.tokenizer.decode(choice.input_ids) == "aaaaaaa bb"
    (choice, _) = tokenize([Question("a\n", ("bb", "cc"), 0)], pico.tokenizer, 10)
    assert pico.tokenizer.decode(choice.input_ids) == "a\nbb" and choice.start == 1


def test_the_benchmark_of_the_floor_holds_both_ways_against_float64(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (row,) = kl_floor.main(["--parents", "pico", "--device", "cpu", "--tokens", "2048", "--head-tokens", "500"])
    assert 5e-3 < row["kl"] < 0.02 and abs(row["error_float32"]) < 1e-7 and row["error_16_bit"] > 5e-5
    assert row["top1_error_float32"] == 0 and row["times_as_long"] > 0 and (tmp_path / "docs/results/kl_floor_cpu.json").exists()


def test_the_benchmark_scores_as_full_forward_passes_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "matmul_flops_per_s", lambda device, dtype: 1e11)  # slow to measure, and not what is tested
    arguments = ["--parents", "pico", "--dtype", "float32", "--tokens", "256", "--seq-len", "32", "--batch-size", "4", "--layers", "2"]
    for memory in ([], ["--memory-gib", "0.0005"]):
        (figures,) = benchmark.main([*arguments, "--at-once", "3", "--head-tokens", "50", *memory])
        assert figures["variants"] == 2 * 7 and 0 < figures["difference"] < 1e-3 and figures["median_kl"] > 0
        assert figures["times_plain"] > 0 and figures["flops"] > figures["num_tokens"] * 14 * 2 * 64 * 320  # the head alone
    written = json.loads((tmp_path / "docs/results/scoring.json").read_text())
    assert written["figures"]["geometries"] == [figures] and {"machine", "versions", "command"} <= set(written)
    assert "TFLOP/s" in capsys.readouterr().out
