"""What whole architectures really lose: the joint KL of each one's child, beside the sum of scores that was predicted.

No child is built. The parent's modules are swapped in place, one layer after the other for all architectures together:
a layer's variants are read once each, and architectures run as one up to the layer in which they part.
Shape letters: A architectures, B sequences, T tokens of one, D hidden.
"""
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError, UserError
from puzzle_core.files import read_json
from puzzle_core.parents import Parent
from puzzle_core.quality import Text
from puzzle_core.spec import NO_OP, Architecture, is_parent
from puzzle_core.subblocks import build_subblock, load_weights, swapped
from puzzle_core.trace import first, last_hidden, layer_inputs


@dataclass(frozen=True)
class Settings:
    """The text that whole architectures are measured on: `realised` in params.yaml."""

    num_tokens: int
    seq_len: int
    batch_size: int
    head_tokens: int = 256  # tokens whose logits exist at a time
    memory_gib: float | None = None  # for hidden states of all architectures; what does not fit is measured afterwards
    heal: dict | None = None  # brief GKD of a pool's children before the best is chosen (pools.py): keys of conf/gkd/; None: none

    def batches(self, corpus: Corpus) -> list:
        """[B, T] batches of development text: what an evaluation reports is of other documents."""
        return corpus.batches("development", self.num_tokens, self.seq_len, self.batch_size, seed="realised")


@torch.no_grad()
def joint_kl(parent: Parent, architectures: Sequence[Architecture], weights_of: Callable, batches: list, settings: Settings) -> list[float]:
    """KL(parent ‖ child) in nats a token of each architecture's child, over [B, T] batches of one shape.

    `weights_of` is that of `make_child`. FloatingPointError where a child's logits are not numbers.
    """
    text = Text(parent, batches, {"kl": "kl"}, settings.head_tokens)
    text.prepare(room=0.0)
    at_once = len(architectures)
    if settings.memory_gib is not None:  # what enters a layer and what leaves it, of each architecture
        at_once = max(1, int((settings.memory_gib * 2**30 - text.hidden_bytes) // text.hidden_bytes))
    found = []
    for start in range(0, len(architectures), at_once):
        found += _climb(text, architectures[start : start + at_once], weights_of)
    for architecture, kl in zip(architectures, found, strict=True):
        if not math.isfinite(kl):
            raise NotFiniteError(f"KL of the child is {kl}: it overflows in the parent's dtype; its layers: {architecture.to_json()}")
    return found


def _climb(text: Text, architectures: Sequence[Architecture], weights_of: Callable) -> list[float]:
    parent = text.parent
    _, others = layer_inputs(parent, text.batches[0])
    with parent.present(0):
        hiddens = {(): [layer_inputs(parent, ids, last_layer=0)[0][0] for ids in text.batches]}
    paths: list[tuple] = [()] * len(architectures)  # what each has chosen so far: its key in `hiddens`
    for layer, block in enumerate(tqdm(parent.layers, desc=f"{len(architectures)} architectures", unit="layer", leave=False)):
        paths = [(path, architecture.rows_of(layer)) for path, architecture in zip(paths, architectures, strict=True)]
        leaving, modules = {}, {}
        with parent.present(layer):
            for path in dict.fromkeys(paths):
                before, choice = path
                with _swapped(parent, layer, choice, weights_of, modules):
                    leaving[path] = [first(block(hidden_BTD, **others[layer])) for hidden_BTD in hiddens[before]]
        hiddens = leaving
    sums_A = torch.zeros(len(architectures), dtype=torch.float64)
    for index, ids in enumerate(text.batches):
        last = {path: last_hidden(parent, ids, entering[index], len(parent.layers)) for path, entering in hiddens.items()}
        sums_A += text.measure(index, torch.stack([last[path] for path in paths]))[:, 0].cpu()
    return (sums_A / text.num_tokens).tolist()


@contextlib.contextmanager
def _swapped(parent: Parent, layer: int, choice: tuple, weights_of: Callable, modules: dict[tuple, nn.Module]) -> Iterator[None]:
    """The parent with `choice` in `layer`; `modules` are those of this layer that were read already."""
    with contextlib.ExitStack() as stack:
        for row in choice:
            subblock, variant = row
            if is_parent(str(variant)):
                continue
            if row not in modules:
                modules[row] = build_subblock(parent, layer, subblock, variant)
                if variant != NO_OP:
                    load_weights(modules[row], *weights_of(layer, subblock, variant))
            stack.enter_context(swapped(parent, layer, subblock, modules[row]))
        yield


def read_architectures(path: Path) -> list[dict]:
    """Rows of `group`, `name` and `architecture` from a JSON list: rivals.json, pool.json, frontier.json, or one's own.

    An entry is an architecture, or a mapping that has one under `architecture`; null there is none. ValueError for anything else.
    """
    rows = []
    try:
        for number, entry in enumerate(read_json(path), start=1):
            entry = entry if isinstance(entry, dict) else {"architecture": entry}
            if entry["architecture"] is not None:
                architecture = Architecture.from_json(entry["architecture"])
                rows.append({"group": path.stem, "name": entry.get("method", f"{path.stem} {number}"), "architecture": architecture})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no list of architectures ({type(error).__name__}: {error}); expected such as rivals.json, pool.json and "
            'frontier.json are: [{"architecture": [{"attention": "kv1", "ffn": "w768"}, ...]}, ...]'
        ) from error
    return rows


def measure(parent: Parent, rows: list[dict], predict: Callable, weights_of: Callable, batches: list, settings: Settings) -> list[dict]:
    """The rows, each with what `predict` says of its architecture, its child's joint KL, and the ratio; ValueError without rows."""
    if not rows:
        raise UserError("no architectures to measure: name files, architectures=[rivals.json,pool.json], or draw some, random=100")
    predicted = [predict(row["architecture"]) for row in rows]
    kls = joint_kl(parent, [row["architecture"] for row in rows], weights_of, batches, settings)
    return [
        {**row, "predicted": score, "realised": kl, "ratio": kl / score if score else None, "architecture": row["architecture"].to_json()}
        for row, score, kl in zip(rows, predicted, kls, strict=True)
    ]


def table(rows: list[dict]) -> str:
    """The rows as text, least realised first."""
    columns = ["name", "predicted", "realised", "ratio"]
    return pd.DataFrame(rows)[columns].sort_values("realised").to_string(index=False, float_format="{:.4g}".format)


def rank_correlations(frame: pd.DataFrame, of: str) -> pd.Series:
    """Spearman's rank correlation of each other column with the column `of`; NaN where it has none."""
    return frame.rank().corr()[of].drop(of)


def agreement(rows: list[dict]) -> dict[str, float | int | None]:
    """How well `predicted` tells `realised`: Spearman's rank correlation and the median ratio; None where the rows do not say."""
    frame = pd.DataFrame(rows)
    correlation = rank_correlations(frame[["predicted", "realised"]], "realised")["predicted"]
    found = {"spearman": correlation, "median_ratio": frame["ratio"].astype(float).median()}
    return {"num_architectures": len(frame), **{name: float(value) if math.isfinite(value) else None for name, value in found.items()}}


def in_words(summary: dict[str, float | int | None]) -> str:
    """What `agreement` found."""
    correlation, ratio = ("unknown" if summary[name] is None else f"{summary[name]:.3f}" for name in ("spearman", "median_ratio"))
    return f"rank correlation with the prediction {correlation}, median ratio {ratio}"
