"""Tensors to tensors: what a variant's weights start as, given the parent's.

`INITIALISE` has one function per variant kind; a new operator is one entry here and its size key in `families`.
Shape letters: D hidden, I FFN channels, H query heads, K key-value heads, E head size, N tokens.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from puzzle_core.families import Attention, Ffn
from puzzle_core.spec import Variant


def channel_contribution(inner_NI: Tensor, last_DI: Tensor) -> Tensor:
    """Mean |activation| times the norm of the channel's column in the last projection (Puzzle, appendix A): [I]."""
    return inner_NI.abs().float().mean(dim=0) * last_DI.float().norm(dim=0)


def top_channels(importance_I: Tensor, num_channels: int) -> Tensor:
    """Indices of the most important channels, in the parent's order."""
    return importance_I.topk(num_channels).indices.sort().values


def pool_heads(projection: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Mean of neighbouring heads of a key or value projection (weight [K*E, D] or bias [K*E]) down to `num_heads`."""
    heads = projection.unflatten(0, (num_heads, -1, head_dim))
    return heads.mean(dim=1).flatten(0, 1)


def repeat_heads(projection: Tensor, num_repeats: int, head_dim: int) -> Tensor:
    """Each key-value head once for every query head that reads it: [K*E, ...] to [H*E, ...]."""
    return projection.unflatten(0, (-1, head_dim)).repeat_interleave(num_repeats, dim=0).flatten(0, 1)


class RidgeStatistics:
    """Sums over tokens from which a projection can be refitted to the parent's output by ridge regression."""

    def __init__(self, last: nn.Linear):
        num_inputs = last.in_features + (last.bias is not None)
        zeros = partial(torch.zeros, dtype=torch.float64, device=last.weight.device)
        self.gram, self.cross, self.square = zeros(num_inputs, num_inputs), zeros(num_inputs, last.out_features), zeros(())

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in one batch: `inputs` [..., in] of the projection, the parent's `targets` [..., D]."""
        inputs_NI, targets_ND = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        if self.gram.shape[0] > inputs_NI.shape[1]:
            inputs_NI = torch.cat([inputs_NI, inputs_NI.new_ones(len(inputs_NI), 1)], dim=1)
        self.gram += inputs_NI.T @ inputs_NI
        self.cross += inputs_NI.T @ targets_ND
        self.square += targets_ND.square().sum()

    def merge(self, other: "RidgeStatistics") -> None:
        self.gram, self.cross, self.square = self.gram + other.gram, self.cross + other.cross, self.square + other.square

    def fit(self, prior: Tensor, strength: float) -> Tensor:
        """argmin over W of ‖X W − Y‖² + λ‖W − prior‖², λ = strength · mean diagonal of XᵀX: [in (+ 1), D].

        A prior instead of 0 keeps what the parent knew where the calibration tokens say little.
        """
        ridge = strength * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64, device=prior.device)
        return prior + torch.linalg.solve(self.gram + ridge, self.cross - self.gram @ prior)

    def error(self, weight: Tensor) -> float:
        """‖X W − Y‖² / ‖Y‖²."""
        return (((weight * (self.gram @ weight - 2 * self.cross)).sum() + self.square) / self.square).item()


@torch.no_grad()
def refit(last: nn.Linear, fitting: RidgeStatistics, held_out: RidgeStatistics, strengths: list[float]) -> float:
    """Refit `last`, its weights so far the prior, with the strength that does best on `held_out`; returns that strength."""
    prior = last.weight.T.double()
    if last.bias is not None:
        prior = torch.cat([prior, last.bias.double()[None]])
    best = min(strengths, key=lambda strength: held_out.error(fitting.fit(prior, strength)))
    fitting.merge(held_out)
    fitted = fitting.fit(prior, best)
    last.weight.copy_(fitted[: last.in_features].T)
    if last.bias is not None:
        last.bias.copy_(fitted[-1])
    return best


def _fewer_kv_heads(parent: nn.Module, child: nn.Module, names: Attention, variant: Variant, importance: None) -> None:
    for name in (names.k, names.v):
        for part, tensor in getattr(parent, name).named_parameters():
            child.get_parameter(f"{name}.{part}").copy_(pool_heads(tensor, variant.size, parent.head_dim))


def _narrower_ffn(parent: nn.Module, child: nn.Module, names: Ffn, variant: Variant, importance_I: Tensor) -> None:
    kept = top_channels(importance_I, variant.size)
    for name in names.inner:
        for part, tensor in getattr(parent, name).named_parameters():
            child.get_parameter(f"{name}.{part}").copy_(tensor[kept])
    getattr(child, names.last).weight.copy_(getattr(parent, names.last).weight[:, kept])


def _linear(parent: nn.Module, child: nn.Linear, names: Attention | Ffn, variant: Variant, importance: object) -> None:
    """W_V · W_O (each token attends to itself), or W_up · W_down with the gate ignored."""
    first, last = getattr(parent, names.first), getattr(parent, names.last)
    weight, bias = first.weight, first.bias
    if isinstance(names, Attention):
        weight = repeat_heads(weight, parent.num_key_value_groups, parent.head_dim)
        bias = None if bias is None else repeat_heads(bias, parent.num_key_value_groups, parent.head_dim)
    child.weight.copy_(last.weight @ weight)
    if child.bias is not None:
        child.bias.zero_()
        for part in (last.bias, None if bias is None else last.weight @ bias):
            if part is not None:
                child.bias.add_(part)


# kind: (what the library's `init` column calls it, what fills the tensors whose shape differs from the parent's)
INITIALISE: dict[str, tuple[str, Callable]] = {
    "kv": ("mean-pool", _fewer_kv_heads),
    "w": ("channel-contribution", _narrower_ffn),
    "linear": ("product", _linear),
    "no_op": ("none", lambda *_: None),
}


@torch.no_grad()
def initialise(
    parent: nn.Module, child: nn.Module, names: Attention | Ffn, variant: Variant, importance_I: Tensor | None = None
) -> str:
    """Fill `child` from `parent`, both the bare module of one subblock; returns the name of the initialisation.

    `importance_I` is what channel pruning needs.
    """
    of_parent = dict(parent.named_parameters())
    for name, tensor in child.named_parameters():
        if name in of_parent and of_parent[name].shape == tensor.shape:
            tensor.copy_(of_parent[name])
    name, fill = INITIALISE[variant.kind]
    fill(parent, child, names, variant, importance_I)
    return name
