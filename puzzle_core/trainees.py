"""One variant at work in BLD: what it is, how it starts, how it is refitted, what is written of it."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle_core import surgery
from puzzle_core.files import atomic
from puzzle_core.learners import normalised_mse
from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, BLOCK, FFN, NO_OP, PARENT, Joint, Variant
from puzzle_core.subblocks import build_subblock, load_weights, num_params
from puzzle_core.trace import Call, kv_bytes_per_token


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
    loss_after: float = 0.0
    num_tokens: int = 0
    outcome: str = "untrained"


def composed(parent: Parent, job: Job, blocks: Path) -> Trainee:
    """A joint block put together from its halves, which were trained each on its own; what is the parent's stays frozen."""
    module = build_subblock(parent, job.layer, job.subblock, job.variant)
    for half in job.halves:
        if half.subblock in module:
            load_weights(module[half.subblock], blocks / half.file_name, half.fingerprint)
    return Trainee(job, module, init="halves")


def initialised(parent: Parent, job: Job, calibration: list[dict[str, Call]], seen: surgery.Mean, channels: str, kv_heads: str) -> Trainee:
    """The variant made of the parent's weights; `channels` and `kv_heads` as in bld's settings, `seen` by `surgery.watch_ffn`."""
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
        importance=surgery.importance(seen, original, names, channels, job.fingerprint) if pruned else None,
        channels=channels,
        kv_heads=kv_heads,
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
        "kv_bytes_per_token": 0 if attention is None else kv_bytes_per_token(attention, job.layer, call),
        "path": job.file_name,
        "fingerprint": job.fingerprint,
    }
    with atomic(blocks / job.file_name) as part:
        save_file({} if job.variant == PARENT else module.state_dict(), part, metadata={"row": json.dumps(row)})
    return row
