"""What blockwise distillation will take, worked out before it starts: windows of layers, bytes, FLOPs.

Works on a parent without weights (the meta device) as well as on a loaded one.
"""
import functools
import math
from dataclasses import dataclass

import torch

from puzzle_core.errors import UserError
from puzzle_core.learners import is_trained
from puzzle_core.parents import Parent
from puzzle_core.shards import GIB, num_bytes
from puzzle_core.spec import ATTENTION, BLOCK, FFN, NO_OP, PARENT, Joint, Variant
from puzzle_core.subblocks import build_subblock
from puzzle_core.trainees import Settings

Wanted = tuple[int, str, Variant | Joint]  # layer, subblock, variant

BYTES_PER_TRAINED = 16  # float32 weight, gradient and two moments
MOVED_PER_TRAINED = 32  # of those, in a step: each read and written once
CUBLAS_BYTES = 2 * 32 * 2**20  # workspaces that cuBLAS keeps on a GPU, one for each of the two streams that BLD uses


@dataclass(frozen=True)
class Plan:
    """Which layers train together, and what that takes."""

    windows: list[range]
    layer_passes: int  # how many of the parent's layers each training token goes through, those that windows run again too
    holds_training: bool  # hidden states of the whole budget stay in memory: a window goes on from where the last ended
    num_steps: int  # of all windows
    peak_bytes: int  # of the fullest window
    training_flops: float
    parent_flops: float
    moved_bytes: float  # at least, to and from memory: optimizer state, the parent's weights, what backward keeps, once a step each


@dataclass(frozen=True)
class _Costs:
    """Of one variant, or of the parent's own subblock."""

    params: int
    forward_flops: float  # of a token
    training_flops: float  # of a token: forward, gradients of the weights, gradient into what enters the last projection
    inner: int  # values of a token between input and last projection: outputs of the first matrices
    last_inputs: int  # of the last projection; 0 where the refit has none to refit


def _costs(parent: Parent, subblock: str, variant: Variant, seq_len: int) -> _Costs:
    """2 FLOPs a weight and token forward, 2 for the weight's gradient, 2 more for the gradient into the last matrix.

    Of experts, those that a token is sent to. Causal attention's two products count forward once and backward twice:
    4 FLOPs for each query channel and token that is attended to.
    """
    config, names = parent.model.config.get_text_config(), parent.family.subblock(subblock)
    module = build_subblock(parent, 0, subblock, variant)
    matrices = {name: p for name, p in module.named_parameters() if p.dim() >= 2}
    used = {name: p.numel() * (config.num_experts_per_tok / len(p) if p.dim() == 3 else 1) for name, p in matrices.items()}
    last = sum(size for name, size in used.items() if name.startswith(names.last))
    last_inputs = int(last) // config.hidden_size
    attended = 0.0
    if subblock == ATTENTION and last:
        window = min(variant.size, seq_len) if variant.kind == "window" else seq_len
        attended = 4 * last_inputs * window * (1 - window / (2 * seq_len))
    forward = 2 * sum(used.values()) + attended
    return _Costs(
        params=sum(p.numel() for p in module.parameters()),
        forward_flops=forward,
        training_flops=2 * forward + 2 * last + attended,
        inner=int(sum(used.values()) - last) // config.hidden_size,
        last_inputs=config.hidden_size if variant.kind == "linear" else last_inputs * (variant.kind != "e"),
    )


@dataclass(frozen=True)
class _Layer:
    """Of one layer's wanted variants: parameters, FLOPs of a token, bytes that come and go while they are at work."""

    params: int  # in training
    shell_params: int  # of all, in the parent's dtype when they do not train
    flops: float
    kept: int  # values of a token that forward leaves for backward
    step_bytes: int  # of the learner that takes most: activations and their gradients
    closed_form_bytes: int  # while channels are chosen, or of the variant whose refit takes most


