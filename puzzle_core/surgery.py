"""Tensors to tensors: what a variant's weights start as, given the parent's.

`INITIALISE` has one function per variant kind; a new operator is one entry here and its size key in `families`. `CHANNELS`
and `KV_HEADS` have the ways to choose what is kept where an FFN or the key-value heads become fewer.
Shape letters: D hidden, I FFN channels, H query heads, K key-value heads, E head size, X experts, N tokens.
"""
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from puzzle_core.families import Attention, Ffn
from puzzle_core.spec import Variant


def rows(projection: nn.Module) -> dict[str, Tensor]:
    """The tensors of a projection, output channels first, to read and to write through: weight [out, in], bias [out].

    gpt2's Conv1D has its weight the other way round.
    """
    turned = isinstance(projection, Conv1D)
    return {name: tensor.T if turned and tensor.ndim == 2 else tensor for name, tensor in projection.named_parameters(recurse=False)}


def top_channels(importance_I: Tensor, num_channels: int) -> Tensor:
    """Indices of the most important channels, in the parent's order."""
    return importance_I.topk(num_channels).indices.sort().values


def merge_heads(projection: Tensor, num_heads: int, head_dim: int, kept: list[int] | None) -> Tensor:
    """Neighbouring heads of a key or value projection (weight [K*E, D] or bias [K*E]) made one, `num_heads` in all.

    Their mean, or of each group the one whose number within it is in `kept`.
    """
    heads = projection.unflatten(0, (num_heads, -1, head_dim))
    merged = heads.mean(dim=1) if kept is None else heads[torch.arange(num_heads), kept]
    return merged.flatten(0, 1)


def repeat_heads(projection: Tensor, num_repeats: int, head_dim: int) -> Tensor:
    """Each key-value head once for every query head that reads it: [K*E, ...] to [H*E, ...]."""
    return projection.unflatten(0, (-1, head_dim)).repeat_interleave(num_repeats, dim=0).flatten(0, 1)


class Mean:
    """The mean of tensors of one shape that come one by one."""

    def __init__(self):
        self.total, self.count = torch.zeros(()), 0

    def add(self, tensor: Tensor) -> None:
        self.total, self.count = tensor if self.count == 0 else self.total + tensor, self.count + 1

    def value(self) -> Tensor:
        return self.total / self.count


@contextlib.contextmanager
def watch_ffn(ffn: nn.Module, names: Ffn, channels: str) -> Iterator[Mean]:
    """While open, each batch that runs through the parent's `ffn` adds what `importance` is made of."""
    seen = Mean()
    if names.router:
        router = ffn.get_submodule(names.router)
        handle = router.register_forward_hook(lambda module, args, output: seen.add(output[0].float().softmax(-1).mean(dim=0)))
    else:
        statistic, _ = CHANNELS[channels]
        handle = ffn.get_submodule(names.last).register_forward_pre_hook(lambda module, args: seen.add(statistic(args[0].flatten(0, -2))))
    try:
        yield seen
    finally:
        handle.remove()


def importance(seen: Mean, ffn: nn.Module, names: Ffn, channels: str, seed: str) -> Tensor:
    """How much each channel [I] of the parent's `ffn` matters by the criterion `channels`; each expert [X]: the router's weight.

    `seed`: hex digits, of `random` alone.
    """
    return seen.value() if names.router else CHANNELS[channels][1](seen.value(), ffn, names, seed)


def _contribution(magnitude_I: Tensor, ffn: nn.Module, names: Ffn, seed: str) -> Tensor:
    """Mean |activation| times the norm of the channel's column in the last projection (Puzzle, appendix A)."""
    return magnitude_I * _last_weight(ffn, names).norm(dim=0)


def _iterative(products_II: Tensor, ffn: nn.Module, names: Ffn, seed: str) -> Tensor:
    last_DI = _last_weight(ffn, names)
    return removal_order(products_II * (last_DI.T @ last_DI))


def removal_order(energy_II: Tensor) -> Tensor:
    """When each channel is removed, if each time it is the one whose loss moves the output least, given those gone before: [I].

    Without the channels R the output is off by a square error of the sum over R x R of `energy_II` = X^T X * W^T W, so a
    removal adds its row to what every other would cost: I steps of I additions, exact to rounding. Making X^T X takes
    2 N I^2 FLOPs and is the greater part: 0.04 TFLOP for 1,536 channels and 8,192 tokens, 3.4 for 14,336, whose
    matrix has 0.8 GB. Nothing here waits for the GPU.
    """
    cost_I, order_I = energy_II.diagonal().clone(), torch.empty_like(energy_II[0])
    for rank in range(len(cost_I)):
        channel = cost_I.argmin(dim=0, keepdim=True)
        order_I.index_fill_(0, channel, rank)
        cost_I += 2 * energy_II.index_select(0, channel)[0]
        cost_I.index_fill_(0, channel, float("inf"))
    return order_I


