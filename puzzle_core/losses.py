"""How far a child is from its parent on a batch of tokens: what GKD makes small, and what it measures on development text.

The LM heads run on a few tokens at a time, and the gradient of what they say is made on the way forward, so neither model's
logits ever stand in memory whole and no head runs twice. Logits are float32, also those of a 16-bit model and under autocast.
Shape letters: B sequences, T tokens of one, N tokens, D hidden, V vocabulary.
"""
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, masking_utils

from puzzle_core.families import Family, family_for
from puzzle_core.trace import first, head_of

LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}  # of which several float32 copies are made at a time: a CPU's stay in its cache


@dataclass(frozen=True)
class Weights:
    """What each loss counts for, and the temperature that both models' logits are divided by in the KL."""

    kl: float
    cosine: float
    lm: float
    temperature: float


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return logits_NV - logits_NV.logsumexp(-1, keepdim=True)  # a CPU's own is 1e-5 off


def _compare(
    parent_NV: Tensor, child_NV: Tensor, targets_N: Tensor, counted_N: Tensor, kl: float, lm: float, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Sums over tokens of T² · KL(parent ‖ child) at temperature T and of the cross-entropy: [2], in nats; and the gradient.

    Logits are float32. The gradient [N, V] is that of kl · KL + lm · cross-entropy with respect to the child's; none where both
    count nothing.
    """
    log_p, log_c = (_log_softmax(x / temperature) for x in (parent_NV, child_NV))
    log_lm = log_c if temperature == 1 else _log_softmax(child_NV)
    p = log_p.exp()
    change = log_c.exp() - p  # its sum would be 0: it takes away what rounding adds to that of p · (log p - log c)
    kl_sum = (p * (log_p - log_c) + change).sum() * temperature**2
    lm_sum = -(log_lm.gather(1, targets_N[:, None])[:, 0] * counted_N).sum()
    if not (kl or lm):
        return torch.stack([kl_sum, lm_sum]), None
    gradient = change * (kl * temperature)
    if lm:
        is_target = torch.arange(child_NV.shape[1], device=child_NV.device) == targets_N[:, None]
        gradient = gradient + (log_lm.exp() - is_target.float()) * (lm * counted_N)[:, None]
    return torch.stack([kl_sum, lm_sum]), gradient


def _cosine_distance(child: Tensor, parent: Tensor) -> Tensor:
    """Mean over all but the last dimension of 1 - cos: half the squared distance on the unit sphere, exact where it is small."""
    unit_c, unit_p = (nn.functional.normalize(x.float(), dim=-1) for x in (child, parent))
    return (unit_c - unit_p).square().sum(-1).mean() / 2


def _cosine_gradient(child: Tensor, parent: Tensor, scale: Tensor) -> Tensor:
    """`scale` times the gradient of `_cosine_distance` with respect to `child`, in its dtype."""
    c = child.float()
    norm = c.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit_c, unit_p = c / norm, nn.functional.normalize(parent.float(), dim=-1)
    along = (unit_c * unit_p).sum(-1, keepdim=True)
    return ((along * unit_c - unit_p) * (scale * child.shape[-1] / child.numel()) / norm).to(child.dtype)


@functools.cache
def _kernel(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function, dynamic=False) if compiled else function


class _Cosine(torch.autograd.Function):
    """1 - cos that keeps nothing for the way back but the two hidden states, which are there anyway."""

    @staticmethod
    def forward(ctx, child: Tensor, parent: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(child, parent)
        ctx.compiled = compiled
        return _kernel(_cosine_distance, compiled)(child, parent)

    @staticmethod
    def backward(ctx, scale: Tensor):
        return _kernel(_cosine_gradient, ctx.compiled)(*ctx.saved_tensors, scale), None, None


class _Head(torch.autograd.Function):
    """What `measure` makes of hidden states and of the head's parameters, whose gradients it makes at the same time."""

    @staticmethod
    def forward(ctx, measure: Callable, hidden_ND: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums, gradients = measure(hidden_ND, parameters)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, scale: Tensor, _):
        return None, *(gradient.mul_(scale) for gradient in ctx.saved_tensors)  # in place: each is used once and may be large


def _following(input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The token after each, and 1 where there is one: [N] each."""
    counted_BT = torch.ones_like(input_ids_BT, dtype=torch.float32)
    counted_BT[:, -1] = 0
    return input_ids_BT.roll(-1, dims=1).flatten(), counted_BT.flatten()


@contextlib.contextmanager
def _rows_are_whole() -> Iterator[None]:
    """Rows are full and their positions count up: transformers need not ask the device, and wait, whether they are packed."""
    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def _body(model: PreTrainedModel, family: Family, input_ids_BT: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """What the head sees [B, T, D] and, if asked to `keep` them, what each layer says, layers that skip too."""
    hiddens: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: hiddens.append(first(output)))
        for layer in (model.get_submodule(family.layers) if keep else ())
    ]
    try:
        with _rows_are_whole():
            return model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state, hiddens
    finally:
        for hook in hooks:
            hook.remove()


def _where_it_trains(forward: Callable, plain: Callable, *args, **kwargs) -> object:
    """`forward` where gradients are wanted; measuring is too rare to compile for."""
    return (forward if torch.is_grad_enabled() else plain)(*args, **kwargs)


class Comparison:
    """A child beside its parent. While `installed`, calling the child gives losses, and calling the parent hidden states.

    They are called, and not their parts, so that whatever wraps a model (DDP, FSDP2) sees one forward of it.
    """

    def __init__(self, parent: PreTrainedModel, child: PreTrainedModel, weights: Weights, head_tokens: int, compiled: bool = False):
        """`head_tokens`: how many tokens' logits exist at a time. On a GPU a float32 child computes in bfloat16 (autocast)."""
        self.parent, self.child, self.weights, self.compiled = parent, child, weights, compiled
        self.head_tokens, self.family = head_tokens, family_for(parent.config)

    @contextlib.contextmanager
    def installed(self, gradient_checkpointing: bool = False) -> Iterator[None]:
        """`gradient_checkpointing`: the child's layers run a second time on the way back instead of being remembered."""
        replaced = {self.parent: self._parent_forward, self.child: self._child_forward}
        for model in (self.parent, self.child):
            for layer in model.get_submodule(self.family.layers):
                forward = layer.forward
                if self.compiled:
                    forward = torch.compile(forward, dynamic=False)
                if gradient_checkpointing and model is self.child:
                    forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
                if forward != layer.forward:
                    replaced[layer] = forward if model is self.parent else functools.partial(_where_it_trains, forward, layer.forward)
        self.child.eval()  # no dropout: the parent has none either
        self.child.train = lambda mode=True: self.child  # which Trainer asks for before every step
        for module, forward in replaced.items():
            module.forward = forward
        # One graph a kind of layer, and one more for the parent's: more than torch expects of one piece of code.
        limit = torch._dynamo.config.patch(recompile_limit=256) if self.compiled else contextlib.nullcontext()
        try:
            with limit:
                yield
        finally:
            del self.child.train
            for module in replaced:
                del module.forward

    def _autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.child.device.type, torch.bfloat16, enabled=enabled and self.child.device.type == "cuda")

    @torch.no_grad()
    def _parent_forward(self, input_ids: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
        with self._autocast(False):
            return _body(self.parent, self.family, input_ids, keep)

    def _child_forward(self, input_ids: Tensor, held_out: bool = False) -> dict[str, Tensor]:
        """Means over tokens: `loss` and the parts of it that count. Of `held_out` (development) text `kl` and `lm` at temperature 1."""
        weights = Weights(1.0, 0.0, 1.0, 1.0) if held_out else self.weights
        of_parent_BTD, parent_hiddens = self.parent(input_ids, keep=weights.cosine > 0)
        with self._autocast(True):
            of_child_BTD, child_hiddens = _body(self.child, self.family, input_ids, keep=weights.cosine > 0)
            losses, loss = {}, 0.0
            if weights.kl or weights.lm:
                measure = functools.partial(self._measure, input_ids, of_parent_BTD.flatten(0, 1), weights)
                parameters = [p for p in self.child.get_output_embeddings().parameters() if p.requires_grad]
                run = _Head.apply if torch.is_grad_enabled() else _without_gradient
                loss, means = run(measure, of_child_BTD.flatten(0, 1), *parameters)
                losses = {name: mean for name, mean in zip(("kl", "lm"), means, strict=True) if getattr(weights, name)}
        if weights.cosine:
            pairs = zip(child_hiddens, parent_hiddens, strict=True)
            cosine = torch.stack([_Cosine.apply(c, p, self.compiled) for c, p in pairs]).mean()
            loss = loss + weights.cosine * cosine
            losses["cosine"] = cosine.detach()
        return {"loss": loss, **losses}

    def _measure(
        self, input_ids_BT: Tensor, parent_ND: Tensor, weights: Weights, child_ND: Tensor, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The weighted loss, the means of KL and cross-entropy [2], and the loss's gradients in hidden states and `parameters`.

        Where there are no `parameters` to train, there are no gradients either.
        """
        num_sequences, seq_len = input_ids_BT.shape
        num_tokens, num_predicted = num_sequences * seq_len, num_sequences * (seq_len - 1)
        scales = (weights.kl / num_tokens, weights.lm / num_predicted) if parameters else (0.0, 0.0)
        hidden_gradient_ND = torch.empty_like(child_ND) if parameters else None
        gradients = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        size, sums = -(-num_tokens // -(-num_tokens // self.head_tokens)), 0.0
        parts = zip(*(x.split(size) for x in (parent_ND, child_ND, *_following(input_ids_BT))), range(0, num_tokens, size), strict=True)
        for of_parent_ND, of_child_ND, targets_N, counted_N, start in parts:
            with torch.no_grad(), self._autocast(False):
                parent_NV = head_of(self.parent, self.family, of_parent_ND)
            with torch.set_grad_enabled(bool(parameters)):
                leaf_ND = of_child_ND.detach().requires_grad_(bool(parameters))
                child_NV = head_of(self.child, self.family, leaf_ND)
            some, gradient_NV = self._in_pieces(parent_NV, child_NV.detach(), targets_N, counted_N, *scales, weights.temperature)
            sums = sums + some
            if parameters:
                with self._autocast(False):
                    of_hidden, *of_parameters = torch.autograd.grad(child_NV, (leaf_ND, *parameters), gradient_NV)
                hidden_gradient_ND[start : start + size] = of_hidden
                for total, part in zip(gradients, of_parameters, strict=True):
                    total += part
        means = torch.stack([sums[0] / num_tokens, sums[1] / num_predicted])
        loss = weights.kl * means[0] + weights.lm * means[1]
        return loss, means, [hidden_gradient_ND, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))]

    def _in_pieces(
        self, parent_NV: Tensor, child_NV: Tensor, targets_N: Tensor, counted_N: Tensor, *scales: float
    ) -> tuple[Tensor, Tensor | None]:
        """`_compare`, as many rows at a time as there is room for in float32; all where it is one compiled kernel."""
        compare = _kernel(_compare, self.compiled)
        if self.compiled:
            return compare(parent_NV, child_NV, targets_N, counted_N, *scales)
        rows = max(1, LOGITS_AT_ONCE[child_NV.device.type] // child_NV.shape[1])
        gradient_NV, sums = torch.empty_like(child_NV) if any(scales[:2]) else None, 0.0
        for start in range(0, len(child_NV), rows):
            at = slice(start, start + rows)
            some, gradient = compare(parent_NV[at], child_NV[at], targets_N[at], counted_N[at], *scales)
            sums = sums + some
            if gradient is not None:
                gradient_NV[at] = gradient
        return sums, gradient_NV


def _without_gradient(measure: Callable, hidden_ND: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return measure(hidden_ND, ())[:2]
