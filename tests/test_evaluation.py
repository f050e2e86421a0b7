"""Accuracy on tasks is what the model's own log-likelihoods say, with errors that resampling confirms; the report says it all."""
import copy
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import EXCERPT, ROOT, architecture, pico_parent, variants
from datasets import Dataset

from puzzle_core import evaluation, report, tasks
from puzzle_core.children import make_child
from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError, UserError
from puzzle_core.files import write_json
from puzzle_core.spec import Constraint, Scenario, Solution
from puzzle_core.tasks import Answers, Exam, Task, retained, standard_error

SAMPLE = [json.loads(line) for line in (ROOT / "data/questions/sample.jsonl").read_text().split("\n") if line]


def written(path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@torch.no_grad()
def loglikelihood(parent, before: str, after: str) -> float:
    start, ids = (parent.tokenizer(text, return_tensors="pt").input_ids for text in (before, before + after))
    log_p = parent.model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return log_p[start.shape[1] - 1 :].sum().item()


def test_multiple_choice_is_answered_by_log_likelihood(pico, tmp_path):
    rows = [{"query": row["question"] + "\n" * (n % 2), "choices": row["choices"], "gold": row["answer"]} for n, row in enumerate(SAMPLE)]
    exam = Exam([Task(metric, written(tmp_path / "q.jsonl", rows), metric=metric) for metric in ("acc", "acc_norm")], batch_size=5)
    got = exam.ask(pico.model, pico.tokenizer)
    for metric, answers in got.items():
        expected = []
        for row in rows:
            prompt, space = row["query"].rstrip(), row["query"][len(row["query"].rstrip()) :] or " "
            ranks = [loglikelihood(pico, prompt, space + c) / (len(c) if metric == "acc_norm" else 1) for c in row["choices"]]
            expected.append(float(np.argmax(ranks) == row["gold"]))
        assert answers.right_N.tolist() == expected and 0 < sum(expected) < len(rows)
        assert answers.chance == pytest.approx(np.mean([1 / len(row["choices"]) for row in rows]))
    assert got["acc"].right_N.tolist() != got["acc_norm"].right_N.tolist()
    assert exam.ask(pico.model, pico.tokenizer)["acc"].right_N.tolist() == got["acc"].right_N.tolist()


def test_a_cloze_is_right_where_the_model_would_say_it_and_a_schema_where_its_text_is_likelier(pico, tmp_path):
    said, rows = [], []
    for row in SAMPLE:
        ids = pico.tokenizer(row["question"], return_tensors="pt").input_ids
        word = pico.tokenizer.decode(pico.model(ids).logits[0, -1].argmax())
        said.append(float(word.isascii() and word.isalnum()))
        rows.append({"context": row["question"], "continuation": word if said[-1] else "~"})
    schemas = [{"context_options": row["choices"][:2], "continuation": row["question"], "gold": 1} for row in SAMPLE]
    exam = Exam(
        [
            Task("cloze", written(tmp_path / "cloze.jsonl", rows), delimiter=""),
            Task("schema", written(tmp_path / "schema.jsonl", schemas), num_questions=10),
        ],
        batch_size=7,
    )
    got = exam.ask(pico.model, pico.tokenizer)
    assert got["cloze"].right_N.tolist() == said and 0 < sum(said) < len(said) and got["cloze"].chance == 0
    drawn = [schemas[n] for n in tasks.drawn(len(schemas), 10, "")]
    likelier = [[loglikelihood(pico, text, f" {row['continuation']}") for text in row["context_options"]] for row in drawn]
    assert got["schema"].right_N.tolist() == [float(second > first) for first, second in likelier] and got["schema"].chance == 0.5


def on_the_hub(monkeypatch, parts: dict, groups: dict | None = None) -> None:
    """lm-eval has these tasks by name, and groups of them."""
    import lm_eval.tasks

    class Manager:
        all_tasks = [*(groups or {}), *parts]

        def load(self, names):
            (name,) = names
            some = groups[name].members if groups and name in groups else [name]
            return {"tasks": {part: parts[part] for part in some}, "groups": {name: groups[name]} if groups and name in groups else {}}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)


def group(*members: str, weight_by_size: bool = True):
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    made = Group("both", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=weight_by_size)])
    made.members = members
    return made


