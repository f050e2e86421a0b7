"""Tensors to tensors: what a variant's weights start as, given the parent's.

`INITIALISE` has one function per variant kind; a new operator is one entry here and its size key in `families`.
Shape letters: D hidden, I FFN channels, H query heads, K key-value heads, E head size, X experts, N tokens.
"""
import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def watch_importance(ffn: nn.Module, names: Ffn) -> Iterator[list[Tensor]]:
    """While open, each batch that runs through the parent's `ffn` adds how much each channel [I] or expert [X] matters."""
    seen: list[Tensor] = []
    if names.router:
        router = ffn.get_submodule(names.router)
        handle = router.register_forward_hook(lambda module, args, output: seen.append(output[0].float().softmax(-1).mean(dim=0)))
    else:
        last = ffn.get_submodule(names.last)
        handle = last.register_forward_pre_hook(
            lambda module, args: seen.append(channel_contribution(args[0].flatten(0, -2), rows(module)["weight"]))
        )
    try:
        yield seen
    finally:
        handle.remove()


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


def _fewer_kv_heads(parent: nn.Module, child: nn.Module, names: Attention, variant: Variant, importance: None) -> None:
    """Mean-pool keys and values, and norms over all their heads (olmo2)."""
    for name, module in child.named_modules():
        for part, tensor in rows(module).items():
            of_parent = rows(parent.get_submodule(name))[part]
            if tensor.shape == of_parent.shape:
                continue
            fused = name == names.q
            num_queries = _query_rows(parent, names) if fused else 0
            pooled = pool_heads(of_parent[num_queries:], variant.size * (1 + fused), parent.head_dim)
            tensor.copy_(torch.cat([of_parent[:num_queries], pooled]))


def _query_rows(attention: nn.Module, names: Attention) -> int:
    return rows(attention.get_submodule(names.last))["weight"].shape[1]


def _narrower_ffn(parent: nn.Module, child: nn.Module, names: Ffn, variant: Variant, importance_I: Tensor) -> None:
    kept = top_channels(importance_I, variant.size)
    for name in dict.fromkeys(names.inner):
        index = torch.cat([kept + part * len(importance_I) for part in range(names.inner.count(name))])
        for part, tensor in rows(child.get_submodule(name)).items():
            tensor.copy_(rows(parent.get_submodule(name))[part][index])
    rows(child.get_submodule(names.last))["weight"].copy_(rows(parent.get_submodule(names.last))["weight"][:, kept])


def _fewer_experts(parent: nn.Module, child: nn.Module, names: Ffn, variant: Variant, importance_X: Tensor) -> None:
    """The experts that the router gives most weight; its rows for the others go too."""
    kept, of_parent = top_channels(importance_X, variant.size), dict(parent.named_parameters())
    for name, tensor in child.named_parameters():
        if tensor.shape != of_parent[name].shape:
            tensor.copy_(of_parent[name][kept])


def _linear(parent: nn.Module, child: nn.Linear, names: Attention | Ffn, variant: Variant, importance: object) -> None:
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
INITIALISE: dict[str, tuple[str, Callable]] = {
    "kv": ("mean-pool", _fewer_kv_heads),
    "window": ("copy", lambda *_: None),
    "w": ("channel-contribution", _narrower_ffn),
    "e": ("router-weight", _fewer_experts),
    "linear": ("product", _linear),
    "no_op": ("none", lambda *_: None),
}


@torch.no_grad()
def initialise(
    parent: nn.Module, child: nn.Module, names: Attention | Ffn, variant: Variant, importance: Tensor | None = None
) -> str:
    """Fill `child` from `parent`, both the bare module of one subblock; returns the name of the initialisation.

    `importance` of the FFN's channels [I] or experts [X] is what pruning needs.
    """
    of_parent = dict(parent.named_parameters())
    for name, tensor in child.named_parameters():
        if name in of_parent and of_parent[name].shape == tensor.shape:
            tensor.copy_(of_parent[name])
    name, fill = INITIALISE[variant.kind]
    fill(parent, child, names, variant, importance)
    return name
