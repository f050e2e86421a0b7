"""Scores: put one variant into the parent, measure what the model loses on held-out tokens."""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint
from puzzle_core.parents import Parent
from puzzle_core.spec import PARENT, Variant
from puzzle_core.subblocks import build_subblock, load_weights, swapped
from puzzle_core.trace import layer_inputs, start_at

VERSION = 1  # raise when a change here, or in a module below, changes what a score is
TOKENS_AT_ONCE = 256  # tokens whose whole vocabulary is normalised at a time


@dataclass(frozen=True)
class Settings:
    """How scores are measured: one preset of conf/score/."""

    num_tokens: int
    seq_len: int
    batch_size: int


class Reference:
    """The parent's predictions on one [B, T] batch of tokens: what a child's logits are compared with."""

    def __init__(self, input_ids_BT: Tensor, logits_BTV: Tensor):
        self.input_ids_BT = input_ids_BT
        self.targets = input_ids_BT.roll(-1, dims=1).flatten().split(TOKENS_AT_ONCE)
        self.counts = torch.ones_like(input_ids_BT, dtype=torch.float64)
        self.counts[:, -1] = 0  # nothing follows the last token of a row
        self.probs = [part.float().softmax(-1) for part in logits_BTV.flatten(0, 1).split(TOKENS_AT_ONCE)]
        self.neg_entropy = [torch.special.entr(p).sum(-1).neg() for p in self.probs]
        self.lm_loss = self.compare(logits_BTV)[1]

    def compare(self, logits_BTV: Tensor) -> tuple[float, float]:
        """Sums over the batch, in nats: KL(parent ‖ child) of every token, cross-entropy of the B · (T - 1) predicted ones.

        One log-softmax of TOKENS_AT_ONCE rows of the child's logits at a time serves both.
        """
        kl = loss = 0.0
        counts = self.counts.flatten().split(TOKENS_AT_ONCE)
        parts = logits_BTV.flatten(0, 1).split(TOKENS_AT_ONCE)
        for part, p, neg_entropy, target, counted in zip(parts, self.probs, self.neg_entropy, self.targets, counts, strict=True):
            log_c = part.float().log_softmax(-1)
            kl += (neg_entropy.double() - torch.linalg.vecdot(p, log_c).double()).sum().item()
            loss -= (log_c.gather(1, target[:, None])[:, 0].double() * counted).sum().item()
        return kl, loss


def score_library(
    parent: Parent, library: pd.DataFrame, blocks: Path, corpus: Corpus, settings: Settings, known: pd.DataFrame, keep: Callable
) -> tuple[pd.DataFrame, int]:
    """The scores table of `library`, and the number of variants scored now.

    Its metrics, on held-out tokens, are kl and lm_loss, the increase over the parent's. Rows of `known` with a
    matching fingerprint are taken over; `keep(table)` is called with the rows so far after each layer, so that a killed
    run loses one layer at most.
    """
    batches = corpus.batches("validation", settings.num_tokens, settings.seq_len, settings.batch_size, seed="score")
    shared = (VERSION, asdict(settings), parent.identity, corpus.fingerprint)
    wanted = {row.Index: fingerprint(*shared, row.layer, row.subblock, row.variant, row.fingerprint) for row in library.itertuples()}
    done = {fp: rows.to_dict("records") for fp, rows in known.groupby("fingerprint")}
    scores = {index: done[fp] for index, fp in wanted.items() if fp in done}
    missing = library.drop(index=list(scores))
    if not missing.empty:
        scorer = _Scorer(parent, [torch.as_tensor(b, device=parent.device) for b in batches])
        with tqdm(total=len(missing), desc="score", unit="variant") as progress:
            for layer, rows in missing.groupby("layer"):
                for row in rows.itertuples():
                    values = scorer.score(layer, row.subblock, Variant.parse(row.variant), blocks / row.path, row.fingerprint)
                    scores[row.Index] = [
                        {
                            "layer": layer,
                            "subblock": row.subblock,
                            "variant": row.variant,
                            "metric": metric,
                            "value": value,
                            "num_tokens": scorer.num_tokens,
                            "fingerprint": wanted[row.Index],
                        }
                        for metric, value in values.items()
                    ]
                    progress.update()
                keep(pd.DataFrame([record for records in scores.values() for record in records]))
    return pd.DataFrame([record for index in library.index for record in scores[index]]), len(missing)


class _Scorer:
    """The parent's predictions and layer inputs on the scoring tokens, held once for all variants."""

    @torch.no_grad()
    def __init__(self, parent: Parent, batches: list[Tensor]):
        self.parent = parent
        self.num_tokens = sum(batch.numel() for batch in batches)
        self.num_predicted = sum(batch[:, 1:].numel() for batch in batches)
        self.inputs, self.references = [], []
        for batch in tqdm(batches, desc="the parent's predictions", unit="batch", leave=False):
            self.inputs.append(layer_inputs(parent, batch)[0])
            self.references.append(Reference(batch, parent.model(input_ids=batch, use_cache=False).logits))

    @torch.no_grad()
    def score(self, layer: int, subblock: str, variant: Variant, path: Path, fingerprint: str) -> dict[str, float]:
        """KL to the parent, and LM loss over the parent's, in nats a token. The parent's own are 0 by definition."""
        if variant == PARENT:
            return {"kl": 0.0, "lm_loss": 0.0}
        module = build_subblock(self.parent, layer, subblock, variant)
        load_weights(module, path, fingerprint)
        total_kl = total_increase = 0.0
        with swapped(self.parent, layer, subblock, module):
            for inputs, reference in zip(self.inputs, self.references, strict=True):
                with start_at(self.parent, layer, inputs[layer]):
                    logits = self.parent.model(input_ids=reference.input_ids_BT, use_cache=False).logits
                kl, loss = reference.compare(logits)
                total_kl += kl
                total_increase += loss - reference.lm_loss
        values = {"kl": total_kl / self.num_tokens, "lm_loss": total_increase / self.num_predicted}
        if not all(math.isfinite(value) for value in values.values()):
            raise FloatingPointError(
                f"score of variant {variant} of {subblock} in layer {layer} is {values}: its weights in {path} "
                "overflow in the parent's dtype; use dtype float32 in conf/parent/, or delete the file and train it again"
            )
        return values