def task_of(rows: list[dict], name: str = "theirs", **config):
    """A task as lm-eval has them, of these rows."""
    from lm_eval.api.task import ConfigurableTask

    data = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test"}
    return ConfigurableTask(config={"task": name, **data, **config})


def metrics(*names: str) -> list[dict]:
    return [{"metric": name} for name in names]


CHOICES = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
SAID = {"output_type": "loglikelihood", "doc_to_text": "question", "doc_to_target": "{{choices[0]}}"}
GENERATED = {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "{{choices[0]}}",
             "generation_kwargs": {"max_gen_toks": 4, "until": ["~"]}}  # fmt: skip


def test_tasks_of_lm_eval_are_asked_by_name_a_group_as_one(pico, tmp_path, monkeypatch):
    file = written(tmp_path / "q.jsonl", SAMPLE)
    parts = {name: tasks._local(Task(name, file)) for name in ("one", "two")}
    on_the_hub(monkeypatch, parts, {"both": group("one", "two")})
    got = Exam([Task("both", num_questions=6, num_fewshot=1)], batch_size=8).ask(pico.model, pico.tokenizer)["both"]
    assert len(got.right_N) == 12 and (got.right_N[:6] == got.right_N[6:]).all()
    assert all(i.args[0].count("\n\n") == 1 for i in parts["one"].instances)
    with pytest.raises(ValueError, match="evaluation.tasks: one would be asked twice"):
        Exam([Task("both"), Task("one")], batch_size=8)
    with pytest.raises(ValueError, match=r"lm-eval has no task 'bothh'. Did you mean 'both'\?"):
        Exam([Task("bothh")], batch_size=8)
    with pytest.raises(ValueError, match="evaluation.tasks.one: one has no metric 'f1'. Those that can be used: acc, acc_norm"):
        Exam([Task("one", metric="f1")], batch_size=8)


def test_a_group_whose_parts_lm_eval_weighs_alike_is_asked_for_as_many_of_each(pico, tmp_path, monkeypatch):
    parts = {name: tasks._local(Task(name, written(tmp_path / f"{name}.jsonl", SAMPLE[:num]))) for name, num in (("one", 4), ("two", 6))}
    on_the_hub(monkeypatch, parts, {"both": group("one", "two", weight_by_size=False)})
    with pytest.raises(ValueError, match="evaluation.tasks.both: lm-eval takes the mean of this group's parts, whatever their sizes"):
        Exam([Task("both")], batch_size=8)
    Exam([Task("both", num_questions=4)], batch_size=8)
    on_the_hub(monkeypatch, parts, {"both": group("one", "two")})
    assert len(Exam([Task("both")], batch_size=8).ask(pico.model, pico.tokenizer)["both"].right_N) == 10


def test_guessing_gets_the_share_of_choices_that_count_as_right(pico, monkeypatch):
    """lm-eval asks for each choice a second time, without the question, where acc_mutual_info is among a task's metrics."""
    several = [{**row, "answer": [row["answer"], 0 if row["answer"] else 1]} for row in SAMPLE]
    on_the_hub(
        monkeypatch,
        {
            "mutual": task_of(SAMPLE, "mutual", metric_list=metrics("acc", "acc_norm", "acc_mutual_info", "exact_match"), **CHOICES),
            "several": task_of(several, "several", metric_list=metrics("acc"), **CHOICES),
        },
    )
    one_of = np.mean([1 / len(row["choices"]) for row in SAMPLE])
    for metric in ("acc", "acc_norm", "acc_mutual_info", "exact_match"):
        (got,) = Exam([Task("mutual", metric=metric)], batch_size=16).ask(pico.model, pico.tokenizer).values()
        assert got.chance == pytest.approx(0 if metric == "exact_match" else one_of)  # which asks for the likeliest text of all
    (got,) = Exam([Task("several")], batch_size=16).ask(pico.model, pico.tokenizer).values()
    assert got.chance == pytest.approx(2 * one_of)


