"""Variants in training: those of one layer that read the same input are computed together, each learns from its own loss.

Shape letters: B sequences, T tokens of each, D hidden, I FFN channels.
"""
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puzzle_core.families import Ffn
from puzzle_core.parents import Parent
from puzzle_core.spec import FFN, LINEAR, NO_OP, PARENT, Joint, Variant
from puzzle_core.subblocks import build_subblock
from puzzle_core.trace import Call, first


def normalised_mse(child: Tensor, parent: Tensor, per: str = "tensor") -> Tensor:
    """MSE(child, parent) / MSE(parent, 0) of [..., D] (Puzzle, section 3).

    Over the whole tensor, or `per` token and then averaged, so that a few massive activations do not outweigh the rest.
    """
    error, size = (child.float() - parent.float()).square(), parent.float().square()
    if per == "token":
        return (error.mean(-1) / size.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()
    return error.mean() / size.mean()


def is_trained(variant: Variant | Joint, closed_form: bool) -> bool:
    """Whether gradients have anything to do: not for the parent and no_op, nor for linear where the refit is its optimum already.

    In a joint block linear has something to learn, too: to go with the other half.
    """
    if isinstance(variant, Joint):
        return any(is_trained(half, closed_form=False) for _, half in variant.halves)
    return variant not in (PARENT, NO_OP) and not (closed_form and variant == LINEAR)


class Fan(nn.ModuleList):
    """The last projections of several variants side by side: each reads its own channels of [..., sum of widths]."""

    def __init__(self, projections: list[nn.Module], widths: list[int]):
        super().__init__(projections)
        self.widths = widths

    def forward(self, inner: Tensor) -> tuple[Tensor, ...]:
        return tuple(project(part) for project, part in zip(self, inner.split(self.widths, dim=-1), strict=True))


@dataclass(frozen=True)
class _Piece:
    """Where one variant's part of a tensor lies: channels start..start + width of `dim`, in each of its equal sections."""

    name: str  # of the parameter of the module that is trained
    dim: int | None = None  # None: the whole parameter
    start: int = 0
    width: int = 0
    total: int = 0  # channels of all variants

    def of(self, tensor: Tensor) -> Tensor:
        """A view, [..., sections, width, ...] where dim had sections · total (a fused gate and up projection has two)."""
        if self.dim is None:
            return tensor
        return tensor.unflatten(self.dim, (-1, self.total)).narrow(self.dim + 1, self.start, self.width)


class Learner(nn.Module):
    """float32 copies of one or several variants of a subblock, computed by one module; calling it gives the output of each.

    FFN variants that differ in width are one FFN of all their channels, whose last projection is a `Fan`: one wide
    matrix product where there were many, of which each variant's channels are its own.
    """

    def __init__(self, module: nn.Module, pieces: list[dict[str, _Piece]]):
        super().__init__()
        self.module = module
        self.pieces = pieces  # of each variant: the names of its own module's parameters to where they are

    @classmethod
    def of_one(cls, module: nn.Module) -> "Learner":
        """A learner of one variant, whose parameters are `module`'s own."""
        return cls(module, [{name: _Piece(name) for name, _ in module.named_parameters()}])

    def forward(self, *args, **kwargs) -> tuple[Tensor, ...]:
        out = self.module(*args, **kwargs)
        return out if len(self.pieces) > 1 else (first(out),)

    def losses(self, call: Call, per: str) -> list[Tensor]:
        """The normalised MSE of each variant against what the parent's subblock said."""
        with call.autocast():
            outputs = self(*call.args, **call.kwargs)
        return [normalised_mse(out.view_as(call.output_BTD), call.output_BTD, per) for out in outputs]

    def gradients(self, index: int) -> list[Tensor]:
        """Views of the gradients that belong to variant `index`."""
        return [piece.of(self.module.get_parameter(piece.name).grad) for piece in self.pieces[index].values()]

    @torch.no_grad()
    def write(self, index: int, module: nn.Module) -> None:
        """Copy the weights of variant `index` into its own `module`, in whatever dtype that has."""
        for name, piece in self.pieces[index].items():
            own = module.get_parameter(name)
            own.copy_(piece.of(self.module.get_parameter(piece.name)).reshape(own.shape))


def alone(module: nn.Module) -> Learner:
    """A learner of one variant: `module`'s copy in float32."""
    return Learner.of_one(_float_copy(module))


def together(parent: Parent, layer: int, widths: list[int], modules: list[nn.Module]) -> Learner | None:
    """One learner of several FFN variants of `layer`; None where the family's FFN has weights that are not by channel."""
    names: Ffn = parent.family.ffn
    wide = build_subblock(parent, layer, FFN, Variant("w", sum(widths))).float()
    inner = [name for name, _ in wide.named_parameters() if not name.startswith(f"{names.last}.")]
    dims = {name: _channel_dim(wide.get_parameter(name), modules[0].get_parameter(name)) for name in inner}
    if None in dims.values():
        return None
    starts = [sum(widths[:i]) for i in range(len(widths))]
    pieces = [
        {name: _Piece(name, dims[name], start, width, sum(widths)) for name in inner} for start, width in zip(starts, widths, strict=True)
    ]
    with torch.no_grad():
        for own, module in zip(pieces, modules, strict=True):
            for name, piece in own.items():
                target = piece.of(wide.get_parameter(name))
                target.copy_(module.get_parameter(name).reshape(target.shape))
    lasts = [_float_copy(module.get_submodule(names.last)) for module in modules]
    for index, last in enumerate(lasts):
        pieces[index] |= {f"{names.last}.{name}": _Piece(f"{names.last}.{index}.{name}") for name, _ in last.named_parameters()}
    wide.set_submodule(names.last, Fan(lasts, widths))
    for name, module in list(wide.named_modules()):
        if isinstance(module, nn.Dropout):
            wide.set_submodule(name, nn.Identity())  # it would choke on the fan's tuple; nothing is dropped here anyway
    return Learner(wide.requires_grad_(True), pieces)


def _channel_dim(wide: Tensor, narrow: Tensor) -> int | None:
    return next((dim for dim, (a, b) in enumerate(zip(wide.shape, narrow.shape, strict=True)) if a != b), None)


def _float_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().requires_grad_(True)
