"""Global knowledge distillation: the whole child learns to agree with the parent, hidden state by hidden state and in its logits."""
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments

from puzzle_core.files import fingerprint, write_json
from puzzle_core.schedule import lr_factor

VERSION = 2  # raise when a change here changes what the distilled child is
RECORD = "distillation.json"  # in a distilled child's folder: what made it
TOKENS_AT_ONCE = 256  # positions whose logits enter the KL at a time


@dataclass(frozen=True)
class Settings:
    """How the child is healed: one preset of conf/gkd/."""

    seq_len: int
    batch_size: int  # sequences a step
    train_tokens: int
    lr: float
    warmup_fraction: float
    weight_decay: float
    grad_clip: float
    kl_weight: float
    cosine_weight: float
    save_every_steps: int


def kl_loss(parent_logits_BTV: Tensor, child_logits_BTV: Tensor) -> Tensor:
    """Mean over tokens of KL(parent ‖ child), in nats; the float32 log-probabilities are made again on the way back."""
    parent, child = parent_logits_BTV.flatten(0, 1), child_logits_BTV.flatten(0, 1)
    parts = [
        checkpoint(_kl_sum, p, c, use_reentrant=False)
        for p, c in zip(parent.split(TOKENS_AT_ONCE), child.split(TOKENS_AT_ONCE), strict=True)
    ]
    return torch.stack(parts).sum() / len(child)


def _kl_sum(parent_NV: Tensor, child_NV: Tensor) -> Tensor:
    log_p, log_c = parent_NV.float().log_softmax(-1), child_NV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_c, log_p, reduction="sum", log_target=True)


def cosine_loss(parent_hiddens: tuple[Tensor, ...], child_hiddens: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers and tokens of 1 - cos(h_child, h_parent); both start with the embeddings, which are left out."""
    per_layer = [
        1 - torch.nn.functional.cosine_similarity(c.float(), p.float(), dim=-1).mean()
        for p, c in zip(parent_hiddens[1:], child_hiddens[1:], strict=True)
    ]
    return torch.stack(per_layer).mean()


class Distiller(Trainer):
    """transformers' Trainer with the parent's outputs as the labels."""

    def __init__(self, parent: PreTrainedModel, settings: Settings, **kwargs):
        super().__init__(**kwargs)
        self.parent, self.settings, self.parts = parent, settings, {}
        self.model_accepts_loss_kwargs = False  # the loss below is a mean, so accumulation must divide it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        wanted = {"use_cache": False, "output_hidden_states": self.settings.cosine_weight > 0}
        with torch.no_grad():
            parent = self.parent(input_ids=inputs["input_ids"], **wanted)
        child = model(input_ids=inputs["input_ids"], **wanted)
        losses = {"kl": kl_loss(parent.logits, child.logits)}
        if self.settings.cosine_weight > 0:
            losses["cosine"] = cosine_loss(parent.hidden_states, child.hidden_states)
        loss = self.settings.kl_weight * losses["kl"] + self.settings.cosine_weight * losses.get("cosine", 0.0)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"gkd loss is {loss.item()} at step {self.state.global_step}: lower `lr` in conf/gkd/")
        self.parts = {name: value.item() for name, value in losses.items()}
        return (loss, child) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of BLD: transformers' own begins its warm-up with a step at rate 0."""
        factor = partial(lr_factor, num_steps=num_training_steps, warmup_fraction=self.settings.warmup_fraction)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def log(self, logs: dict, *args, **kwargs) -> None:
        super().log({**logs, **self.parts} if "loss" in logs else logs, *args, **kwargs)


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
    return fingerprint(VERSION, asdict(settings), content, *determined_by)


@contextmanager
def work_folder(out: Path, run: str) -> Iterator[Path]:
    """The folder of the checkpoints of `run`; those of other runs are removed, and itself when the block succeeds."""
    work = out / f".gkd-{run}"
    for stale in set(out.glob(".gkd-*")) - {work}:
        shutil.rmtree(stale)
    yield work
    shutil.rmtree(work, ignore_errors=True)


def note_run(folder: Path, run: str, curve: list[dict[str, float]]) -> None:
    """Write into a distilled child's folder which run made it, its curve, and the size of every file that the run wrote."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    write_json(folder / RECORD, {"run": run, "curve": curve, "sizes": sizes})


def take_over(finished: Path, run: str, folder: Path) -> list[dict[str, float]] | None:
    """Link the child in `finished` into the new `folder` and return its curve, if this very run made it and it is whole."""
    try:
        record = json.loads((finished / RECORD).read_text())
        if record["run"] != run or any((finished / name).stat().st_size != size for name, size in record["sizes"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None  # there is none, or a part of one
    shutil.copytree(finished, folder, copy_function=os.link)
    return record["curve"]


def distill(
    parent: PreTrainedModel, child: PreTrainedModel, sequences: list, settings: Settings, seed: int, work: Path
) -> list[dict[str, float]]:
    """Train `child` (float32) in place on [N, T] token sequences, leave it in the parent's dtype.

    Returns the curve: step, loss, kl, cosine, learning_rate.

    Checkpoints go to `work`; a run that finds one there goes on from it, to the same result as an uninterrupted run.
    """
    num_steps = math.ceil(len(sequences) / settings.batch_size)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=num_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.grad_clip,
        bf16=parent.device.type == "cuda",
        use_cpu=parent.device.type == "cpu",
        logging_steps=1,
        save_steps=settings.save_every_steps,
        save_total_limit=2,
        seed=seed,
        report_to=[],
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would be DataParallel: another batch size
    dataset = [{"input_ids": torch.as_tensor(row)} for row in sequences]
    trainer = Distiller(parent, settings, model=child.train(), args=arguments, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work))
    for parameter in child.eval().parameters():  # not child.to(): rotary frequencies stay in float32
        parameter.data = parameter.data.to(parent.dtype)
    columns = ("step", "loss", "kl", "cosine", "learning_rate")
    return [{c: row[c] for c in columns if c in row} for row in trainer.state.log_history if "loss" in row]
