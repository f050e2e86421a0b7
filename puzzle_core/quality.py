"""What a model has lost against the parent, on text and on questions.

The head runs on a few tokens at a time, so logits of all tokens never exist; the parent's are held as far as memory is
given, else made again from its last hidden states, once for all variants that are measured together. Logits are float32,
also those of a 16-bit model.
Shape letters: K variants, B sequences, T tokens of one, N tokens, D hidden, V vocabulary, M metrics.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from puzzle_core.families import family_for
from puzzle_core.parents import Parent
from puzzle_core.questions import Question, tokenize
from puzzle_core.trace import head, head_of, last_hidden

TOKENS_AT_ONCE = 256  # of logits that are compared whole: tokens whose vocabulary is normalised at a time
IN_CACHE = 2**21  # logits of which a CPU makes several copies at a time: three times faster than all that the head gives at once


def _token_sums(
    kinds: tuple[str, ...],
    child_NV: Tensor,
    parent_NV: Tensor | None,
    lse_N: Tensor,
    loss_N: Tensor,
    top_N: Tensor,
    targets_N: Tensor,
    counted_N: Tensor,
) -> Tensor:
    """Sums over tokens, in nats, of the `kinds` that logits tell: [M] float64. `lse_N`, `loss_N`, `top_N` are the parent's."""
    log_c_NV = child_NV - child_NV.logsumexp(-1, keepdim=True)  # a CPU's log_softmax is 1e-5 off, the parent's sum is not
    costs = {}
    if "kl" in kinds:
        log_p_NV = parent_NV - lse_N[:, None]
        p_NV = log_p_NV.exp()
        # What the rounding of either logsumexp adds to the first part, 1e-6, the second, whose sum would be 0, takes away.
        costs["kl"] = (p_NV * (log_p_NV - log_c_NV) + (log_c_NV.exp() - p_NV)).sum(-1)
    if "lm_loss" in kinds:
        costs["lm_loss"] = (-log_c_NV.gather(1, targets_N[:, None])[:, 0] - loss_N) * counted_N
    if "top1_disagreement" in kinds:
        costs["top1_disagreement"] = (child_NV.argmax(-1) != top_N).float()
    return torch.stack([costs[kind].double().sum() for kind in kinds])