def test_guessing_among_three_texts_gets_a_third(pico, tmp_path):
    several = [row for row in SAMPLE if len(row["choices"]) > 2]
    rows = [{"context_options": row["choices"][:3], "continuation": row["question"], "gold": 1} for row in several]
    (got,) = Exam([Task("schema", written(tmp_path / "s.jsonl", rows))], batch_size=16).ask(pico.model, pico.tokenizer).values()
    assert got.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("config", "metric", "words"),
    [
        ({**SAID, "metric_list": metrics("acc", "perplexity")}, "perplexity", "perplexity of theirs is no accuracy.*can be used: acc$"),
        ({**CHOICES, "metric_list": metrics("acc", "f1", "mcc")}, "f1", "f1 of theirs is no accuracy.*can be used: acc$"),
        ({**CHOICES, "metric_list": metrics("acc", "acc_norm", "mcc")}, "mcc", "mcc of theirs is no accuracy.*can be used: acc, acc_norm$"),
        ({**CHOICES, "metric_list": metrics("brier_score")}, "brier_score", "can be used: none of this task's: leave it out"),
        ({"output_type": "loglikelihood_rolling", "doc_to_target": "question", "metric_list": metrics("word_perplexity", "bits_per_byte")},
         "acc", "theirs has no metric 'acc'. Those that can be used: none"),
        ({**CHOICES, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]}, "acc", "is no accuracy"),
        ({**CHOICES, "metric_list": metrics("acc"), "process_results": lambda doc, results: {"acc": 0.5}}, "acc",
         "theirs makes acc of the choices in a way of its own. Say what guessing gets: `chance: 0.25`"),
    ],
)  # fmt: skip
def test_what_is_no_accuracy_is_refused_with_the_metrics_that_are_before_anything_is_asked(monkeypatch, config, metric, words):
    on_the_hub(monkeypatch, {"theirs": task_of(SAMPLE, **{"doc_to_text": "question", **config})})
    with pytest.raises(ValueError, match=f"evaluation.tasks.theirs: .*{words}"):
        Exam([Task("theirs", metric=metric)], batch_size=8)


def test_a_mean_of_percentages_is_no_accuracy_and_chance_may_be_said(pico, monkeypatch):
    def results(doc, found):
        return {"acc": 0.75, "rouge": 40.0}

    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "rouge")]
    on_the_hub(monkeypatch, {"theirs": task_of(SAMPLE[:2], metric_list=listed, process_results=results, **CHOICES)})
    (got,) = Exam([Task("theirs", chance=0.25)], batch_size=8).ask(pico.model, pico.tokenizer).values()
    assert (got.accuracy, got.chance) == (0.75, 0.25)
    with pytest.raises(ValueError, match=r"evaluation.tasks.theirs: rouge of a question of theirs is 40.0, no share of a right answer"):
        Exam([Task("theirs", metric="rouge", chance=0.0)], batch_size=8).ask(pico.model, pico.tokenizer)


def test_of_several_filters_the_first_one_counts_each_question_once(pico, monkeypatch):
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern, "fallback": fallback}, {"function": "take_first"}]}
        for name, pattern, fallback in (("strict", "(never said)", "said"), ("flexible", "(.*)", "other"))
    ]
    shared = {"metric_list": metrics("exact_match"), **GENERATED, "doc_to_target": "said"}
    on_the_hub(monkeypatch, {f"{n}": task_of(SAMPLE[:5], f"{n}", filter_list=filters[:: 1 - 2 * n], **shared) for n in (0, 1)})
    got = Exam([Task("0", metric="exact_match"), Task("1", metric="exact_match")], batch_size=8).ask(pico.model, pico.tokenizer)
    assert [answers.right_N.tolist() for answers in got.values()] == [[1.0] * 5, [0.0] * 5] and got["0"].chance == 0