def _weight_norm(seen: Tensor, ffn: nn.Module, names: Ffn, seed: str) -> Tensor:
    """The norm of all weights that a channel has, in and out."""
    squares_I = _last_weight(ffn, names).square().sum(dim=0)
    for name in dict.fromkeys(names.inner):
        weight = rows(ffn.get_submodule(name))["weight"].float()
        squares_I = squares_I + weight.unflatten(0, (names.inner.count(name), -1)).square().sum(dim=(0, 2))
    return squares_I.sqrt()


def _random(seen: Tensor, ffn: nn.Module, names: Ffn, seed: str) -> Tensor:
    weight_DI = _last_weight(ffn, names)
    return torch.rand(weight_DI.shape[1], generator=torch.Generator().manual_seed(int(seed, 16))).to(weight_DI.device)


def _last_weight(ffn: nn.Module, names: Ffn) -> Tensor:
    return rows(ffn.get_submodule(names.last))["weight"].float()


def _mean_product(inner_NI: Tensor) -> Tensor:
    inner_NI = inner_NI.float()
    return inner_NI.T @ inner_NI / len(inner_NI)


# name: (what of the activations [N, I] that enter the last projection is averaged over batches, the importance [I] by it)
CHANNELS: dict[str, tuple[Callable, Callable]] = {
    "contribution": (lambda inner_NI: inner_NI.abs().float().mean(dim=0), _contribution),
    "iterative": (_mean_product, _iterative),
    "weight_norm": (lambda inner_NI: inner_NI.new_zeros(()), _weight_norm),
    "random": (lambda inner_NI: inner_NI.new_zeros(()), _random),
}


def last_projection(module: nn.Module, names: Attention | Ffn, variant: Variant) -> nn.Module | None:
    """The projection of a variant's module back into the residual stream; None where many experts share that work."""
    if variant.kind == "linear":
        return module
    return None if names.last in dict(module.named_parameters()) else module.get_submodule(names.last)


class RidgeStatistics:
    """Sums over tokens from which a projection can be refitted to the parent's output by ridge regression."""

    def __init__(self, last: nn.Module):
        num_outputs, num_inputs = rows(last)["weight"].shape
        num_inputs += last.bias is not None
        zeros = partial(torch.zeros, dtype=torch.float64, device=last.weight.device)
        self.gram, self.cross, self.square = zeros(num_inputs, num_inputs), zeros(num_inputs, num_outputs), zeros(())

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
def refit(last: nn.Module, fitting: RidgeStatistics, held_out: RidgeStatistics, strengths: list[float]) -> float:
    """Refit `last`, its weights so far the prior, with the strength that does best on `held_out`; returns that strength."""
    weight = rows(last)["weight"]
    prior = weight.T.double()
    if last.bias is not None:
        prior = torch.cat([prior, last.bias.double()[None]])
    best = min(strengths, key=lambda strength: held_out.error(fitting.fit(prior, strength)))
    fitting.merge(held_out)
    fitted = fitting.fit(prior, best)
    weight.copy_(fitted[: weight.shape[1]].T)
    if last.bias is not None:
        last.bias.copy_(fitted[-1])
    return best


@dataclass(frozen=True)
class Basis:
    """What an initialisation goes by beside the parent's weights."""

    importance: Tensor | None = None  # of the FFN's channels [I] or experts [X]: those that have most are kept
    channels: str = "contribution"  # how that was found: one of CHANNELS
    kv_heads: str = "mean_pool"  # what becomes of heads that merge: one of KV_HEADS
    error: Callable[[nn.Module], float] | None = None  # how far an attention's output is from the parent's, for `best`


