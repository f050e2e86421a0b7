"""Blockwise local distillation: every variant of every layer, each trained on its own to do what the parent's subblock does.

The parent runs once, layer by layer: the hidden states of all batches enter layer i, its subblocks' inputs and outputs
are what layer i's variants learn from, and its outputs move on to layer i+1. A killed run redoes at most one layer.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from puzzle_core import surgery
from puzzle_core.corpus import Corpus
from puzzle_core.files import atomic, fingerprint
from puzzle_core.parents import Parent
from puzzle_core.spec import ATTENTION, FFN, LINEAR, NO_OP, PARENT, Variant
from puzzle_core.subblocks import build_subblock, num_params, variant_row
from puzzle_core.trace import Call, ParentRun, kv_bytes_per_token

VERSION = 1  # raise when a change here, or in a module below, changes what a variant's weights are


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
    grad_clip: float

    def __post_init__(self):
        if self.calibration_tokens < 1 or self.val_tokens < 1:
            raise ValueError("bld.calibration_tokens and bld.val_tokens must be positive: pruning and the losses are measured on them")


@dataclass(frozen=True)
class Job:
    """One row of the library: a variant of one subblock of one layer, and the hash of all that determines its weights."""

    layer: int
    subblock: str
    variant: Variant
    fingerprint: str

    @property
    def file_name(self) -> str:
        """Relative to blocks/. The parent's and no_op's files hold no tensors, only their row."""
        return f"{self.layer:03d}-{self.subblock}-{self.variant}.safetensors"


@dataclass
class Trainee:
    """A variant at work: its module, and what is known of it so far."""

    job: Job
    module: nn.Module
    last: nn.Linear | None = None  # the projection back into the residual stream
    init: str = ""
    loss_before: float = 0.0
    loss_after: float = 0.0
    num_tokens: int = 0

    def loss(self, calls: dict[str, Call]) -> Tensor:
        call = calls[self.job.subblock]
        return normalised_mse(call.replay(self.module), call.output_BTD)


def normalised_mse(child: Tensor, parent: Tensor) -> Tensor:
    """MSE(child, parent) / MSE(parent, 0), over the whole tensor (Puzzle, section 3)."""
    return (child.float() - parent.float()).square().mean() / parent.float().square().mean()


def lr_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor in 0..1 of the peak learning rate: linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def jobs(parent: Parent, space: dict[str, list[Variant]], settings: Settings, seed: int, corpus: Corpus) -> list[Job]:
    """Every row of the library, layer by layer. A row's fingerprint does not depend on which other rows there are."""
    shared = (VERSION, seed, asdict(settings), parent.identity, corpus.fingerprint)
    return [
        Job(layer, subblock, variant, fingerprint(*shared, layer, subblock, str(variant)))
        for layer in range(len(parent.layers))
        for subblock, variants in space.items()
        for variant in variants
    ]


def train_library(
    parent: Parent, wanted: list[Job], corpus: Corpus, settings: Settings, seed: int, blocks: Path
) -> tuple[pd.DataFrame, int]:
    """Make every wanted variant's file, keep those that are whole and still match, remove what is not wanted.

    Returns the library table and the number of variants made. Raises FloatingPointError where a loss stops being finite.
    """
    blocks.mkdir(parents=True, exist_ok=True)
    rows = {job: row for job in wanted if (row := _finished(job, blocks)) is not None}
    missing = [job for job in wanted if job not in rows]
    if missing:
        shape = {"seq_len": settings.seq_len, "batch_size": settings.batch_size}
        run = ParentRun(
            parent,
            {
                "calibration": corpus.batches("train", settings.calibration_tokens, seed=f"bld-calibration-{seed}", **shape),
                "train": corpus.batches("train", settings.train_tokens, seed=f"bld-{seed}", **shape),
                "val": corpus.batches("validation", settings.val_tokens, seed=f"bld-val-{seed}", **shape),
            },
        )
        last_layer = max(job.layer for job in missing)
        for layer in tqdm(range(last_layer + 1), desc=f"bld: {len(missing)} variants", unit="layer"):
            here = [job for job in missing if job.layer == layer]
            if not here:
                run.skip(layer)
                continue
            with parent.present(layer):
                rows |= _train_layer(run, layer, here, settings, blocks)
    for stray in {p.name for p in blocks.iterdir()} - {job.file_name for job in wanted}:
        (blocks / stray).unlink()
    return pd.DataFrame([rows[job] for job in wanted]), len(missing)


def _finished(job: Job, blocks: Path) -> dict | None:
    """The row of a variant whose file is whole and was made exactly as `job` would be; else None."""
    row = variant_row(blocks / job.file_name)
    return row if row.get("fingerprint") == job.fingerprint else None


