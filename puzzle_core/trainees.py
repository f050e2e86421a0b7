"""One variant at work in BLD: what is asked of it, how it starts, how it is refitted, what is written of it."""
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle_core import surgery
from puzzle_core.errors import UserError
from puzzle_core.files import atomic
from puzzle_core.learners import normalised_mse
from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, BLOCK, FFN, NO_OP, PARENT, Joint, Variant, did_you_mean
from puzzle_core.subblocks import build_subblock, load_weights, num_params
from puzzle_core.trace import Call, KvCache, kv_cache


@dataclass(frozen=True)
class Settings:
    """How variants are trained: one preset of conf/bld/."""

    seq_len: int
    batch_size: int  # sequences a step
    calibration_tokens: int
    train_tokens: int
    val_tokens: int
    ridge: list[float] | None  # strengths of the refit's prior to choose from; None: no refit
    lr: float
    warmup_fraction: float
    weight_decay: float
    grad_clip: float  # of each variant's gradient norm
    channels: str = "contribution"  # by what a narrower FFN's channels are chosen: one of surgery.CHANNELS
    kv_heads: str = "mean_pool"  # what becomes of key-value heads that merge: one of surgery.KV_HEADS
    target: str = "subblock"  # whose output is matched: the subblock's own, or the whole block's with the other half frozen
    loss_per: str = "tensor"  # the MSE is normalised over the whole tensor, or for each token
    eval_every_steps: int | None = None  # None: only before and after
    settled: float | None = None  # a variant stops when its loss fell by less than this share since the last evaluation
    # What follows says how the work is done, not what comes of it: no part of a fingerprint.
    save_every_steps: int | None = None  # of a window in training, to go on from after a kill; None: begin the window again
    memory_gib: float | None = None  # of the device; None: what a GPU has, no limit on a CPU
    compile: bool = False  # the learners' forward and backward; pays on a GPU and long runs
    plan_only: bool = False  # print what the library will take, of a parent whose weights are not read; make nothing
    plan_tflops: float = 400.0  # what one GPU sustains, for the plan's days

    def __post_init__(self):
        if self.calibration_tokens < 1 or self.val_tokens < 1:
            raise UserError("bld.calibration_tokens and bld.val_tokens must be positive: pruning and the losses are measured on them")
        if self.ridge is not None and self.calibration_tokens <= self.seq_len * self.batch_size:
            raise UserError(
                f"bld.calibration_tokens ({self.calibration_tokens}) is one batch ({self.batch_size} x {self.seq_len}): the refit holds "
                "one out to choose its strength by. Raise it, lower bld.batch_size, or set bld.ridge to null."
            )
        if not self.plan_tflops > 0:
            raise UserError(f"bld.plan_tflops is {self.plan_tflops}; expected more than 0: what one GPU sustains")
        choices = {"target": ("subblock", "block"), "loss_per": ("tensor", "token")}
        choices |= {"channels": surgery.CHANNELS, "kv_heads": surgery.KV_HEADS}
        for key, known in choices.items():
            if (name := getattr(self, key)) not in known:
                raise UserError(f"bld.{key}: unknown '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        if self.settled is not None and self.eval_every_steps is None:
            raise UserError("bld.settled needs bld.eval_every_steps: how often to look whether a loss has settled")

    @property
    def budgets(self) -> dict[str, int]:
        """Tokens of each use."""
        return {"calibration": self.calibration_tokens, "train": self.train_tokens, "val": self.val_tokens}

    def determining(self, variant: Variant | Joint) -> dict:
        """The settings that decide what a variant's weights are; a block's halves have more, in their own fingerprints."""
        kind = variant.kind if isinstance(variant, Variant) else BLOCK
        names = [field.name for field in fields(self)]
        others = {"channels": "w", "kv_heads": "kv"}  # each decides for one kind alone
        return {name: getattr(self, name) for name in names[: names.index("save_every_steps")] if others.get(name) in (None, kind)}


@dataclass(frozen=True)
class Job:
    """One row of the library: a variant of one subblock of one layer, and the hash of all that determines its weights."""

    layer: int
    subblock: str
    variant: Variant | Joint
    fingerprint: str
    halves: tuple["Job", ...] = ()  # of a block: those whose weights it starts from

    def __str__(self) -> str:
        return f"variant {self.variant} of {self.subblock} in layer {self.layer}"

    @property
    def file_name(self) -> str:
        """Relative to blocks/. The parent's and no_op's files hold no tensors, only their row."""
        return f"{self.layer:03d}-{self.subblock}-{self.variant}.safetensors"


@dataclass
class Trainee:
    """A variant at work: its module in the parent's dtype, and what is known of it so far."""

    job: Job
    module: nn.Module
    last: nn.Module | None = None  # the projection back into the residual stream, where one is alone in that
    init: str = ""
    loss_before: float = 0.0
    loss_last: float = 0.0  # development loss at the last look whether it has settled
    loss_after: float = 0.0
    stopped_at: int | None = None  # the step after which it had settled; None: not yet
    num_tokens: int = 0
    outcome: str = "untrained"


def composed(parent: Parent, job: Job, blocks: Path) -> Trainee:
    """A joint block put together from its halves, which were trained each on its own; what is the parent's stays frozen."""
    module = build_subblock(parent, job.layer, job.subblock, job.variant)
    for half in job.halves:
        if half.subblock in module:
            load_weights(module[half.subblock], blocks / half.file_name, half.fingerprint)
    return Trainee(job, module, init="halves")


def initialised(parent: Parent, job: Job, calibration: list[dict[str, Call]], seen: surgery.Mean, settings: Settings) -> Trainee:
    """The variant made of the parent's weights, by what `surgery.watch_ffn` has `seen`."""
    names = parent.family.subblock(job.subblock)
    original = parent.module(job.layer, job.subblock)
    if job.variant == PARENT:
        return Trainee(job, original, init="parent")
    module = build_subblock(parent, job.layer, job.subblock, job.variant)
    pruned = job.subblock == FFN and job.variant.size is not None

    def error(attention: nn.Module) -> float:
        losses = [normalised_mse(calls[ATTENTION].replay(attention), calls[ATTENTION].output_BTD) for calls in calibration]
        return torch.stack(losses).mean().item()

    basis = surgery.Basis(
        importance=surgery.importance(seen, original, names, settings.channels, job.fingerprint) if pruned else None,
        channels=settings.channels,
        kv_heads=settings.kv_heads,
        error=error,
    )
    how = surgery.initialise(original, module, names, job.variant, basis)
    if job.variant == NO_OP:
        return Trainee(job, module, init=how)
    return Trainee(job, module.float(), surgery.last_projection(module, names, job.variant), init=how)


@torch.no_grad()
def refit(trainee: Trainee, calibration: list[dict[str, Call]], strengths: list[float]) -> None:
    """Ridge regression of the last projection; every fourth batch, and the last, is held out to choose the strength by."""
    inputs: list[Tensor] = []
    fitting, held_out = surgery.RidgeStatistics(trainee.last), surgery.RidgeStatistics(trainee.last)
    handle = trainee.last.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for index, calls in enumerate(calibration):
        call = calls[trainee.job.subblock]
        call.replay(trainee.module)
        (held_out if index % 4 == 3 or index == len(calibration) - 1 else fitting).add(inputs.pop(), call.output_BTD)
    handle.remove()
    trainee.init += f"+ridge{surgery.refit(trainee.last, fitting, held_out, strengths):g}"


def save(trainee: Trainee, parent: Parent, call: Call, blocks: Path) -> dict:
    """Write the variant's file, with its library row inside so that a later run can tell what it is."""
    job, module = trainee.job, trainee.module
    attention = module if job.subblock == ATTENTION else None
    if job.subblock == BLOCK:
        attention = module[ATTENTION] if ATTENTION in module else parent.module(job.layer, ATTENTION)
    held = KvCache(0, 0) if attention is None else kv_cache(attention, job.layer, call)
    row = {
        "layer": job.layer,
        "subblock": job.subblock,
        "variant": str(job.variant),
        "init": trainee.init,
        "loss_before": trainee.loss_before,
        "loss_after": trainee.loss_after,
        "num_tokens": trainee.num_tokens,
        "outcome": trainee.outcome,
        "num_params": num_params(parent, job.layer, job.subblock, module),
        "kv_bytes_per_token": held.bytes_per_token,
        "kv_window": held.window,
        "path": job.file_name,
        "fingerprint": job.fingerprint,
    }
    with atomic(blocks / job.file_name) as part:
        save_file({} if job.variant == PARENT else module.state_dict(), part, metadata={"row": json.dumps(row)})
    return row