def _best_heads(parent: nn.Module, child: nn.Module, names: Attention, num_heads: int, error: Callable) -> list[int]:
    """Group after group, the head that serves all queries of its group with the least error, beside those chosen so far.

    The later groups still have their first head. As many measurements as the parent has heads.
    """
    kept = [0] * num_heads
    for group in range(num_heads):
        errors = []
        for head in range(_num_kv_heads(parent, names) // num_heads):
            kept[group] = head
            _merge_kv_heads(parent, child, names, num_heads, kept)
            errors.append(error(child))
        kept[group] = errors.index(min(errors))
    return kept


# name: which head of each group is kept; None: their mean
KV_HEADS: dict[str, Callable] = {
    "mean_pool": lambda parent, child, names, num_heads, error: None,
    "first": lambda parent, child, names, num_heads, error: [0] * num_heads,
    "best": _best_heads,
}


def _fewer_kv_heads(parent: nn.Module, child: nn.Module, names: Attention, variant: Variant, basis: Basis) -> None:
    kept = KV_HEADS[basis.kv_heads](parent, child, names, variant.size, basis.error)
    _merge_kv_heads(parent, child, names, variant.size, kept)


def _merge_kv_heads(parent: nn.Module, child: nn.Module, names: Attention, num_heads: int, kept: list[int] | None) -> None:
    """Keys and values, and norms over all their heads (olmo2)."""
    for name, module in child.named_modules():
        for part, tensor in rows(module).items():
            of_parent = rows(parent.get_submodule(name))[part]
            if tensor.shape == of_parent.shape:
                continue
            fused = name == names.q
            num_queries = _query_rows(parent, names) if fused else 0
            both = None if kept is None else kept * (1 + fused)
            merged = merge_heads(of_parent[num_queries:], num_heads * (1 + fused), parent.head_dim, both)
            tensor.copy_(torch.cat([of_parent[:num_queries], merged]))


def _query_rows(attention: nn.Module, names: Attention) -> int:
    return rows(attention.get_submodule(names.last))["weight"].shape[1]


def _num_kv_heads(attention: nn.Module, names: Attention) -> int:
    num_rows, fused = len(rows(attention.get_submodule(names.v))["weight"]), names.v == names.q
    return (num_rows - fused * _query_rows(attention, names)) // (1 + fused) // attention.head_dim


def _narrower_ffn(parent: nn.Module, child: nn.Module, names: Ffn, variant: Variant, basis: Basis) -> None:
    kept = top_channels(basis.importance, variant.size)
    for name in dict.fromkeys(names.inner):
        index = torch.cat([kept + part * len(basis.importance) for part in range(names.inner.count(name))])
        for part, tensor in rows(child.get_submodule(name)).items():
            tensor.copy_(rows(parent.get_submodule(name))[part][index])
    rows(child.get_submodule(names.last))["weight"].copy_(rows(parent.get_submodule(names.last))["weight"][:, kept])


def _fewer_experts(parent: nn.Module, child: nn.Module, names: Ffn, variant: Variant, basis: Basis) -> None:
    """The experts that the router gives most weight; its rows for the others go too."""
    kept, of_parent = top_channels(basis.importance, variant.size), dict(parent.named_parameters())
    for name, tensor in child.named_parameters():
        if tensor.shape != of_parent[name].shape:
            tensor.copy_(of_parent[name][kept])


def _linear(parent: nn.Module, child: nn.Linear, names: Attention | Ffn, variant: Variant, basis: Basis) -> None:
    """W_V · W_O (each token attends to itself), or W_up · W_down with the gate ignored, of experts the mean."""
    if isinstance(names, Ffn) and names.router:
        up_XID, down_XDI = parent.get_parameter(names.first), parent.get_parameter(names.last)
        child.weight.copy_(torch.einsum("xdi,xie->de", down_XDI, up_XID[:, -down_XDI.shape[2] :]) / len(up_XID))
        return
    first, last = rows(parent.get_submodule(names.first)), rows(parent.get_submodule(names.last))
    num_inner = last["weight"].shape[1]
    if isinstance(names, Attention):
        if names.q == names.v:  # queries, keys and values in one
            num_values = (len(first["weight"]) - num_inner) // 2
            first = {part: tensor[-num_values:] for part, tensor in first.items()}
        num_repeats = num_inner // len(first["weight"])
        first = {part: repeat_heads(tensor, num_repeats, parent.head_dim) for part, tensor in first.items()}
    first = {part: tensor[-num_inner:] for part, tensor in first.items()}  # gate and up in one: up
    child.weight.copy_(last["weight"] @ first["weight"])
    if child.bias is not None:
        child.bias.zero_()
        if "bias" in first:
            child.bias.add_(last["weight"] @ first["bias"])
        if "bias" in last:
            child.bias.add_(last["bias"])


# kind: (what the library's `init` column calls it, what fills the tensors whose shape differs from the parent's)
INITIALISE: dict[str, tuple[Callable[[Basis], str], Callable]] = {
    "kv": (lambda basis: basis.kv_heads, _fewer_kv_heads),
    "window": (lambda basis: "copy", lambda *_: None),
    "w": (lambda basis: basis.channels, _narrower_ffn),
    "e": (lambda basis: "router_weight", _fewer_experts),
    "linear": (lambda basis: "product", _linear),
    "no_op": (lambda basis: "none", lambda *_: None),
}


@torch.no_grad()
def initialise(parent: nn.Module, child: nn.Module, names: Attention | Ffn, variant: Variant, basis: Basis) -> str:
    """Fill `child` from `parent`, both the bare module of one subblock; returns the name of the initialisation."""
    of_parent = dict(parent.named_parameters())
    for name, tensor in child.named_parameters():
        if name in of_parent and of_parent[name].shape == tensor.shape:
            tensor.copy_(of_parent[name])
    name, fill = INITIALISE[variant.kind]
    fill(parent, child, names, variant, basis)
    return name(basis)
