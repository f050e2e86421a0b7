"""Global knowledge distillation: the whole child learns to agree with the parent, hidden state by hidden state and in its logits."""
import copy
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from puzzle_core.children import load_child, save_child
from puzzle_core.corpus import Corpus
from puzzle_core.errors import NotFiniteError, UserError
from puzzle_core.families import family_for
from puzzle_core.files import atomic, fingerprint, write_json
from puzzle_core.losses import Comparison, Weights
from puzzle_core.parents import Parent
from puzzle_core.ranks import ALONE, Ranks
from puzzle_core.schedule import lr_factor
from puzzle_core.spec import did_you_mean

VERSION = 4  # raise when a change here or in losses.py changes what the distilled child is
RECORD = "distillation.json"  # in a distilled child's folder: what made it
# Settings that change rounding at most: no part of a fingerprint.
HOW = ("micro_batch_size", "head_tokens", "gradient_checkpointing", "compile", "log_every_steps", "save_every_steps", "shard", "phases")


@dataclass(frozen=True)
class Settings:
    """How the child is healed: one preset of conf/gkd/."""

    seq_len: int
    batch_size: int  # sequences a step, of all processes
    train_tokens: int
    lr: float
    warmup_fraction: float
    weight_decay: float
    grad_clip: float
    kl_weight: float
    cosine_weight: float
    save_every_steps: int | None  # None: nothing for a killed run to go on from
    lm_weight: float = 0.0
    temperature: float = 1.0  # of the KL
    micro_batch_size: int | None = None  # sequences of a process at a time; None: its whole share of a step
    head_tokens: int = 4096  # whose logits exist at a time
    gradient_checkpointing: bool = False
    compile: bool = False
    parent_dtype: str | None = None  # None: its own
    log_every_steps: int = 1
    eval_every_steps: int | None = None  # None: before the first step and after the last
    eval_tokens: int = 0  # of development text; 0: not measured, and the last state is kept, which may be worse than the child was
    shard: bool = False  # FSDP2 over the processes of a launch, parent and child
    phases: list[dict] = field(default_factory=list)  # what follows: each the keys that differ from those above

    def __post_init__(self):
        where = "conf/gkd/"
        if min(self.kl_weight, self.cosine_weight, self.lm_weight) < 0 or not self.kl_weight + self.cosine_weight + self.lm_weight:
            raise UserError(f"{where}: kl_weight, cosine_weight and lm_weight must not be negative, and one of them must count")
        if self.temperature <= 0:
            raise UserError(f"{where}: temperature is {self.temperature:g}, expected more than 0")
        if self.parent_dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(f"{where}: parent_dtype is '{self.parent_dtype}'; expected float32, bfloat16, float16 or null")
        known = {f.name for f in fields(self)} - {"phases", "shard"}
        for key in (key for phase in self.phases for key in phase if key not in known):
            raise UserError(f"{where}: a phase has the unknown key '{key}'.{did_you_mean(key, known)} Known: {', '.join(sorted(known))}.")
        if len({phase.get("eval_tokens", self.eval_tokens) > 0 for phase in [{}, *self.phases]}) > 1:
            raise UserError(f"{where}: eval_tokens is 0 in one phase and not in another; measure all of them, or none")

    @property
    def determining(self) -> list[dict]:
        """Of each phase the settings that decide what the child is; the others say how the work is done."""
        return [{name: value for name, value in asdict(phase).items() if name not in HOW} for phase in self.each_phase()]

    @property
    def weights(self) -> Weights:
        return Weights(self.kl_weight, self.cosine_weight, self.lm_weight, self.temperature)

    def each_phase(self) -> list["Settings"]:
        """This run's phases, the first one among them, as settings without phases."""
        first = replace(self, phases=[])
        return [first, *(replace(first, **phase) for phase in self.phases)]

    @property
    def num_tokens(self) -> int:
        """Trained on in all phases."""
        return sum(phase.train_tokens for phase in self.each_phase())

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Sequences that a process takes at a time, and how often it does in a step; ValueError where it does not come out even."""
        size = self.micro_batch_size or max(1, self.batch_size // world_size)
        if self.batch_size % (size * world_size):
            raise UserError(
                f"conf/gkd/: batch_size {self.batch_size} is not a multiple of micro_batch_size {size} × {world_size} processes"
            )
        return size, self.batch_size // (size * world_size)


class Resumed(TrainerCallback):
    """What a checkpoint does not know by itself: how often this run logs, saves and measures, and what was summed up since the last log."""

    def __init__(self, trainer: "Distiller"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        kept = state.stateful_callbacks.get("Distiller")
        if kept and self.trainer.is_world_process_zero():  # the others begin at 0
            self.trainer.sums = {name: torch.tensor(total, device=args.device) for name, total in kept["sums"].items()}
            self.trainer.num_sequences = kept["num_sequences"]


class Distiller(Trainer):
    """transformers' Trainer of a child whose forward gives losses, measured on development text at intervals.

    Of the states that are measured the one with the lowest KL is kept: before the first step, on the way, after the last.
    """

    def __init__(self, settings: Settings, held_out: list[Tensor], given: list[Tensor] | None = None, **kwargs):
        """`held_out`: [B, T] token batches of development text, those of this process.

        `given`: weights, as of `_weights`, that are a state too.
        """
        super().__init__(**kwargs)
        self.add_callback(Resumed(self))
        self.settings, self.held_out, self.given = settings, held_out, given
        self.sums: dict[str, Tensor] = {}  # of losses, over the sequences trained on since the last log, on the device
        self.num_sequences = 0
        self.kept, self.kept_step = (_weights(self.model) if held_out else None), 0  # the best state that is in no checkpoint
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation must divide it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, num = model(input_ids=inputs["input_ids"]), len(inputs["input_ids"])
        self.sums = {name: self.sums.get(name, 0.0) + value.detach() * num for name, value in losses.items()}
        self.num_sequences += num
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _totals(self) -> tuple[dict[str, float], int]:
        """The sums of all processes, and of how many sequences."""
        sums = {name: self.accelerator.reduce(self.sums[name], "sum").item() for name in sorted(self.sums)}
        return sums, self.accelerator.reduce(torch.tensor(self.num_sequences, device=self.args.device), "sum").item()

    def _save_checkpoint(self, *args, **kwargs) -> None:
        sums, num_sequences = self._totals()
        self.state.stateful_callbacks["Distiller"] = {"sums": sums, "num_sequences": num_sequences}
        super()._save_checkpoint(*args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: it would walk through all parameters at every step."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of BLD: transformers' own begins its warm-up with a step at rate 0."""
        factor = partial(lr_factor, num_steps=num_training_steps, warmup_fraction=self.settings.warmup_fraction)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs:
            sums, num = self._totals()
            means = {name: total / num for name, total in sums.items()}  # Trainer's own loss is of what came after a kill alone
            self._refuse_nan(means["loss"])
            logs, self.sums, self.num_sequences = {**logs, **means}, {}, 0
        super().log(logs, *args, **kwargs)

    def _refuse_nan(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NotFiniteError(f"gkd loss is {loss} by step {self.state.global_step}: lower `lr` in conf/gkd/")

    @torch.no_grad()
    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """KL to the parent in nats a token and perplexity on development text; a state better than all before is kept.

        Before the first step also the KL of the weights `given`.
        """
        step = self.state.global_step
        kl, lm = self._means()
        if not math.isfinite(kl):
            why = "lower `lr` in conf/gkd/" if step else "the child, as it was given, overflows"
            raise NotFiniteError(f"gkd: the KL on development text is {kl} after step {step}: {why}")
        metrics = {"eval_kl": kl, "eval_perplexity": math.exp(lm) if lm < 700 else None}  # what a float can hold
        if not step:
            metrics["given_kl"] = kl if self.given is None else self._kl_of_given()
            self.state.best_metric, self.state.best_global_step = min(kl, metrics["given_kl"]), 0
        elif kl < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = kl, step
            if self.settings.save_every_steps is None:
                self.kept, self.kept_step = _weights(self.model), step
            else:
                self.control.should_save = True
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _means(self) -> tuple[float, float]:
        """KL and cross-entropy on the development text of all processes, nats a token."""
        means = [self.model_wrapped(input_ids=ids.to(self.args.device), held_out=True) for ids in self.held_out]
        kl, lm = (torch.stack([mean[name] for mean in means]).double().mean() for name in ("kl", "lm"))
        return self.accelerator.reduce(kl, "mean").item(), self.accelerator.reduce(lm, "mean").item()

    def _kl_of_given(self) -> float:
        _put(self.model, self.given)
        kl, _ = self._means()
        _put(self.model, self.kept)
        return kl

    def load_best(self) -> None:
        """Go back to the best state, if it is not the last one; FloatingPointError if the losses since the last log are not numbers."""
        if self.sums:
            self._refuse_nan(self.sums["loss"].item())
        best = self.state.best_global_step
        if not self.held_out or best == self.state.global_step:
            return
        begun = next(row for row in self.state.log_history if "given_kl" in row)
        if best == 0 and begun["given_kl"] < begun["eval_kl"]:
            _put(self.model, self.given)
        elif best == self.kept_step:
            _put(self.model, self.kept)
        else:
            self._load_best_model()


def _parameters(model: PreTrainedModel) -> list[Tensor]:
    """Each once; of a sharded model the part that this process has."""
    if isinstance(model, FSDPModule):
        model.reshard()  # what is outside the layers stays whole after a forward pass
    parameters = [parameter.detach() for parameter in model.parameters()]
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """A copy of the parameters, in main memory."""
    return [parameter.to("cpu", copy=True) for parameter in _parameters(model)]


def _put(model: PreTrainedModel, weights: list[Tensor]) -> None:
    """Let the parameters be what `_weights` copied."""
    for parameter, value in zip(_parameters(model), weights, strict=True):
        parameter.copy_(value)


def _last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end: trainer_state.json comes last."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], str(folder)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def run_fingerprint(child: Path, settings: Settings, *determined_by: object) -> str:
    """Hash of all that determines what becomes of the checkpoint `child`; how it is measured afterwards does not."""
    content = []
    for file in sorted([*child.glob("*.safetensors"), *child.glob("config.json")]):
        with open(file, "rb") as handle:
            content.append((file.name, hashlib.file_digest(handle, "sha256").hexdigest()))
    return fingerprint(VERSION, settings.determining, content, *determined_by)


@contextmanager
def work_folder(out: Path, run: str, ranks: Ranks = ALONE) -> Iterator[Path]:
    """The folder of the checkpoints of `run`; those of other runs are removed, and itself when the block succeeds."""
    work = out / f".gkd-{run}"
    for stale in set(out.glob(".gkd-*")) - {work} if ranks.first else ():
        shutil.rmtree(stale)
    yield work
    if ranks.first:
        shutil.rmtree(work, ignore_errors=True)


def _note(folder: Path, run: str, curve: list[dict[str, float]]) -> None:
    """Write into a healed child's folder which run made it, its curve, and the size of every file that the run wrote."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    write_json(folder / RECORD, {"run": run, "curve": curve, "sizes": sizes})


def _noted(folder: Path, run: str) -> list[dict[str, float]] | None:
    """The curve of the child in `folder`, if this very run made it and it is whole."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if record["run"] == run and all((folder / name).stat().st_size == size for name, size in record["sizes"].items()):
            return record["curve"]
    except (OSError, ValueError, KeyError):
        pass  # there is none, or a part of one
    return None


def link(folder: Path, other: Path) -> None:
    """Make the folder `other` of the same files: nothing is copied."""
    shutil.copytree(folder, other, copy_function=os.link)


def _whole_batches(corpus: Corpus, settings: Settings, seed: str) -> tuple:
    """The token sequences [N, T] to train on, and those of development text, of one phase."""
    step = settings.seq_len * settings.batch_size
    train_tokens, eval_tokens = (-(-tokens // step) * step for tokens in (settings.train_tokens, settings.eval_tokens))
    held_out = corpus.sequences("development", eval_tokens, settings.seq_len, seed=seed) if eval_tokens else []
    return corpus.sequences("train", train_tokens, settings.seq_len, seed=seed), held_out


def heal(
    parent: Parent, child: PreTrainedModel, corpus: Corpus, settings: Settings, seed: int, work: Path, ranks: Ranks = ALONE
) -> list[dict[str, float]]:
    """Train `child` (float32) in place on text of `corpus`, phase after phase; leave it in the parent's dtype.

    Returns the curve: rows of step, loss, its parts, learning_rate; and rows of step, held_out_kl, held_out_perplexity, of which the first
    of each phase has also given_kl, that of the child as it was given.
    With `eval_tokens`, no phase leaves a child that is farther from the parent on it than the child that it, or this function, was
    given. A sharded child stays sharded and in float32: `whole` brings it together.
    """
    curve: list[dict[str, float]] = []
    if settings.shard and ranks.world_size > 1:
        shard(child)
    if not settings.eval_tokens and ranks.first:
        warnings.warn("gkd.eval_tokens is 0: no states are compared: the child may end farther from the parent than it was", stacklevel=2)
    given = _weights(child) if settings.phases and settings.eval_tokens else None
    kind = "-sharded" if isinstance(child, FSDPModule) else ""  # neither reads the other's checkpoints
    done = 0
    for number, phase in enumerate(settings.each_phase()):
        suffix = f"-{number}" if number else ""
        sequences, held_out = _whole_batches(corpus, phase, f"gkd-{seed}{suffix}")
        where = (seed, work / f"phase{suffix}{kind}")
        rows = distill(parent.model, child, list(sequences), phase, *where, list(held_out), ranks, given if number else None)
        curve += [{**row, "step": row["step"] + done} for row in rows]
        done += len(sequences) // phase.batch_size
    if not isinstance(child, FSDPModule):
        _cast(child.eval(), parent.model.dtype)
    return curve


def heal_once(
    finished: Path, made_from: Path, work: Path, run: str, parent: Parent, corpus: Corpus, settings: Settings, seed: int, ranks: Ranks
) -> tuple[Path, list[dict[str, float]]]:
    """The folder of the child that `run` makes of the checkpoint `made_from`, under `work`, and its curve.

    Healed now, unless the folder `finished`, or `work` after a kill, has it.
    """
    folder, curve = work / "healed", None
    if ranks.first:
        curve = _noted(folder, run)
        if curve is None and (curve := _noted(finished, run)):
            with atomic(folder) as part:
                link(finished, part)
    curve = ranks.gather([curve])[0]
    if curve is None:
        child = load_child(made_from, torch.float32, parent.device)  # the optimizer's masters
        curve = heal(parent, child, corpus, settings, seed, work, ranks)
        child = whole(child, made_from, parent.model.dtype, ranks)
        if ranks.first:
            save_child(child, parent.tokenizer, folder)
            _note(folder, run, curve)
    return folder, curve


def held_out_rows(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "given_kl"} for row in curve if "held_out_kl" in row]


def training_rows(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in curve if "loss" in row]


def kept(curve: list[dict[str, float]]) -> str:
    """In words, which state the healed child is, and its KL beside that of the child before GKD, on the last phase's development text."""
    measured = [row for row in curve if "held_out_kl" in row]
    if not measured:
        return "kept: after the last step; gkd.eval_tokens is 0, so no state was measured"
    starts = [index for index, row in enumerate(measured) if "given_kl" in row]
    phases = [measured[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    step = 0
    for phase in reversed(phases):
        nearest = min(phase, key=lambda row: row["held_out_kl"])  # the first of them
        if nearest is not phase[0]:
            step = nearest["step"]
        if step or phase[0]["given_kl"] < nearest["held_out_kl"]:
            break
    kls = [row["held_out_kl"] for row in phases[-1]]
    before = phases[-1][0]["given_kl"]
    of_kept = f"KL on development text {before:.4g} before GKD, {min(before, *kls):.4g} after"
    if step:
        return f"kept: after step {step}; {of_kept}"
    return (
        f"kept: before the first step; {of_kept}: no state of this run is nearer to the parent ({kls[-1]:.4g} after the last step), "
        "so the child is as it was given. Lower `lr` in conf/gkd/."
    )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for parameter in model.parameters():  # not model.to(): rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    return model


def whole(child: PreTrainedModel, made_from: Path, dtype: torch.dtype, ranks: Ranks) -> PreTrainedModel | None:
    """The healed child in one piece: itself, or its shards brought together in rank 0 in a model like the one in `made_from`."""
    if not isinstance(child, FSDPModule):
        return child
    state = get_model_state_dict(child, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not ranks.first:
        return None
    together = load_child(made_from, torch.float32, torch.device("cpu"))
    together.load_state_dict(state)
    return _cast(together, dtype)


def shard(model: PreTrainedModel) -> None:
    """FSDP2, in place: each layer's parameters, and the others together, are divided over all processes.

    A GPU computes in bfloat16. What is outside the layers stays gathered while the losses are made from the head.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if model.device.type == "cuda" else None
    more = {"mp_policy": policy} if policy else {}
    for layer in model.get_submodule(family_for(model.config).layers):
        fully_shard(layer, **more)
    fully_shard(model, reshard_after_forward=False, **more)


@contextmanager
def _parent_for(parent: PreTrainedModel, settings: Settings, sharded: bool) -> Iterator[PreTrainedModel]:
    """The parent as GKD runs it: in `parent_dtype`, in shards. It is a copy then, and the whole waits in main memory."""
    dtype = getattr(torch, settings.parent_dtype) if settings.parent_dtype else parent.dtype
    if dtype == parent.dtype and not sharded:
        yield parent
        return
    other = _cast(copy.deepcopy(parent), dtype)
    device = parent.device
    if sharded:
        shard(other)
        parent.to("cpu")
    try:
        yield other
    finally:
        parent.to(device)


def distill(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    sequences: list,
    settings: Settings,
    seed: int,
    work: Path,
    held_out: list | None = None,
    ranks: Ranks = ALONE,
    given: list[Tensor] | None = None,
) -> list[dict[str, float]]:
    """One phase: train `child` (float32) in place on [N, T] token sequences; returns the curve, as `heal` does.

    With `held_out` sequences (of development text), as many in each process, the state nearest to the parent on them stays: one on the
    way, the one before the first step, or the weights `given` (as of `_weights`), if there are any.
    Checkpoints go to `work`; a run that finds one there goes on from it, to the same result as an uninterrupted run.
    """
    limit, seq_len = getattr(parent.config, "max_position_embeddings", None), len(sequences[0])
    if limit and seq_len > limit:
        raise UserError(f"gkd.seq_len is {seq_len}, and the parent's positions end at {limit}: lower it in conf/gkd/")
    size, accumulation = settings.micro_batches(ranks.world_size)
    found = ranks.gather([_last_whole_checkpoint(work) if ranks.first else None])[0]
    sharded, num_steps = settings.shard and ranks.world_size > 1, math.ceil(len(sequences) / settings.batch_size)
    mine = torch.as_tensor(np.stack(held_out[ranks.rank :: ranks.world_size])).split(size) if held_out else []
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=num_steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.grad_clip,
        optim="adamw_torch_fused",
        use_cpu=parent.device.type == "cpu",
        logging_steps=settings.log_every_steps,
        logging_nan_inf_filter=False,  # it would wait for the device at every step; log() looks
        save_strategy="steps" if settings.save_every_steps else "no",
        save_steps=settings.save_every_steps or num_steps,
        save_total_limit=2,
        eval_strategy="steps" if mine else "no",
        eval_steps=settings.eval_every_steps or num_steps,
        eval_on_start=bool(mine) and found is None,
        fsdp=True if sharded else None,
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "NO_WRAP"} if sharded else None,
        ddp_find_unused_parameters=False,
        accelerator_config={"non_blocking": parent.device.type == "cuda"},  # else each batch waits for the device
        seed=seed,
        report_to=[],
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would be DataParallel: another batch size
    dataset = [{"input_ids": torch.as_tensor(row)} for row in sequences]
    with _parent_for(parent, settings, sharded) as reference:
        if sharded and not isinstance(child, FSDPModule):
            shard(child)
        comparison = Comparison(reference, child, settings.weights, settings.head_tokens, settings.compile)
        with comparison.installed(settings.gradient_checkpointing):
            more = {"train_dataset": dataset, "eval_dataset": dataset if mine else None}
            trainer = Distiller(settings, mine, given, model=child, args=arguments, **more)
            trainer.train(resume_from_checkpoint=found)
            trainer.load_best()
    return _curve(trainer.state.log_history)


def _curve(history: list[dict]) -> list[dict[str, float]]:
    """Trainer's log as rows of losses and rows of development text."""
    trained = ("step", "loss", "kl", "cosine", "lm", "learning_rate")
    measured = {"step": "step", "eval_kl": "held_out_kl", "eval_perplexity": "held_out_perplexity", "given_kl": "given_kl"}
    losses = [{name: row[name] for name in trained if name in row} for row in history if "loss" in row]
    held_out = [{new: row[name] for name, new in measured.items() if name in row} for row in history if "eval_kl" in row]
    return sorted([*held_out, *losses], key=lambda row: row["step"])