def _train_layer(run: ParentRun, layer: int, here: list[Job], settings: Settings, blocks: Path) -> dict[Job, dict]:
    """Initialise, refit, train and save the variants of one layer, moving the parent's run past it; their rows."""
    parent, family = run.parent, run.parent.family
    inner_last = getattr(parent.module(layer, FFN), family.ffn.last)
    contributions: list[Tensor] = []
    handle = inner_last.register_forward_pre_hook(
        lambda module, args: contributions.append(surgery.channel_contribution(args[0].flatten(0, -2), module.weight))
    )
    calibration = list(run.advance(layer, "calibration"))
    handle.remove()
    importance_I = torch.stack(contributions).mean(dim=0)
    validation = list(run.advance(layer, "val"))

    trainees = [_initialise(parent, job, importance_I) for job in here]
    refitted = [t for t in trainees if t.last is not None] if settings.ridge is not None else []
    for trainee in refitted:
        _refit(trainee, calibration, settings.ridge)
    for trainee in trainees:
        trainee.loss_before = trainee.loss_after = _mean_loss(trainee, validation)
    # A refitted linear variant is at its optimum already; the parent and no_op have nothing to train.
    learners = [t for t in trainees if t.last is not None and not (t in refitted and t.job.variant == LINEAR)]
    _train(learners, run, layer, settings)
    for trainee in learners:
        if trainee.num_tokens:
            trainee.loss_after = _mean_loss(trainee, validation)
    return {trainee.job: _save(trainee, parent, validation[0], blocks) for trainee in trainees}


def _save(trainee: Trainee, parent: Parent, calls: dict[str, Call], blocks: Path) -> dict:
    """Write the variant's file, with its library row inside so that a later run can tell what it is."""
    job, attention, module = trainee.job, trainee.job.subblock == ATTENTION, trainee.module.to(parent.model.dtype)
    row = {
        "layer": job.layer,
        "subblock": job.subblock,
        "variant": str(job.variant),
        "init": trainee.init,
        "loss_before": trainee.loss_before,
        "loss_after": trainee.loss_after,
        "num_tokens": trainee.num_tokens,
        "num_params": num_params(parent, job.layer, job.subblock, module),
        "kv_bytes_per_token": kv_bytes_per_token(module, job.layer, calls[ATTENTION]) if attention else 0,
        "path": job.file_name,
        "fingerprint": job.fingerprint,
    }
    with atomic(blocks / job.file_name) as part:
        save_file({} if job.variant == PARENT else module.state_dict(), part, metadata={"row": json.dumps(row)})
    return row


def _initialise(parent: Parent, job: Job, importance_I: Tensor) -> Trainee:
    names = parent.family.subblock(job.subblock)
    original = parent.module(job.layer, job.subblock)
    if job.variant == PARENT:
        return Trainee(job, original, init="parent")
    module = build_subblock(parent, job.layer, job.subblock, job.variant)
    how = surgery.initialise(original, module, names, job.variant, importance_I)
    if job.variant == NO_OP:
        return Trainee(job, module, init=how)
    return Trainee(job, module.float(), module if job.variant == LINEAR else getattr(module, names.last), init=how)


@torch.no_grad()
def _refit(trainee: Trainee, calibration: list[dict[str, Call]], strengths: list[float]) -> None:
    """Ridge regression of the last projection; every fourth batch is held out to choose the strength by."""
    inputs: list[Tensor] = []
    fitting, held_out = surgery.RidgeStatistics(trainee.last), surgery.RidgeStatistics(trainee.last)
    handle = trainee.last.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for index, calls in enumerate(calibration):
        call = calls[trainee.job.subblock]
        call.replay(trainee.module)
        (held_out if index % 4 == 3 else fitting).add(inputs.pop(), call.output_BTD)
    handle.remove()
    trainee.init += f"+ridge{surgery.refit(trainee.last, fitting, held_out, strengths):g}"


@torch.no_grad()
def _mean_loss(trainee: Trainee, batches: list[dict[str, Call]]) -> float:
    loss = torch.stack([trainee.loss(calls) for calls in batches]).mean().item()
    _check_finite(loss, trainee.job, "on validation tokens")
    return loss


def _train(learners: list[Trainee], run: ParentRun, layer: int, settings: Settings) -> None:
    """One optimizer a variant, so that a variant's weights do not depend on which others are trained beside it."""
    num_steps = len(run.hidden["train"])
    optimizers = [
        torch.optim.AdamW(t.module.requires_grad_(True).parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        for t in learners
    ]
    for step, calls in enumerate(run.advance(layer, "train")):
        for trainee, optimizer in zip(learners, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = settings.lr * lr_factor(step, num_steps, settings.warmup_fraction)
            loss = trainee.loss(calls)
            _check_finite(loss.item(), trainee.job, f"at step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.module.parameters(), settings.grad_clip)
            optimizer.step()
            trainee.num_tokens += calls[trainee.job.subblock].output_BTD.shape[:2].numel()
    for trainee in learners:
        trainee.module.requires_grad_(False)


def _check_finite(loss: float, job: Job, when: str) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss of variant {job.variant} of {job.subblock} in layer {job.layer} is {loss} {when}: "
            "lower `lr` in conf/bld/, or use dtype float32 in conf/parent/"
        )
