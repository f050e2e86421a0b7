"""What blockwise distillation will take, worked out before it starts: windows of layers, bytes, FLOPs.

Works on a parent without weights (the meta device) as well as on a loaded one.
"""
from dataclasses import dataclass

import torch
from torch import nn

from puzzle_core.learners import is_trained
from puzzle_core.parents import Parent
from puzzle_core.shards import GIB, num_bytes
from puzzle_core.spec import NO_OP, PARENT, Variant
from puzzle_core.subblocks import build_subblock
from puzzle_core.surgery import last_projection

BYTES_PER_TRAINED = 16  # float32 weight, gradient and two moments


@dataclass(frozen=True)
class Plan:
    """Which layers train together, and what that takes."""

    windows: list[range]
    holds_training: bool  # hidden states of the whole budget stay in memory: a window goes on from where the last ended
    num_steps: int  # of all windows
    peak_bytes: int  # of the fullest window
    training_flops: float
    parent_flops: float


def _matrix_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


@dataclass(frozen=True)
class _Layer:
    """Of one layer's wanted variants: parameters trained, FLOPs for each token, channels and outputs that stand in memory."""

    params: int
    shell_params: int
    flops_per_token: float
    wide: int  # values of width one held for each token: FFN channels, attention projections
    num_outputs: int
    widest: int  # inputs of the largest last projection: what the refit's statistics are squares of

    def refit_bytes(self, tokens: int, itemsize: int) -> int:
        """While one variant is refitted: its activations, in float32 too, and float64 statistics with what solving takes."""
        return self.widest * (tokens * (3 * itemsize + 4) + 6 * 8 * self.widest)


def _layer(parent: Parent, wanted: list[tuple[str, Variant]], closed_form_linear: bool) -> _Layer:
    """Forward 2 FLOPs a weight and token, gradient of the weights 2, gradient into the activations 2 for the last matrix."""
    params = shell = wide = num_outputs = widest = 0
    flops = 0.0
    hidden = parent.model.config.get_text_config().hidden_size
    for subblock, variant in wanted:
        if variant in (PARENT, NO_OP):
            continue
        module = build_subblock(parent, 0, subblock, variant)
        count = sum(p.numel() for p in module.parameters())
        shell += count
        last = last_projection(module, parent.family.subblock(subblock), variant)
        widest = max(widest, _matrix_params(last) // hidden if last else 0)
        if not is_trained(variant, closed_form_linear):
            continue
        matrices, of_last = _matrix_params(module), _matrix_params(last) if last else 0
        params += count
        flops += 4 * matrices + 2 * of_last
        wide += (matrices - of_last) // hidden + of_last // hidden
        num_outputs += 1
    return _Layer(params, shell, flops, wide, num_outputs, widest)


def plan(
    parent: Parent,
    wanted: list[tuple[int, str, Variant]],
    budgets: dict[str, int],
    seq_len: int,
    batch_size: int,
    memory_gib: float | None,
    closed_form_linear: bool = True,
) -> Plan:
    """Divide the layers of `wanted` (layer, subblock, variant) into windows that fit in `memory_gib` of the parent's device.

    `budgets` are tokens for calibration, train and val. None for memory: what the GPU has, no limit on a CPU.
    ValueError if a single layer does not fit.
    """
    itemsize, hidden = parent.model.dtype.itemsize, parent.model.config.get_text_config().hidden_size
    layers = sorted({layer for layer, _, _ in wanted})
    of_layer = {layer: _layer(parent, [(s, v) for n, s, v in wanted if n == layer], closed_form_linear) for layer in layers}
    tokens = seq_len * batch_size
    num_steps = -(-budgets["train"] // tokens)
    held = (budgets["calibration"] + 2 * budgets["val"]) * hidden * itemsize
    fixed = num_bytes(parent.model) + held
    need = {n: layer.params * BYTES_PER_TRAINED + layer.shell_params * itemsize for n, layer in of_layer.items()}
    if parent.shards is not None:  # a window holds its own layers and, while it runs those below, one more
        sizes = [num_bytes(layer) for layer in parent.layers]
        fixed -= sum(sizes) - max(sizes)
        need = {n: size + sizes[n] for n, size in need.items()}
    training = max(tokens * itemsize * 3 * (layer.wide + layer.num_outputs * hidden) for layer in of_layer.values())
    calls = (budgets["calibration"] + budgets["val"]) * hidden * itemsize * 5  # what a layer's subblocks see and say
    working = max(training, calls + max(layer.refit_bytes(tokens, itemsize) for layer in of_layer.values()))
    limit = _limit(parent.device, memory_gib)
    hiddens = budgets["train"] * hidden * itemsize
    smallest = fixed + working + max(need.values())
    holds_training = smallest + hiddens <= limit
    if holds_training:
        windows, fixed = [range(n, n + 1) for n in of_layer], fixed + hiddens
    else:
        if smallest > limit:
            raise ValueError(
                f"bld does not fit in {limit / GIB:.1f} GiB: one layer's variants need {smallest / GIB:.1f} GiB. "
                "Raise bld.memory_gib, or lower bld.batch_size or bld.calibration_tokens, or take variants out of conf/search_space/."
            )
        windows = _pack(need, limit - fixed - working, _num_held(parent))
    block = sum(p.numel() for p in parent.layers[0].parameters() if p.dim() >= 2)
    passes = max(of_layer) + 1 if holds_training else sum(window.stop for window in windows)
    return Plan(
        windows=windows,
        holds_training=holds_training,
        num_steps=num_steps * len(windows),
        peak_bytes=int(fixed + working + max(sum(need[n] for n in window if n in need) for window in windows)),
        training_flops=float(num_steps * tokens * sum(layer.flops_per_token for layer in of_layer.values())),
        parent_flops=float(2 * block * passes * num_steps * tokens),
    )


def _limit(device: torch.device, memory_gib: float | None) -> float:
    if memory_gib is not None:
        return memory_gib * GIB
    return 0.9 * torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")


def _num_held(parent: Parent) -> int:
    """Most layers of one window, where each window runs the layers below it again."""
    if parent.shards is None:
        return len(parent.layers)
    if parent.shards.max_layers < 2:
        raise ValueError(
            "parent.memory_gib has room for one layer, and the hidden states of bld.train_tokens do not fit in memory, so that "
            "layers below must run again: raise parent.memory_gib by a layer or bld.memory_gib, or lower bld.train_tokens"
        )
    return parent.shards.max_layers - 1


def _pack(need: dict[int, int], room: float, num_held: int) -> list[range]:
    """Consecutive layers to a window, as many as fit."""
    windows, start, used = [], None, 0
    for layer, size in need.items():
        if start is None or used + size > room or layer - start >= num_held:
            if start is not None:
                windows.append(range(start, layer))
            start, used = layer, 0
        used += size
    return [*windows, range(start, max(need) + 1)]