@dataclass
class _Chunk:
    """What the parent says to a few tokens: all that a child's logits are compared with but the logits themselves."""

    targets_N: Tensor
    counted_N: Tensor  # 0 where nothing follows
    lse_N: Tensor
    loss_N: Tensor
    top_N: Tensor
    logits_NV: Tensor | None = None

    @classmethod
    def of(cls, logits_NV: Tensor, targets_N: Tensor, counted_N: Tensor, hold: bool) -> "_Chunk":
        lse_N = logits_NV.logsumexp(-1)
        loss_N = lse_N - logits_NV.gather(1, targets_N[:, None])[:, 0]
        return cls(targets_N, counted_N, lse_N, loss_N, logits_NV.argmax(-1), logits_NV if hold else None)

    def sums(self, kinds: tuple[str, ...], child_NV: Tensor, parent_NV: Tensor | None, measure: Callable = _token_sums) -> Tensor:
        mine = (self.lse_N, self.loss_N, self.top_N, self.targets_N, self.counted_N)
        if child_NV.device.type != "cpu":
            return measure(kinds, child_NV, parent_NV, *mine)
        rows = max(1, IN_CACHE // child_NV.shape[1])
        parents = [None] * -(-len(child_NV) // rows) if parent_NV is None else parent_NV.split(rows)
        parts = zip(child_NV.split(rows), parents, *(x.split(rows) for x in mine), strict=True)
        return sum(measure(kinds, *part) for part in parts)


def _following(input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The token after each, and 1 where there is one: [N] each."""
    counted_BT = torch.ones_like(input_ids_BT, dtype=torch.float32)
    counted_BT[:, -1] = 0
    return input_ids_BT.roll(-1, dims=1).flatten(), counted_BT.flatten()


@torch.no_grad()
def sequence_sums(parent: PreTrainedModel, child: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """Sums over the tokens of each sequence, [B, 4] float64: KL(parent ‖ child) in nats, tokens after which the likeliest
    next one is another, cross-entropy of the T - 1 predicted ones for the parent and for the child.

    Of neither model are there ever the logits of more than TOKENS_AT_ONCE tokens.
    """
    family = family_for(parent.config)
    hiddens = [model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state for model in (parent, child)]
    sums = []
    for row in zip(*hiddens, *(x.view_as(input_ids_BT) for x in _following(input_ids_BT)), strict=True):
        total = 0
        for parent_ND, child_ND, targets_N, counted_N in zip(*(x.split(TOKENS_AT_ONCE) for x in row), strict=True):
            chunk = _Chunk.of(head_of(parent, family, parent_ND), targets_N, counted_N, hold=True)
            kl, other, increase = chunk.sums(("kl", "top1_disagreement", "lm_loss"), head_of(child, family, child_ND), chunk.logits_NV)
            of_parent = (chunk.loss_N * counted_N).double().sum()
            total = total + torch.stack([kl, other, of_parent, of_parent + increase])
        sums.append(total)
    return torch.stack(sums)


class Text:
    """Metrics of every token of fixed [B, T] batches."""

    def __init__(self, parent: Parent, batches: list, metrics: dict[str, str], head_tokens: int, compiled: bool = False):
        """`metrics` maps names to what is measured: kl, lm_loss, top1_disagreement, cosine_distance.

        `head_tokens` is how many tokens' logits exist at a time; `compiled`: what follows the head is one kernel.
        """
        self.parent, self.metrics, self.head_tokens = parent, metrics, head_tokens
        self.of_logits = tuple(kind for kind in dict.fromkeys(metrics.values()) if kind != "cosine_distance")
        self.kinds = (*self.of_logits, *(["cosine_distance"] if "cosine_distance" in metrics.values() else []))
        self.batches = [torch.as_tensor(batch, device=parent.device) for batch in batches]
        self.num_tokens = sum(ids.numel() for ids in self.batches)
        self.divisors = {kind: self.num_tokens for kind in self.kinds} | {"lm_loss": sum(ids[:, 1:].numel() for ids in self.batches)}
        self.token_sums = torch.compile(_token_sums) if compiled else _token_sums
        self.hiddens_ND: list[Tensor] = []
        self.chunks: list[list[_Chunk]] = []

    @property
    def names(self) -> list[str]:
        return list(self.metrics)

    @property
    def hidden_bytes(self) -> int:
        """What is held of all tokens whatever the budget: the input of one layer and the parent's last hidden states."""
        return 2 * self.num_tokens * self.parent.model.config.hidden_size * self.parent.model.dtype.itemsize

    @torch.no_grad()
    def prepare(self, room: float) -> float:
        """Run the parent; hold its logits for as many batches as fit into `room` bytes. Returns the room left."""
        for ids in tqdm(self.batches, desc="the parent's predictions", unit="batch", leave=False):
            hidden_ND = last_hidden(self.parent, ids).flatten(0, 1)
            size = ids.numel() * self.parent.model.get_output_embeddings().weight.shape[0] * torch.float32.itemsize
            hold = "kl" in self.kinds and size <= room
            room -= size if hold else 0
            parts = zip(*(x.split(self.head_tokens) for x in (hidden_ND, *_following(ids))), strict=True)
            self.chunks.append([_Chunk.of(head(self.parent, part_ND), *more, hold) for part_ND, *more in parts])
            self.hiddens_ND.append(hidden_ND)
        return room

    def measure(self, index: int, hidden_KBTD: Tensor) -> Tensor:
        """What K variants lose on batch `index`, given their last hidden states: sums over tokens, [K, M]."""
        hidden_KND, parent_ND = hidden_KBTD.flatten(1, 2), self.hiddens_ND[index]
        sums = []
        if self.of_logits:
            total = 0
            parts = zip(self.chunks[index], parent_ND.split(self.head_tokens), hidden_KND.split(self.head_tokens, dim=1), strict=True)
            for chunk, of_parent_ND, of_children_KND in parts:
                recompute = "kl" in self.of_logits and chunk.logits_NV is None  # once for all K variants
                parent_NV = head(self.parent, of_parent_ND) if recompute else chunk.logits_NV
                total = total + torch.stack(
                    [chunk.sums(self.of_logits, head(self.parent, h_ND), parent_NV, self.token_sums) for h_ND in of_children_KND]
                )
            sums.append(total)
        if "cosine_distance" in self.kinds:  # half the squared distance on the unit sphere: exact also where it is small
            unit_KND, of_parent_ND = (nn.functional.normalize(x.float(), dim=-1) for x in (hidden_KND, parent_ND))
            sums.append((unit_KND - of_parent_ND).square().sum((1, 2), dtype=torch.float64)[:, None] / 2)
        return torch.cat(sums, dim=1)

    def values(self, sums_M: list[float]) -> dict[str, float]:
        mean = {kind: value / self.divisors[kind] for kind, value in zip(self.kinds, sums_M, strict=True)}
        return {name: mean[kind] for name, kind in self.metrics.items()}


class Questions:
    """Accuracy on multiple-choice questions: the choice of the highest log-likelihood after the prompt is the answer given."""

    def __init__(
        self, parent: Parent, questions: list[Question], metric: str, length_normalised: bool, batch_tokens: int, head_tokens: int
    ):
        """`length_normalised`: the log-likelihood of a choice is divided by its number of characters.

        A batch has at most `batch_tokens` tokens, or one choice.
        """
        self.parent, self.names, self.head_tokens = parent, [metric], head_tokens
        self.questions, self.length_normalised = questions, length_normalised
        limit = getattr(parent.model.config, "max_position_embeddings", None) or batch_tokens
        self.choices = sorted(tokenize(questions, parent.tokenizer, limit), key=lambda choice: -len(choice.input_ids))
        self.num_tokens = sum(len(choice.input_ids) - choice.start for choice in self.choices)
        self.batches: list[Tensor] = []
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []  # of each token of a choice: where it is predicted, itself, whose it is
        first = 0
        while first < len(self.choices):
            num_rows = max(1, batch_tokens // len(self.choices[first].input_ids))
            self._add_batch(first, self.choices[first : first + num_rows])
            first += num_rows

    def _add_batch(self, first: int, choices: list) -> None:
        """Rows of one length, filled up at the end: with causal attention nothing before sees it."""
        length = len(choices[0].input_ids)
        rows = [[*c.input_ids, *[c.input_ids[-1]] * (length - len(c.input_ids))] for c in choices]
        asked = [
            (row * length + at - 1, choice.input_ids[at], first + row)
            for row, choice in enumerate(choices)
            for at in range(choice.start, len(choice.input_ids))
        ]
        self.batches.append(torch.tensor(rows, device=self.parent.device))
        self.asked.append(tuple(torch.tensor(column, device=self.parent.device) for column in zip(*asked, strict=True)))

    @property
    def hidden_bytes(self) -> int:
        num_tokens = sum(ids.numel() for ids in self.batches)
        return num_tokens * self.parent.model.config.hidden_size * self.parent.model.dtype.itemsize

    @torch.no_grad()
    def prepare(self, room: float) -> float:
        """Answer as the parent does."""
        sums = sum(self.measure(index, last_hidden(self.parent, ids)[None]) for index, ids in enumerate(self.batches))
        self.accuracy = self._accuracy(sums[0].tolist())
        return room

    def measure(self, index: int, hidden_KBTD: Tensor) -> Tensor:
        """Log-likelihood of every choice, 0 for those of other batches: [K, number of choices]."""
        where_N, targets_N, whose_N = self.asked[index]
        asked_KND = hidden_KBTD.flatten(1, 2)[:, where_N]
        total = torch.zeros(len(hidden_KBTD), len(self.choices), dtype=torch.float64, device=where_N.device)
        for at in range(0, len(where_N), self.head_tokens):
            part = slice(at, at + self.head_tokens)
            for row, hidden_ND in zip(total, asked_KND, strict=True):
                logits_NV = head(self.parent, hidden_ND[part])
                log_c_N = logits_NV.gather(1, targets_N[part, None])[:, 0] - logits_NV.logsumexp(-1)
                row.index_add_(0, whose_N[part], log_c_N.double())
        return total

    def _accuracy(self, likelihoods: list[float]) -> float:
        """Share of questions answered rightly; NaN where a likelihood is not a number."""
        if not all(map(math.isfinite, likelihoods)):
            return math.nan
        answers: dict[int, tuple[float, int]] = {}
        for choice, likelihood in zip(self.choices, likelihoods, strict=True):
            rank = likelihood / choice.num_characters if self.length_normalised else likelihood
            answers[choice.question] = max(answers.get(choice.question, (-math.inf, 0)), (rank, -choice.index))
        return sum(-index == self.questions[q].answer for q, (_, index) in answers.items()) / len(self.questions)

    def values(self, likelihoods: list[float]) -> dict[str, float]:
        return {self.names[0]: self.accuracy - self._accuracy(likelihoods)}
