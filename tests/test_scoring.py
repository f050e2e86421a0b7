"""A score is what the whole model loses with one subblock replaced, however it is computed and by however many processes."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, architecture, pico_parent, variants
from safetensors.torch import save_file
from test_ranks import in_two_processes
from torch import nn

from benchmarks import demo
from benchmarks import scoring as benchmark
from puzzle_core import evaluation, ranks, scoring, tables
from puzzle_core.children import make_child
from puzzle_core.corpus import Corpus
from puzzle_core.parents import Parent
from puzzle_core.questions import Question, read_questions, tokenize
from puzzle_core.scoring import Settings, score_library
from puzzle_core.spec import Variant
from puzzle_core.trace import head, last_hidden, layer_inputs, run_layers, start_at

EXCERPT = {"source": "files", "path": str(ROOT / "data/corpus/excerpt.parquet"), "text_column": "text", "validation_fraction": 0.1}
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
    ids = torch.as_tensor(np.concatenate(corpus.batches("validation", 512, 64, 4, seed="score")))
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
    child = child_with(pico, library[1], 1, "no_op", "parent")
    expected = accuracy(pico.model, pico.tokenizer, True) - accuracy(child, pico.tokenizer, True)
    assert got[1, "attention", "no_op", "accuracy_drop:sample"] == pytest.approx(expected)
    plain = {"sample": {**QUESTIONS["sample"], "length_normalised": False}}
    table = library[0].query("layer == 1 and variant == 'no_op'")
    alone, _ = score(pico, (table, library[1]), corpus, metrics=[], questions=plain, head_tokens=7, seq_len=16)
    expected = accuracy(pico.model, pico.tokenizer, False) - accuracy(child, pico.tokenizer, False)
    assert alone.set_index(KEY).value[1, "attention", "no_op", "accuracy_drop:sample"] == pytest.approx(expected)


@pytest.mark.parametrize("how", [{"variants_at_once": 3}, {"head_tokens": 37}, {"memory_gib": 0.0012}, {"memory_gib": 0.0014}])
def test_how_much_is_computed_at_once_does_not_change_a_score(pico, library, corpus, scored, how):
    other, _ = score(pico, library, corpus, metrics=list(scoring.TEXT_METRICS), questions=QUESTIONS, **how)
    assert list(other.fingerprint) == list(scored.fingerprint)
    np.testing.assert_allclose(other.value, scored.value, rtol=1e-4, atol=1e-7)


def test_logits_of_the_parent_are_held_as_far_as_memory_goes(pico, corpus):
    held = []
    for memory_gib in (None, 1e-3, 5e-4):
        tests = scoring.make_tests(pico, corpus, settings(num_tokens=1024), {"kl"})
        scoring.Scorer(pico, tests, memory_gib)
        held.append([chunks[0].logits_NV is not None for chunks in tests[0].chunks])
    assert [sum(batches) for batches in held] == [4, 1, 0]
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


def test_a_cap_on_the_logits_is_part_of_the_head(pico):
    hidden, plain = torch.randn(5, 64), pico.model.lm_head.forward
    pico.model.lm_head.forward = lambda x: 30 * torch.tanh(plain(x) / 30)
    try:
        torch.testing.assert_close(head(pico, hidden), 30 * torch.tanh(plain(hidden) / 30))
    finally:
        del pico.model.lm_head.forward


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