def with_bos(tokenizer):
    """The same tokenizer, which begins every text with a token of its own."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>"})
    pair = ("<s>", other.bos_token_id)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[pair])
    return other


def test_prompts_begin_with_a_bos_where_the_tokenizer_puts_one(pico, tmp_path):
    seen = []
    watch = pico.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.extend(args[0][:, :2].tolist()))
    exam = Exam([Task("mine", written(tmp_path / "q.jsonl", SAMPLE[:6]))], batch_size=1)
    for tokenizer, beginnings in ((pico.tokenizer, 0), (with_bos(pico.tokenizer), 1)):
        seen.clear()
        exam.ask(pico.model, tokenizer)
        assert len(seen) >= 12 and {ids.count(with_bos(pico.tokenizer).bos_token_id) for ids in seen} == {beginnings}
        assert not beginnings or {ids[0] for ids in seen} == {tokenizer.bos_token_id}
    watch.remove()


@torch.no_grad()
def test_choices_that_are_alike_in_bfloat16_are_told_apart_as_in_float64(tmp_path):
    parent, rows = pico_parent(), []
    for parameter in parent.model.parameters():
        parameter.data = parameter.data.bfloat16()
    for row in SAMPLE:
        ids = parent.tokenizer(row["question"] + "\n", return_tensors="pt").input_ids
        logits = parent.model(ids).logits[0, -1].double()
        exact = parent.model.model(ids).last_hidden_state[0, -1].double() @ parent.model.lm_head.weight.double().T
        letters = [n for n in range(1, 257) if parent.tokenizer.decode(n).isalnum() and parent.tokenizer.decode(n).isascii()]
        alike = [(b, a) for a in letters for b in letters if logits[a] == logits[b] and exact[a] > exact[b] + 1e-4]
        rows += [{"query": row["question"] + "\n", "choices": [parent.tokenizer.decode(n) for n in pair], "gold": 1} for pair in alike[:3]]
    assert len(rows) > 20
    exam = Exam([Task("alike", written(tmp_path / "q.jsonl", rows), delimiter="")], batch_size=1)
    assert exam.ask(parent.model, parent.tokenizer)["alike"].accuracy == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "a"}, "question 0: expected a text in context and one in continuation"),
        ({"context_options": ["a"], "continuation": "b", "gold": 0}, "question 0: expected a list of two texts or more in context_options"),
        ({"context_options": ["a", "b"], "continuation": "b", "gold": 2}, "gold is 2; expected a choice or its index, 0 to 1"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        Exam([Task("mine", written(tmp_path / "q.jsonl", [row]))], batch_size=1)


def test_an_unknown_key_of_a_task_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'num_question' in evaluation.tasks.mine. Did you mean 'num_questions'\?"):
        Task.of("mine", {"num_question": 3})
    with pytest.raises(UserError, match="evaluation.tasks.mine is 5; expected keys among path, num_questions"):
        Task.of("mine", 5)


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("chance", (5.0, 1, -0.1, "x", True, float("nan"), [0.5]), "a share from 0 to below 1"),
        ("num_questions", (0, -1, 2.5, "3", True), "a whole number of at least 1"),
        ("num_fewshot", (-1, 1.0, "2", True, float("inf")), "a whole number of at least 0"),
        ("path", (5, ["a"]), "a text"),
        ("metric", (5, ["acc"]), "a text"),
        ("delimiter", (5, True), "a text"),
    ],
)
def test_a_value_of_a_task_that_cannot_be_is_refused_by_its_path(key, values, expected):
    for value in values:
        with pytest.raises(UserError, match=f"evaluation.tasks.mine.{key} is .*; expected {expected}"):
            Task.of("mine", {key: value})


def test_the_least_and_no_numbers_of_a_task_are_taken():
    for settings in ({"chance": 0, "num_questions": 1, "num_fewshot": 0}, {"chance": None, "num_questions": None, "num_fewshot": None}):
        assert Task.of("mine", settings) == Task("mine", **settings)


@pytest.mark.parametrize("num_fewshot", [4, 9999])
def test_examples_are_refused_where_the_questions_are_too_few(pico, tmp_path, num_fewshot):
    settings = {"path": written(tmp_path / "q.jsonl", SAMPLE), "num_questions": 4}
    words = f"evaluation.tasks.mine.num_fewshot is {num_fewshot}, and mine has 4 questions to take examples from; expected at most 3"
    with pytest.raises(UserError, match=words):
        Exam([Task.of("mine", {**settings, "num_fewshot": num_fewshot})], batch_size=8)
    exam = Exam([Task.of("mine", {**settings, "num_fewshot": 3})], batch_size=8)
    assert len(exam.ask(pico.model, pico.tokenizer)["mine"].right_N) == 4
    twice = {"path": written(tmp_path / "twice.jsonl", [*SAMPLE[:3], SAMPLE[0]]), "num_fewshot": 3}
    with pytest.raises(UserError, match="has 4 questions to take examples from; expected at most 2"):
        Exam([Task.of("mine", twice)], batch_size=8)


def test_the_error_of_what_is_retained_is_that_of_resampled_questions():
    random = np.random.default_rng(0)
    parents = [Answers((random.random(n) < share).astype(float), chance) for n, share, chance in ((400, 0.6, 0.25), (250, 0.8, 0.5))]
    children = [Answers(p.right_N * (random.random(len(p.right_N)) < 0.9), p.chance) for p in parents]
    share, error = retained(parents, children)
    assert share == pytest.approx(sum(c.accuracy - c.chance for c in children) / sum(p.accuracy - p.chance for p in parents))
    resampled = []
    for _ in range(2000):
        picks = [random.integers(len(p.right_N), size=len(p.right_N)) for p in parents]
        again = [[Answers(a.right_N[pick], a.chance) for a, pick in zip(some, picks, strict=True)] for some in (parents, children)]
        resampled.append(retained(*again)[0])
    assert error == pytest.approx(np.std(resampled), rel=0.1)
    assert retained(parents, parents) == (1, 0) and standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)
    right_N = np.tile([1.0, 0.0, 0.0, 0.0], 100)
    lucky, better = (Answers(right_N, 0.25 - errors * standard_error(right_N)) for errors in (1.999, 2.001))  # above chance
    assert retained([lucky], [better]) is None and retained([better], [better]) == (1, 0)
    assert retained([*parents, lucky], [*children, lucky]) == (share, error)


def test_a_childs_row_has_accuracies_beside_the_rest(pico, tmp_path, capsys):
    corpus, file = Corpus(pico.tokenizer, EXCERPT), written(tmp_path / "q.jsonl", SAMPLE)
    settings = evaluation.Settings({"num_tokens": 512, "seq_len": 64, "batch_size": 4}, 0, 1, {"mine": {"path": file}}, 8)
    chosen = architecture(*["kv1 w80"] * 4)
    child = make_child(pico, chosen, variants(pico, tmp_path))
    solution = Solution(chosen, Scenario(1, 8, 2), "kl", 0.4, 0.4, "optimal", 0.0, {}, {}, (), hardware="another machine")
    before = dict(pico.tokenizer.special_tokens_map)
    rows = evaluation.measure(pico.model, child, corpus, solution, "eager", settings)
    assert "costs of another machine, but times are measured on" in capsys.readouterr().err
    assert pico.tokenizer.special_tokens_map == before
    accuracy, error = (rows["parent"][name] for name in ("mine_accuracy", "mine_accuracy_stderr"))
    above_chance = accuracy - rows["parent"]["mine_chance"] > 2 * error
    assert rows["parent"].get("mine_retained", 0) == rows["parent"].get("accuracy_retained", 0) == above_chance
    assert set(rows["child"]) == set(rows["parent"]) >= {"kl", "speedup", "mine_accuracy", "mine_accuracy_stderr", "mine_chance"}
    assert all(isinstance(value, float | int) for row in rows.values() for value in row.values())


def test_continuations_are_of_held_out_documents_and_greedy(pico):
    corpus = Corpus(pico.tokenizer, {**EXCERPT, "domain_column": "source"})
    rows = evaluation.continuations({"parent": pico.model}, corpus, num_prompts=3, prompt_len=12, num_tokens=4)
    sources = [{d.domain for d in corpus.splits["test"] if d.text.startswith(row["prompt"].rstrip("\ufffd"))} for row in rows]
    assert len(set().union(*sources)) == 3
    ids = pico.tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids
    for _ in range(4):
        ids = torch.cat([ids, pico.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert rows[0]["parent"] == pico.tokenizer.decode(ids[0, 12:], skip_special_tokens=True)


class Page(HTMLParser):
    """What a page would fetch, and what it says."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.tags, self.words = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster", "style")]

    def handle_data(self, data):
        self.words += data
        self.fetched += ["css"] if "url(" in data or "@import" in data else []

    @property
    def is_self_contained(self) -> bool:
        return all(value.startswith("data:") for value in self.fetched) and not {"script", "iframe", "object", "embed"} & self.tags


