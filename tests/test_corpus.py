"""The corpus: packed by document, as the parent's tokenizer begins a text, and on three sides that nothing crosses."""
import copy

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import EXCERPT, ROOT
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from puzzle_core import bld, evaluation, gkd, questions, realised, scoring
from puzzle_core.config import composed, fill
from puzzle_core.corpus import Corpus, Document, start_ids
from puzzle_core.errors import UserError


@pytest.fixture(scope="module")
def corpus(pico) -> Corpus:
    return Corpus(pico.tokenizer, EXCERPT)


def test_packing_is_deterministic_full_and_split_by_document(corpus):
    one, two = (corpus.sequences("train", 5000, 64, seed="a") for _ in range(2))
    assert np.array_equal(one, two) and one.shape == (79, 64)
    assert not np.array_equal(one, corpus.sequences("train", 5000, 64, seed="b"))
    sides = {split: {document.text for document in documents} for split, documents in corpus.splits.items()}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values()))
    assert all(0.07 < len(sides[split]) / sum(map(len, sides.values())) < 0.13 for split in ("development", "test"))
    for split, texts in sides.items():
        first, *whole, _ = corpus.tokenizer.decode(corpus.sequences(split, 30_000, 64, seed="a").ravel()).split(corpus.tokenizer.eos_token)
        assert len(whole) > 1 and {first, *whole} <= texts


def test_a_document_stays_on_its_side_whatever_else_the_corpus_holds(pico, corpus, tmp_path):
    texts = [document.text for documents in corpus.splits.values() for document in documents[:40]]
    pd.DataFrame({"text": [*texts, *texts[::3]]}).to_parquet(tmp_path / "part.parquet")  # duplicates too
    part = Corpus(pico.tokenizer, {**EXCERPT, "path": str(tmp_path / "part.parquet")})
    for split, documents in part.splits.items():
        assert {d.text for d in documents} == {d.text for d in corpus.splits[split][:40]}


def test_another_split_is_another_corpus(pico, corpus):
    for split in ("development", "test"):
        assert Corpus(pico.tokenizer, {**EXCERPT, f"{split}_fraction": 0.2}).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.1}, "validation_fraction is no key any more.*set development_fraction and test_fraction"),
        ({"test_fraction": 0}, "development_fraction is 0.1 and test_fraction 0; expected two shares"),
        ({"development_fraction": 0.9}, "together less than 1"),
        ({"test_fraction": None}, "test_fraction None; expected two shares"),
    ],
)
def test_shares_that_leave_no_three_splits_are_refused(pico, changes, message):
    with pytest.raises(ValueError, match=message):
        Corpus(pico.tokenizer, {**EXCERPT, **changes})