@dataclass(frozen=True)
class _Shape:
    """What a step works on: tokens of a batch, hidden size, bytes of a value, how it is computed."""

    tokens: int
    hidden: int
    itemsize: int
    compiled: bool
    block_target: bool

    def step_bytes(self, inner: int, last_inputs: int, num_outputs: int, subblock: str) -> int:
        """While one learner's gradient is made: `inner` activations, what backward keeps of them, and their gradients.

        An FFN keeps inner values and their products, or makes gradients of them, three times in all at the fullest moment;
        compiled, once, beside its products and their gradients, in whose place those of the inner values come. Losses are
        float32: an error for each output, unless a compiled kernel makes it again.
        """
        if subblock == ATTENTION:  # before and after the rotary embedding, and the gradients of both
            return self.tokens * self.itemsize * (4 * inner + 2 * last_inputs + 3 * self.hidden)
        outputs = num_outputs * self.hidden
        if self.compiled:
            return self.tokens * self.itemsize * (inner + 2 * last_inputs + 2 * outputs)
        losses = outputs * (self.itemsize + 4) + 2 * 4 * self.hidden
        return self.tokens * max(3 * inner * self.itemsize, 2 * inner * self.itemsize + losses)

    def refit_bytes(self, last_inputs: int) -> int:
        """One batch's activations, in float32 too, beside the float64 statistics; or the statistics and what solving takes."""
        square, cross = 8 * last_inputs**2, 8 * last_inputs * self.hidden
        batch = self.tokens * max(4 * last_inputs * self.itemsize, last_inputs * (self.itemsize + 4) + 4 * self.hidden)
        return max(batch + 2 * square + 2 * cross + square // 2, 5 * square + 7 * cross)

    def pruning_bytes(self, channels: str, num_channels: int) -> int:
        """Products of all pairs of channels: their sum, and twice as much beside it at the fullest moment."""
        return 3 * 4 * num_channels**2 * (channels == "iterative")


def _layer(parent: Parent, costs_of, wanted: list[tuple[str, Variant | Joint]], shape: _Shape, settings: Settings) -> _Layer:
    ridge = settings.ridge is not None
    made = [(s, v, costs_of(s, v)) for s, v in wanted if s != BLOCK and v not in (PARENT, NO_OP)]
    refits = [shape.refit_bytes(c.last_inputs) for _, _, c in made if c.last_inputs] if ridge else []
    trained = [(s, v, c) for s, v, c in made if is_trained(v, ridge)]
    together = [c for _, v, c in trained if v.kind == "w" and not shape.block_target]
    learners = [(FFN, together)] if together else []
    learners += [(s, [c]) for s, v, c in trained if v.kind != "w" or shape.block_target]
    own, steps = {s: costs_of(s, PARENT) for s in (ATTENTION, FFN)}, []
    for subblock, some in learners:
        steps.append(shape.step_bytes(sum(c.inner for c in some), sum(c.last_inputs for c in some), len(some), subblock))
        if shape.block_target and subblock == ATTENTION:  # the gradient comes down through the parent's FFN
            steps[-1] += shape.step_bytes(own[FFN].inner, own[FFN].last_inputs, 1, FFN)
    flops = sum(c.training_flops for _, _, c in trained)
    if shape.block_target:
        flops += sum(2 * own[FFN].forward_flops if s == ATTENTION else own[ATTENTION].forward_flops for s, _, _ in trained)
    for joint in [v for s, v in wanted if s == BLOCK and is_trained(v, ridge)]:
        halves = [(s, v, costs_of(s, v)) for s, v in joint.halves]
        steps.append(sum(shape.step_bytes(c.inner, c.last_inputs, 1, s) for s, _, c in halves))
        own_halves = [(s, v, c) for s, v, c in halves if v not in (PARENT, NO_OP)]
        made, trained = made + own_halves, trained + own_halves
        flops += sum(c.training_flops if v not in (PARENT, NO_OP) else c.forward_flops for _, v, c in halves)
        flops += halves[1][2].forward_flops * (joint.attention not in (PARENT, NO_OP))  # the gradient comes down through the FFN
    pruning = shape.pruning_bytes(settings.channels, own[FFN].last_inputs)
    return _Layer(
        params=sum(c.params for _, _, c in trained),
        shell_params=sum(c.params for _, _, c in made),
        flops=flops,
        kept=sum(c.inner for _, _, c in trained),
        step_bytes=max(steps, default=0),
        closed_form_bytes=max(pruning, pruning // 3 + max(refits, default=0)),
    )


def plan(parent: Parent, wanted: list[Wanted], settings: Settings) -> Plan:
    """Divide the layers of `wanted` into windows that fit in the memory of the parent's device; ValueError if a single layer does not.

    For one process and one of bld's `rounds`: joint blocks train after their halves.
    """
    itemsize, hidden = parent.model.dtype.itemsize, parent.model.config.get_text_config().hidden_size
    costs_of = functools.cache(lambda subblock, variant: _costs(parent, subblock, variant, settings.seq_len))
    shape = _Shape(settings.seq_len * settings.batch_size, hidden, itemsize, settings.compile, settings.target == "block")
    layers = sorted({layer for layer, _, _ in wanted})
    of_layer = {n: _layer(parent, costs_of, [(s, v) for m, s, v in wanted if m == n], shape, settings) for n in layers}
    a_batch = shape.tokens * hidden * itemsize  # its hidden states
    num_batches = {use: -(-tokens // shape.tokens) for use, tokens in settings.budgets.items()}
    fixed = num_bytes(parent.model) + (num_batches["calibration"] + 2 * num_batches["val"]) * a_batch
    fixed += CUBLAS_BYTES if parent.device.type != "cpu" else 0  # a parent without weights is planned as for a GPU
    calls = 5 * (num_batches["calibration"] + num_batches["val"]) * a_batch  # what a layer's subblocks see and say
    held = {n: layer.shell_params * itemsize + 2 * a_batch for n, layer in of_layer.items()}  # and a call to measure its cache
    if parent.shards is not None:  # a window holds its own layers and, while it runs those below, one more
        sizes = [num_bytes(layer) for layer in parent.layers]
        fixed -= sum(sizes) - max(sizes)
        held = {n: size + sizes[n] for n, size in held.items()}

    def peak(window: list[int]) -> int:
        """While the last layer is initialised, the others' variants are there; or while all train, one layer at a time."""
        some = [of_layer[n] for n in window]
        initialising = max(4 * layer.shell_params + layer.closed_form_bytes for layer in some) + calls
        casts = max(layer.params for layer in some) * itemsize * (itemsize < 4)
        training = sum(layer.params for layer in some) * BYTES_PER_TRAINED + casts + max(layer.step_bytes for layer in some) + 9 * a_batch
        return fixed + sum(held[n] for n in window) + max(initialising, training if num_batches["train"] else 0)

    limit, hiddens = memory_limit(parent.device, settings.memory_gib), num_batches["train"] * a_batch
    smallest = max(peak([n]) for n in layers)
    holds_training = smallest + hiddens <= limit
    if smallest > limit:
        raise UserError(
            f"bld does not fit in {limit / GIB:.1f} GiB: one layer's variants need {smallest / GIB:.1f} GiB. "
            "Raise bld.memory_gib, or lower bld.batch_size or bld.calibration_tokens, or take variants out of conf/search_space/."
        )
    windows = [[n] for n in layers] if holds_training else _pack(layers, lambda some: peak(some) <= limit, _num_held(parent))
    passes = max(layers) + 1 if holds_training else sum(window[-1] + 1 for window in windows)  # layers run over the training tokens
    tokens, num_steps = num_batches["train"] * shape.tokens, num_batches["train"]
    moved = sum(layer.params * MOVED_PER_TRAINED + 2 * layer.kept * shape.tokens * itemsize for layer in of_layer.values())
    moved += passes * sum(costs_of(s, PARENT).params for s in (ATTENTION, FFN)) * itemsize
    return Plan(
        windows=[range(window[0], window[-1] + 1) for window in windows],
        layer_passes=passes,
        holds_training=holds_training,
        num_steps=num_steps * len(windows),
        peak_bytes=max(map(peak, windows)) + hiddens * holds_training,
        training_flops=float(tokens * sum(layer.flops for layer in of_layer.values())),
        parent_flops=float(tokens * passes * sum(costs_of(s, PARENT).forward_flops for s in (ATTENTION, FFN))),
        moved_bytes=float(num_steps * moved),
    )


def work(parent: Parent, wanted: list[Wanted], settings: Settings) -> tuple[list[float], list[float]]:
    """FLOPs that each of `wanted` takes, and that the parent takes up to its layer: what processes divide.

    A refit is float32 and float64 work, and counts as often as it is slower on a GPU.
    """
    costs_of = functools.cache(lambda subblock, variant: _costs(parent, subblock, variant, settings.seq_len))
    shape = _Shape(1, parent.model.config.get_text_config().hidden_size, 4, False, settings.target == "block")
    seen, num_strengths = settings.calibration_tokens + settings.val_tokens, len(settings.ridge or [])
    slower = 15 if parent.model.dtype.itemsize < 4 else 1

    @functools.cache
    def of(subblock: str, variant: Variant | Joint) -> float:
        if variant in (PARENT, NO_OP):
            return 0.0
        training = settings.train_tokens * _layer(parent, costs_of, [(subblock, variant)], shape, settings).flops
        if isinstance(variant, Joint):
            return training + settings.val_tokens * sum(costs_of(*half).forward_flops for half in variant.halves)
        costs, n = costs_of(subblock, variant), costs_of(subblock, variant).last_inputs
        refit = 2 * n * (n + shape.hidden) * seen + (num_strengths + 1) * n * n * (n + 2 * shape.hidden) if num_strengths else 0
        return training + seen * costs.forward_flops + slower * refit

    below = sum(costs_of(s, PARENT).forward_flops for s in (ATTENTION, FFN)) * (settings.train_tokens + seen)
    return [of(s, v) for _, s, v in wanted], [below * (layer + 1) for layer, _, _ in wanted]


def memory_limit(device: torch.device, memory_gib: float | None) -> float:
    """Bytes that BLD may take of `device`: of a parent without weights, those of the GPU that is here, if any."""
    if memory_gib is not None:
        return memory_gib * GIB
    if device.type == "cpu" or not torch.cuda.is_available():
        return math.inf
    return 0.9 * torch.cuda.mem_get_info(device if device.type == "cuda" else None)[1]


def _num_held(parent: Parent) -> int:
    """Most layers of one window, where each window runs the layers below it again."""
    if parent.shards is None:
        return len(parent.layers)
    if parent.shards.max_layers < 2:
        raise UserError(
            "parent.memory_gib has room for one layer, and the hidden states of bld.train_tokens do not fit in memory, so that "
            "layers below must run again: raise parent.memory_gib by a layer or bld.memory_gib, or lower bld.train_tokens"
        )
    return parent.shards.max_layers - 1


def _pack(layers: list[int], fits, num_held: int) -> list[list[int]]:
    """Consecutive layers to a window, as many as fit."""
    windows: list[list[int]] = []
    for layer in layers:
        if windows and layer - windows[-1][0] < num_held and fits([*windows[-1], layer]):
            windows[-1].append(layer)
        else:
            windows.append([layer])
    return windows