ROW = {"kl": 0.5, "kl_stderr": 0.02, "perplexity": 20.0, "top1_agreement": 0.8, "speedup": 1.5, "latency_ms": 100.0, "memory_mib": 50.0,
       "num_params": 4e6, "kl_code": 0.7, "perplexity_code": 9.5, "top1_agreement_code": 0.7, "piqa_accuracy": 0.6,
       "piqa_accuracy_stderr": 0.01, "piqa_chance": 0.5, "accuracy_retained": 0.9, "accuracy_retained_stderr": 0.05}  # fmt: skip


def test_a_report_of_half_a_run_says_what_there_is_and_escapes_what_models_say():
    totals = {"latency_ms": 80.0, "memory_mib": 50.0, "num_params": 4e6}
    limits = (Constraint("speedup", 1.5, "latency_ms", 100.0),)
    chosen = Solution(architecture(*["kv1 w80"] * 4), Scenario(2, 16, 4), "kl", 0.4, 0.4, "optimal", 0.0, totals, totals, limits)
    metrics = {"parent": {**ROW, "kl": 0.0, "kl_stderr": 0.0}, "predicted": chosen.predicted(), "child": ROW}
    pool = [{"solution": 1, "predicted": 0.4, "realised": 0.5, "chosen": 1}]
    run = report.Run(metrics, chosen, [], [], pool, [], {}, {})
    texts = [{"prompt": "<script src='http://x'></script>", "text": "a", "parent": "b", "child": "c & d"}]
    page = Page(report.page(run, texts, "speedup", {"use": {"parent": "pico"}, "seed": 7}, "a chip"))
    assert page.is_self_contained and "<script src='http://x'></script>" in page.words and "c & d" in page.words
    words = ("A child of pico", "speedup 1.5", "0.500 ± 0.020", "0.400", "0.500 (+25.0%)", "0.600 ± 0.010", "90.0% ± 5.0%", "9.5",
             "seed: 7", "a chip")  # fmt: skip
    assert all(word in page.words for word in words), [word for word in words if word not in page.words]
    assert "after distillation" not in page.words and "Frontier" not in page.words and "Global distillation" not in page.words
    assert "latency" not in page.words and "child before distillation no times" in " ".join(page.words.split())
    timed = {"child": {"parent": {**ROW, "latency_ms": 150.0}, "child": ROW}}
    page = Page(report.page(replace(run, timed=timed), [], "speedup", {"use": {"parent": "pico"}}, "a chip"))
    assert "latency, parent → child, ms" in page.words and page.words.count("150 → 100") == 2 and "no times" not in page.words