@pytest.mark.parametrize("file", sorted((ROOT / "conf/corpus").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_corpus_has_three_sides_as_large_as_it_says(pico, monkeypatch, file):
    preset, texts = yaml.safe_load(file.read_text()), [f"text {number}" for number in range(4000)]
    monkeypatch.setattr("puzzle_core.corpus.documents", lambda **preset: (Document(text, None) for text in texts))
    sides = {split: {d.text for d in documents} for split, documents in Corpus(pico.tokenizer, preset).splits.items()}
    assert sum(map(len, sides.values())) == len(texts) and set().union(*sides.values()) == set(texts)
    for split in ("development", "test"):
        share = preset[f"{split}_fraction"]
        deviation = (share * (1 - share) / len(texts)) ** 0.5  # of a share of so many documents, each on a side by its hash
        assert 0 < share < 0.5 and abs(len(sides[split]) / len(texts) - share) < 4 * deviation


def test_a_corpus_too_small_says_how_much_it_has_and_needs(corpus):
    with pytest.raises(ValueError, match=r"too small: its test split has [\d,]+ tokens, [\d,]+ are needed.*raise test_fraction"):
        corpus.sequences("test", 10**8, 64, seed="a")


def with_bos(tokenizer) -> PreTrainedTokenizerFast:
    """The same, but that it begins every text as Llama's and Gemma's do: by its post-processor."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens(["<bos>"])
    bos = ("<bos>", backend.token_to_id("<bos>"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize(("adds", "start"), [({}, 0), ({"add_bos_token": True}, 1), ({"add_bos_token": True, "add_eos_token": True}, 1)])
def test_a_tokenizer_may_be_told_to_begin_a_text_by_its_config(pico, adds, start):
    backend = copy.deepcopy(pico.tokenizer.backend_tokenizer)
    backend.add_special_tokens(["<bos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", **adds)
    assert start_ids(tokenizer) == [tokenizer.bos_token_id] * start


def test_documents_and_rows_begin_as_the_tokenizer_begins_a_text(pico, corpus):
    begun = Corpus(tokenizer := with_bos(pico.tokenizer), EXCERPT)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (start_ids(pico.tokenizer), start_ids(tokenizer)) == ([], [bos]) and begun.fingerprint != corpus.fingerprint
    rows, bare = begun.sequences("train", 50_000, 64, seed="a"), corpus.sequences("train", 50_000, 64, seed="a")
    assert (rows[:, 0] == bos).all() and (bare != bos).all()
    stream = rows.ravel()
    assert (stream[1:][stream[:-1] == eos] == bos).all() and (stream == eos).sum() > 10
    text = stream[stream != bos]
    assert np.array_equal(text, bare.ravel()[: len(text)])  # nothing else is another
    assert (stream == bos).sum() == len(rows) + ((stream[:-1] == eos) & (np.arange(1, len(stream)) % 64 > 0)).sum()  # once at each place


def test_continuations_and_questions_begin_as_the_tokenizer_begins_a_text(pico, monkeypatch):
    begun = Corpus(tokenizer := with_bos(pico.tokenizer), EXCERPT)
    asked, bos, generate = [], tokenizer.bos_token_id, pico.model.generate
    monkeypatch.setattr(pico.model, "generate", lambda ids, **more: asked.append(ids) or generate(ids, **more))
    rows = evaluation.continuations({"parent": pico.model}, begun, num_prompts=2, prompt_len=12, num_tokens=4)
    assert all(ids.shape == (2, 13) and (ids[:, 0] == bos).all() and (ids[:, 1:] != bos).all() for ids in asked)
    assert [len(row["prompt"]) for row in rows] == [12, 12] and all(len(row["text"]) == 4 for row in rows)
    some = [questions.Question("ab", ("cd", "ef"), 0)]
    (whole, _), (cut, _) = (questions.tokenize(some, tokenizer, most) for most in (100, 4))
    letters = tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    assert (whole.input_ids, whole.start) == ([bos, *letters], 3) and (cut.input_ids, cut.start) == ([bos, *letters[-3:]], 1)
    (bare, _) = questions.tokenize(some, pico.tokenizer, 100)
    assert (bare.input_ids, bare.start) == (letters, 2)


def test_a_tokenizer_that_ends_a_text_too_does_not_end_a_document_twice(pico):
    backend = copy.deepcopy(with_bos(pico.tokenizer).backend_tokenizer)
    special = [("<bos>", backend.token_to_id("<bos>")), ("<eos>", 0)]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    stream = Corpus(tokenizer, EXCERPT).sequences("train", 20_000, 64, seed="a").ravel()
    assert start_ids(tokenizer) == [special[0][1]] and not ((stream[1:] == 0) & (stream[:-1] == 0)).any()
    (choice, _) = questions.tokenize([questions.Question("ab", ("cd", "ef"), 0)], tokenizer, 100)
    assert 0 not in choice.input_ids


def test_a_tokenizer_without_eos_is_refused_in_one_line(pico):
    backend = copy.deepcopy(pico.tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the parent's tokenizer has no EOS token, which ends every document") as raised:
        Corpus(PreTrainedTokenizerFast(tokenizer_object=backend), EXCERPT)
    assert "\n" not in str(raised.value)


class Watched(Corpus):
    """The excerpt, of which is known what each use reads: all documents of a split at most, and how many tokens."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, {**EXCERPT, "domain_column": "source"})
        self.asked: list[tuple[str, str | None, int]] = []

    def sequences(self, split, num_tokens, seq_len, seed, domain=None):
        self.asked.append((split, domain, -(-num_tokens // seq_len) * seq_len))
        return np.broadcast_to(np.int64(1), (-(-num_tokens // seq_len), seq_len))  # takes no memory, however many


@pytest.fixture(scope="module")
def watched(pico) -> Watched:
    return Watched(pico.tokenizer)


PRESETS = [(group, file.stem) for group in ("bld", "score", "gkd") for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]


def reads(corpus: Watched, parent, cfg) -> dict[str, list[tuple[str, str | None, int]]]:
    """What each use of text asks the corpus for."""
    scored = fill(scoring.Settings, cfg.score)
    of_child, of_pool = fill(evaluation.Settings, cfg.evaluation), fill(realised.Settings, cfg.realised)
    phases = fill(gkd.Settings, cfg.gkd).each_phase()
    uses = {
        "bld": lambda: bld.text_of(corpus, fill(bld.Settings, cfg.bld), 0),
        "score": lambda: scoring.make_tests(parent, corpus, scored, set(scoring.TEXT_METRICS)),
        "pool": lambda: of_pool.batches(corpus),
        "gkd": lambda: [gkd._whole_batches(corpus, phase, "gkd-0") for phase in phases],
        "evaluation": lambda: of_child.batches(corpus),
        "domains": lambda: [of_child.batches(corpus, domain) for domain in corpus.domains],
    }
    found = {}
    for use, read in uses.items():
        corpus.asked = found[use] = []
        read()
    return found


@pytest.mark.parametrize(("group", "name"), PRESETS)
def test_what_is_reported_is_of_documents_that_nothing_was_learnt_from_or_chosen_by(pico, watched, group, name, monkeypatch):
    monkeypatch.setattr(scoring, "Text", lambda *arguments: None)  # of batches it makes tensors
    corpus, cfg = watched, composed("out=x", f"{group}={name}")
    found = reads(corpus, pico, cfg)
    of = {use: {(split, domain) for split, domain, _ in asked} for use, asked in found.items()}
    assert of["evaluation"] == {("test", None)} and of["domains"] == {("test", domain) for domain in corpus.domains}
    assert of["pool"] == {("development", None)}
    assert of["bld"] == of["gkd"] == of["score"] == {("train", None), ("development", None)}
    assert [split for split, _, _ in found["bld"]] == ["train", "train", "development"]
    documents = {
        use: {d.text for split, domain, _ in asked for d in corpus.splits[split] if domain in (None, d.domain)}
        for use, asked in found.items()
    }
    reported = documents.pop("evaluation") | documents.pop("domains")
    assert reported and not reported & set().union(*documents.values())
    if name in ("demo", "pico"):  # made for the excerpt; at most eight characters are a token
        for split, domain, num_tokens in (one for asked in found.values() for one in asked):
            assert 8 * num_tokens < sum(len(d.text) for d in corpus.splits[split] if domain in (None, d.domain)), (split, domain)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("numbers.jsonl", '{"text": 5}\n', "column 'text' holds int, not text"),
        ("code.py", "print()", "code.py is no file of text that is read here"),
    ],
)
def test_files_that_hold_no_text_are_refused_by_name(pico, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        Corpus(pico.tokenizer, {**EXCERPT, "path": str(tmp_path / name)})
