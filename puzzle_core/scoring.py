"""Scores: put one variant into the parent, measure what the model loses on development tokens.

Only what a variant changes is computed: the replaced layer once for each variant, then the layers above it for several
variants at once, stacked along the batch. Layers come one after the other, the parent's hidden states with them.
Shape letters: K variants, B sequences, T tokens of one, D hidden.
"""
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError, UserError
from puzzle_core.files import fingerprint
from puzzle_core.parents import Parent
from puzzle_core.quality import Questions, Text
from puzzle_core.questions import read_questions
from puzzle_core.ranks import ALONE, Ranks
from puzzle_core.spec import did_you_mean, is_parent, parse_variant
from puzzle_core.subblocks import build_subblock, load_weights, swapped
from puzzle_core.trace import first, last_hidden, layer_call, run_layers

VERSION = 3  # raise when a change here, or in a module below, changes what a score is
# metric: (which text it is measured on, what is measured for each of its tokens)
TEXT_METRICS = {
    "kl": ("development", "kl"),
    "lm_loss": ("development", "lm_loss"),
    "top1_disagreement": ("development", "top1_disagreement"),
    "cosine_distance": ("development", "cosine_distance"),
    "lm_loss_train": ("train", "lm_loss"),
}


@dataclass(frozen=True)
class Settings:
    """How scores are measured: one preset of conf/score/."""

    num_tokens: int
    seq_len: int
    batch_size: int
    metrics: list[str]  # of TEXT_METRICS
    questions: dict[str, dict] | None = None  # name: path, num_questions, length_normalised; gives accuracy_drop:name
    variants_at_once: int = 1  # variants of one layer that go through the layers above it together
    head_tokens: int = 256  # tokens whose logits exist at a time
    memory_gib: float | None = None  # for what is held of all tokens; None: whatever it takes
    compile: bool = False  # on a GPU: what follows the head as one kernel

    def __post_init__(self):
        for name in self.metrics:
            if name not in TEXT_METRICS:
                hint = did_you_mean(name, TEXT_METRICS)
                raise UserError(f"score.metrics: unknown metric '{name}'.{hint} Known: {', '.join(TEXT_METRICS)}.")
        for name, preset in (self.questions or {}).items():
            if unknown := preset.keys() - {"path", "num_questions", "length_normalised"} or {"path"} - preset.keys():
                raise UserError(f"score.questions.{name}: {', '.join(unknown)}? Expected path; num_questions, length_normalised if wanted")
        if not self.names:
            raise UserError("score.metrics is empty and there are no score.questions: nothing would be measured")
        for key in ("num_tokens", "variants_at_once", "head_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"score.{key} is {getattr(self, key)}; expected at least 1")

    @property
    def names(self) -> list[str]:
        """Every metric of the table, the first the one that is drawn."""
        return [*self.metrics, *(f"accuracy_drop:{name}" for name in self.questions or {})]


class Scorer:
    """The parent's hidden states on all tests, at one layer at a time: what replacing subblocks of that layer costs."""

    def __init__(self, parent: Parent, tests: list[Text | Questions], memory_gib: float | None = None):
        """Runs the parent once. ValueError if `memory_gib` is less than what must be held."""
        room = math.inf if memory_gib is None else memory_gib * 2**30
        needed = sum(test.hidden_bytes for test in tests)
        if needed > room:
            raise UserError(
                f"score.memory_gib is {memory_gib:g}, but hidden states of all scoring tokens take {needed / 2**30:.3g} GiB: "
                "lower num_tokens in conf/score/ or raise memory_gib"
            )
        self.parent, self.tests, self.layer, room = parent, tests, 0, room - needed
        for test in tests:
            room = test.prepare(room)
        self.inputs: list[list[Tensor | None]] = [[None] * len(test.batches) for test in tests]

    def climb(self, layer: int) -> None:
        """Move up to `layer`: the layers below are not run again."""
        for test, inputs in zip(self.tests, self.inputs, strict=True):
            for index, ids in enumerate(test.batches):
                inputs[index] = run_layers(self.parent, ids, inputs[index], self.layer, layer)
        self.layer = layer

    @torch.no_grad()
    def sums(self, replacements: list[Mapping[str, nn.Module]]) -> list[Tensor]:
        """For each test what its `values` are made of, [K, ...] for K `replacements` (subblock: module) at this layer.

        The results stay on the device: nothing here waits for them.
        """
        return [
            sum(test.measure(i, self._last_hidden(ids, inputs[i], replacements)) for i, ids in enumerate(test.batches))
            for test, inputs in zip(self.tests, self.inputs, strict=True)
        ]

    def _last_hidden(self, input_ids_BT: Tensor, hidden_BTD: Tensor | None, replacements: list[Mapping[str, nn.Module]]) -> Tensor:
        """The last hidden states of the parent with each of `replacements`, all through the layers above at once: [K, B, T, D]."""
        outputs = []
        with self.parent.present(self.layer):
            args, kwargs = layer_call(self.parent, input_ids_BT, hidden_BTD, self.layer)  # once: making a mask waits for the GPU
            for modules in replacements:
                with contextlib.ExitStack() as stack:
                    for subblock, module in modules.items():
                        stack.enter_context(swapped(self.parent, self.layer, subblock, module))
                    outputs.append(first(self.parent.layers[self.layer](*args, **kwargs)))
        num, (num_rows, _) = len(outputs), input_ids_BT.shape
        stacked = last_hidden(self.parent, input_ids_BT.repeat(num, 1), torch.cat(outputs), self.layer + 1)
        return stacked.unflatten(0, (num, num_rows))

    def values(self, sums: list[Tensor]) -> list[dict[str, float]]:
        """The metrics of each of the K replacements."""
        rows = zip(*(part.tolist() for part in sums), strict=True)
        return [{k: v for test, row in zip(self.tests, parts, strict=True) for k, v in test.values(row).items()} for parts in rows]


def make_tests(parent: Parent, corpus: Corpus, settings: Settings, metrics: set[str]) -> list[Text | Questions]:
    """What `metrics` are measured by."""
    tests: list[Text | Questions] = []
    compiled = settings.compile and parent.device.type == "cuda"
    for split, seed in (("development", "score"), ("train", "score-train")):
        kinds = {name: kind for name, (where, kind) in TEXT_METRICS.items() if name in metrics and where == split}
        if kinds:
            batches = corpus.batches(split, settings.num_tokens, settings.seq_len, settings.batch_size, seed=seed)
            tests.append(Text(parent, batches, kinds, settings.head_tokens, compiled))
    for name, preset in (settings.questions or {}).items():
        if (metric := f"accuracy_drop:{name}") in metrics:
            questions, normalised = read_questions(preset["path"], preset.get("num_questions")), preset.get("length_normalised", False)
            tests.append(Questions(parent, questions, metric, normalised, settings.batch_size * settings.seq_len, settings.head_tokens))
    return tests


def fingerprints(parent: Parent, library: pd.DataFrame, corpus: Corpus, settings: Settings) -> dict[tuple[int, str], str]:
    """(row of the library, metric): hash of all that determines that score. How much is scored at once does not."""
    text = (settings.num_tokens, settings.seq_len, settings.batch_size, corpus.fingerprint)
    of_metric: dict[str, tuple] = {name: (name, *text) for name in settings.metrics}
    for name, preset in (settings.questions or {}).items():
        questions = [asdict(q) for q in read_questions(preset["path"], preset.get("num_questions"))]
        of_metric[f"accuracy_drop:{name}"] = (fingerprint(questions), preset.get("length_normalised", False))
    return {
        (row.Index, metric): fingerprint(VERSION, parent.identity, more, row.layer, row.subblock, row.variant, row.fingerprint)
        for row in library.itertuples()
        for metric, more in of_metric.items()
    }


def score_library(
    parent: Parent,
    library: pd.DataFrame,
    blocks: Path,
    corpus: Corpus,
    settings: Settings,
    known: pd.DataFrame,
    keep: Callable,
    ranks: Ranks = ALONE,
) -> tuple[pd.DataFrame, int]:
    """The scores table of `library`, and the number of variants scored now; the same on every rank.

    Rows of `known` with a matching fingerprint are taken over; `keep(table)` is called with the rows so far after each
    layer, so that a killed run loses one layer at most. With several ranks each scores its share of the layers.
    """
    wanted = fingerprints(parent, library, corpus, settings)
    done = dict(zip(known["fingerprint"], known.to_dict("records"), strict=True))
    records = {key: done[fp] for key, fp in wanted.items() if fp in done}
    lacking = wanted.keys() - records.keys()
    missing = library.loc[sorted({index for index, _ in lacking})]
    ranks.wait()  # all have the same `known` before anyone writes more
    layers = [(layer, rows) for layer, rows in missing.groupby("layer")]
    mine = [layers[i] for i in ranks.mine([len(rows) * _layers_run(parent, layer) for layer, rows in layers])]
    made = {}
    if mine:
        scorer = Scorer(parent, make_tests(parent, corpus, settings, {metric for _, metric in lacking}), settings.memory_gib)
        num_tokens = {name: test.num_tokens for test in scorer.tests for name in test.names}
        for rows, values in _score_layers(scorer, mine, blocks, settings, show=ranks.first):
            for row, metrics in zip(rows, values, strict=True):
                key = {"layer": row.layer, "subblock": row.subblock, "variant": row.variant}
                for metric, value in metrics.items():
                    more = {"metric": metric, "value": value, "num_tokens": num_tokens[metric], "fingerprint": wanted[row.Index, metric]}
                    made[row.Index, metric] = {**key, **more}
            keep(pd.DataFrame([*({**records, **made}).values()]))
    records |= dict(ranks.gather(list(made.items())))
    return pd.DataFrame([records[key] for key in wanted]), len(missing)


def _layers_run(parent: Parent, layer: int) -> float:
    """Work of scoring one variant of `layer`, in layers: itself, those above, and the head."""
    size_of_layer = sum(p.numel() for p in parent.layers[layer].parameters())
    return len(parent.layers) - layer + parent.model.get_output_embeddings().weight.numel() / size_of_layer


def _score_layers(scorer: Scorer, layers: list[tuple], blocks: Path, settings: Settings, show: bool) -> Iterator[tuple[list, list[dict]]]:
    """For each layer its rows and their metrics; FloatingPointError that names the variant where one is not finite."""
    rows_of = {layer: list(table.itertuples()) for layer, table in layers}
    groups_of = {layer: _groups(rows, settings.variants_at_once) for layer, rows in rows_of.items()}
    modules = _filled(scorer.parent, [group for groups in groups_of.values() for group in groups], blocks)
    with tqdm(total=sum(map(len, rows_of.values())), desc="score", unit="variant", disable=not show) as progress:
        for layer, rows in rows_of.items():
            scorer.climb(layer)
            sums = []
            for group in groups_of[layer]:
                sums.append(scorer.sums(next(modules)))
                progress.update(len(group))
            measured = iter([values for part in sums for values in scorer.values(part)])
            of_parent = {name: 0.0 for test in scorer.tests for name in test.names}
            values = [of_parent if is_parent(row.variant) else next(measured) for row in rows]
            for row, metrics in zip(rows, values, strict=True):
                if not all(map(math.isfinite, metrics.values())):
                    raise NotFiniteError(
                        f"score of variant {row.variant} of {row.subblock} in layer {layer} is {metrics}: its weights in "
                        f"{blocks / row.path} overflow in the parent's dtype; use dtype float32 in conf/parent/, or delete "
                        "the file and train it again"
                    )
            progress.update(len(rows) - sum(map(len, groups_of[layer])))
            yield rows, values


def _groups(rows: list, size: int) -> list[list]:
    """The rows that must be measured, `size` at a time; the parent's are 0 by definition."""
    measured = [row for row in rows if not is_parent(row.variant)]
    return [measured[at : at + size] for at in range(0, len(measured), size)]


def _filled(parent: Parent, groups: list[list], blocks: Path) -> Iterator[list[dict[str, nn.Module]]]:
    """The modules of each group of rows, a thread reading the next group's weights while this one is scored."""
    stream = torch.cuda.Stream(parent.device) if parent.device.type == "cuda" else None

    def fill(group: list, modules: list[nn.Module]) -> list[dict[str, nn.Module]]:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for row, module in zip(group, modules, strict=True):
                load_weights(module, blocks / row.path, row.fingerprint)
        return [{row.subblock: module} for row, module in zip(group, modules, strict=True)]

    def begin(group: list) -> Future:
        modules = [build_subblock(parent, row.layer, row.subblock, parse_variant(row.subblock, row.variant)) for row in group]
        if stream:  # the memory they were given may still be read by work that is under way
            stream.wait_stream(torch.cuda.current_stream(parent.device))
        return reader.submit(fill, group, modules)

    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            modules = (ahead or begin(group)).result()
            ahead = None if following is None else begin(following)
            yield modules