def test_a_report_refuses_a_folder_whose_child_is_not_the_one_of_the_metrics(tmp_path):
    assert report._pair(tmp_path, "child", ROW) is None  # an earlier version wrote no pair
    write_json(tmp_path / "child" / evaluation.RECORD, {"parent": ROW, "child": {**ROW, "latency_ms": 90.0}})
    assert report._pair(tmp_path, "child", ROW)["child"]["latency_ms"] == 90.0
    with pytest.raises(ValueError, match="child is not the child that .*metrics/child.json is of"):
        report._pair(tmp_path, "child", {**ROW, "kl": 0.6})


def test_a_child_on_the_frontier_of_a_time_stands_at_the_pace_of_the_costs(monkeypatch):
    totals = {"latency_ms": 80.0}
    chosen = Solution(architecture(*["kv1 w80"] * 4), Scenario(2, 16, 4), "kl", 0.4, 0.4, "optimal", 0.0, totals, {"latency_ms": 120.0}, ())
    timed = {"child": {"parent": {"latency_ms": 300.0}, "child": {"latency_ms": 210.0}}}
    run = report.Run({"parent": {}, "predicted": {"kl": 0.4}, "child": {"kl": 0.5, "latency_ms": 210.0}}, chosen, [], [], [], [], {}, timed)
    drawn = []
    monkeypatch.setattr(report.plots, "frontier_picture", lambda *given: drawn.append(given[-1]))
    report._frontier_picture(run, "latency_ms", None)
    report._frontier_picture(replace(run, timed={}), "latency_ms", None)
    assert drawn[0] == {"predicted": (80.0, 0.4), "realised, before distillation": (pytest.approx(84.0), 0.5)}
    assert drawn[1] == {"predicted": (80.0, 0.4)}


def test_a_child_that_overflows_is_refused_by_what_to_change(pico):
    batches = [torch.randint(1, 257, (2, 16))]
    for factor in (1e4, float("nan")):
        child = copy.deepcopy(pico.model)
        child.get_output_embeddings().weight.data.mul_(factor)
        with pytest.raises(NotFiniteError, match="lower lr in conf/gkd/"):
            evaluation.compare(pico.model, child, batches)
