"""A window of layers whose variants train beside each other: initialised, refitted, trained, measured, written."""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from puzzle_core import surgery
from puzzle_core.errors import NotFiniteError
from puzzle_core.files import atomic, fingerprint
from puzzle_core.learners import Learner, alone, is_trained, normalised_mse, together
from puzzle_core.schedule import lr_factor
from puzzle_core.spec import ATTENTION, BLOCK, FFN, SUBBLOCKS
from puzzle_core.subblocks import swapped
from puzzle_core.trace import Call, ParentRun
from puzzle_core.trainees import Job, Settings, Trainee, composed, initialised, refit, save


@dataclass(frozen=True)
class Group:
    """The trainees of one subblock that one learner computes, in the learner's order."""

    layer: int
    subblock: str
    learner: Learner
    trainees: list[Trainee]


def unfinished(blocks: Path) -> Path:
    """The folder of the states of windows in training."""
    return blocks.with_name(".bld")


class Window:
    """The variants of some consecutive layers: initialised, trained beside each other, measured, written."""

    def __init__(self, run: ParentRun, layers: range, here: list[Job], settings: Settings, num_steps: int, blocks: Path):
        self.run, self.layers, self.settings, self.num_steps, self.blocks = run, layers, settings, num_steps, blocks
        self.first_val = list(run.hidden["val"])
        self.kv_calls: dict[int, Call] = {}
        self.trainees = [trainee for layer in layers for trainee in self._initialise([job for job in here if job.layer == layer], layer)]
        self.groups = [group for layer in layers for group in self._groups(layer)] if num_steps else []
        state_of = fingerprint(*(job.fingerprint for job in here), num_steps)
        self.state_file = unfinished(blocks) / f"{layers.start}-{layers.stop}-{state_of}.pt"

    # -------------------------------------------------------------------------------------------- before training

    def _initialise(self, here: list[Job], layer: int) -> list[Trainee]:
        """Initialise and refit the variants of one layer, moving the calibration and development runs past it."""
        parent, run, settings = self.run.parent, self.run, self.settings
        with surgery.watch_ffn(parent.module(layer, FFN), parent.family.ffn, settings.channels) as seen:
            calibration = list(run.advance(layer, "calibration"))
        development = list(run.advance(layer, "val"))
        self.kv_calls[layer] = development[0][ATTENTION]
        trainees = [
            composed(parent, job, self.blocks) if job.halves else initialised(parent, job, calibration, seen, settings) for job in here
        ]
        for trainee in trainees:
            if trainee.last is not None and settings.ridge is not None:
                refit(trainee, calibration, settings.ridge)
            trainee.module = trainee.module.to(parent.model.dtype)
            trainee.loss_before = trainee.loss_last = trainee.loss_after = self._loss(trainee, layer, development)
        return trainees

    @torch.no_grad()
    def _loss(self, trainee: Trainee, layer: int, batches: list[dict[str, Call]]) -> float:
        learner = Learner.of_one(trainee.module)
        losses = [self._losses(learner, layer, trainee.job.subblock, calls)[0] for calls in batches]
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"loss of {trainee.job} is {loss} as it was initialised: the parent's activations overflow; use dtype "
                "bfloat16 or float32 in conf/parent/"
            )
        return loss

    def _groups(self, layer: int) -> list[Group]:
        """What trains in `layer`: FFN variants together where their own outputs are what counts, others alone; attention first."""
        closed_form = self.settings.ridge is not None
        some = [t for t in self.trainees if t.job.layer == layer and is_trained(t.job.variant, closed_form)]
        of_width = [t for t in some if t.job.subblock == FFN and t.job.variant.kind == "w"]
        fused = None
        if len(of_width) > 1 and self.settings.target == "subblock":
            widths = [t.job.variant.size for t in of_width]
            fused = together(self.run.parent, layer, widths, [t.module for t in of_width])
        groups = [Group(layer, FFN, fused, of_width)] if fused else []
        groups += [Group(layer, t.job.subblock, alone(t.module), [t]) for t in some if not (fused and t in of_width)]
        return sorted(groups, key=lambda group: (*SUBBLOCKS, BLOCK).index(group.subblock))

    # ---------------------------------------------------------------------------------------------------- training

    def _in(self, layer: int) -> list[Group]:
        return [group for group in self.groups if group.layer == layer]

    def _losses(self, learner: Learner, layer: int, subblock: str, calls: dict[str, Call], compiled: bool = False) -> list[Tensor]:
        """The loss of each variant of `learner` on one batch, against what `bld.target` names, or the block where it is one."""
        if self.settings.target == "subblock" and subblock != BLOCK:
            return (_compiled_losses() if compiled else Learner.losses)(learner, calls[subblock], self.settings.loss_per)
        block = calls[BLOCK]
        with swapped(self.run.parent, layer, subblock, learner.module):
            return [normalised_mse(block.replay(self.run.parent.layers[layer]), block.output_BTD, self.settings.loss_per)]

    def step(self, hidden_BTD: Tensor) -> Tensor:
        """One step of all the window's variants on one batch; what the parent's layers make of it."""
        for layer, calls in self.run.through(self.layers, hidden_BTD):
            hidden_BTD = calls[BLOCK].output_BTD
            for group in self._in(layer):
                torch.stack(self._losses(group.learner, layer, group.subblock, calls, self.settings.compile)).sum().backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # at the end: between steps gradients take no room
        return hidden_BTD

    def _clip(self) -> None:
        """Scale each variant's gradient down to the norm `bld.grad_clip`."""
        gradients = [group.learner.gradients(index) for group in self.groups for index in range(len(group.trainees))]
        norms = torch.stack(torch._foreach_norm([gradient for of_one in gradients for gradient in of_one]))
        totals = torch.stack([part.square().sum() for part in norms.split([len(of_one) for of_one in gradients])]).sqrt()
        for of_one, scale in zip(gradients, (self.settings.grad_clip / (totals + 1e-6)).clamp(max=1.0), strict=True):
            torch._foreach_mul_(of_one, scale)

    def train(self, batches: list, progress: tqdm) -> dict[Job, dict]:
        """Train on [B, T] token `batches`, write every variant's file; the library rows."""
        if self.groups:
            self._learn(batches, progress)
        elif "train" in self.run.hidden:
            for layer in self.layers:
                self.run.skip(layer, "train")
        rows = {trainee.job: save(trainee, self.run.parent, self.kv_calls[trainee.job.layer], self.blocks) for trainee in self.trainees}
        self.state_file.unlink(missing_ok=True)
        return rows

    def make_optimizer(self) -> torch.optim.AdamW:
        """One for all: AdamW is elementwise, so each variant's weights go their own way in it. Its rate is a tensor, to be set."""
        device = self.run.parent.device
        parameters = [p for group in self.groups for p in group.learner.parameters()]
        rate = torch.tensor(self.settings.lr, device=device)
        return torch.optim.AdamW(
            parameters, lr=rate, weight_decay=self.settings.weight_decay, fused=True, capturable=device.type == "cuda"
        )

    def _learn(self, batches: list, progress: tqdm) -> None:
        settings, device = self.settings, self.run.parent.device
        self.optimizer, trained = self.make_optimizer(), self._trained()
        done = self._restore()
        rate = self.optimizer.param_groups[0]["lr"]  # restoring puts another tensor in its place
        step, held = Captured(self.step) if device.type == "cuda" else self.step, self.run.hidden.get("train")
        for index, batch in enumerate(batches):
            hidden = held[index] if held else self.run.enter(torch.as_tensor(batch, device=device), self.layers.start)
            if index < done or all(trainee.stopped_at for trainee in trained):
                out = self._pass(hidden) if held else None
            else:
                rate.fill_(settings.lr * lr_factor(index, self.num_steps, settings.warmup_fraction))
                out = step(hidden)
                if settings.settled is not None and (index + 1) % settings.eval_every_steps == 0:
                    self._stop_settled(index + 1)
                if settings.save_every_steps and (index + 1) % settings.save_every_steps == 0 and index + 1 < len(batches):
                    self._keep(index + 1)
            if held:
                held[index] = out
            progress.update()
        self._finish(batches[0].size)

    def _pass(self, hidden_BTD: Tensor) -> Tensor:
        """The batch moved past the window, nothing learnt."""
        for _, calls in self.run.through(self.layers, hidden_BTD):
            hidden_BTD = calls[BLOCK].output_BTD
        return hidden_BTD

    def _trained(self) -> list[Trainee]:
        return [trainee for group in self.groups for trainee in group.trainees]

    @torch.no_grad()
    def _evaluate(self) -> dict[Job, float]:
        """The mean development loss of every variant in training."""
        losses: dict[Job, list[Tensor]] = {trainee.job: [] for trainee in self._trained()}
        for hidden_BTD in self.first_val:
            for layer, calls in self.run.through(self.layers, hidden_BTD):
                for group in self._in(layer):
                    of_group = self._losses(group.learner, layer, group.subblock, calls)
                    for trainee, loss in zip(group.trainees, of_group, strict=True):
                        losses[trainee.job].append(loss)
        return {job: torch.stack(some).mean().item() for job, some in losses.items()}

    def _stop_settled(self, step: int) -> None:
        """Take the weights of each variant whose loss has settled. What computes it goes on until all in its window have."""
        now = self._evaluate()
        for group in self.groups:
            for index, trainee in enumerate(group.trainees):
                loss = now[trainee.job]
                if not trainee.stopped_at and not loss < trainee.loss_last * (1 - self.settings.settled):
                    trainee.stopped_at = step
                    self._take(group.learner, index, trainee, loss, "settled")
                trainee.loss_last = loss

    def _finish(self, tokens_per_step: int) -> None:
        now = self._evaluate()
        for group in self.groups:
            for index, trainee in enumerate(group.trainees):
                if not trainee.stopped_at:
                    self._take(group.learner, index, trainee, now[trainee.job], "trained")
                trainee.num_tokens = (trainee.stopped_at or self.num_steps) * tokens_per_step

    def _take(self, learner: Learner, index: int, trainee: Trainee, loss: float, outcome: str) -> None:
        """Let the trained weights be the variant's, unless those it began with were better."""
        if loss <= trainee.loss_before:  # False for NaN
            learner.write(index, trainee.module)
            trainee.loss_after, trainee.outcome = loss, outcome
        else:
            trainee.outcome = "rolled back"
            tqdm.write(f"bld: {trainee.job}: development loss {trainee.loss_before:.4g} before training, {loss:.4g} after; kept as it was")

    # -------------------------------------------------------------------------------------------- a killed window

    def _keep(self, step: int) -> None:
        trained = self._trained()
        state = {
            "step": step,
            "weights": [group.learner.state_dict() for group in self.groups],
            "optimizer": self.optimizer.state_dict(),
            "last": {str(t.job): t.loss_last for t in trained},
            "stopped": {str(t.job): (t.stopped_at, t.loss_after, t.outcome, t.module.state_dict()) for t in trained if t.stopped_at},
        }
        with atomic(self.state_file) as part:
            torch.save(state, part)

    def _restore(self) -> int:
        """Steps already done, by a run that was killed; what had settled by then stays so."""
        if not self.state_file.exists():
            return 0
        state = torch.load(self.state_file, map_location=self.run.parent.device)
        for group, weights in zip(self.groups, state["weights"], strict=True):
            group.learner.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        for trainee in self._trained():
            trainee.loss_last = state["last"][str(trainee.job)]
            if stopped := state["stopped"].get(str(trainee.job)):
                trainee.stopped_at, trainee.loss_after, trainee.outcome, weights = stopped
                trainee.module.load_state_dict(weights)
        return state["step"]


class Captured:
    """`step` as one CUDA graph: launching its kernels one by one would take longer than they do.

    The first calls run as they are, because what is made only once must not be captured. All run on one stream: cuBLAS
    keeps a workspace for every stream that it has ever seen. A graph has memory of its own: what those calls used is given back first.
    """

    def __init__(self, step: Callable[[Tensor], Tensor]):
        self.step, self.num_calls, self.graph = step, 0, None

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls <= 3:
            stream = _side_stream(hidden_BTD.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out_BTD = self.step(hidden_BTD)
            torch.cuda.current_stream().wait_stream(stream)
            return out_BTD
        if self.graph is None:
            self.hidden_BTD, self.graph = hidden_BTD.clone(), torch.cuda.CUDAGraph()
            torch.cuda.empty_cache()
            with torch.cuda.graph(self.graph, stream=_side_stream(hidden_BTD.device)):
                self.out_BTD = self.step(self.hidden_BTD)
        self.hidden_BTD.copy_(hidden_BTD)
        self.graph.replay()
        return self.out_BTD.clone()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _compiled_losses() -> Callable:
    torch._dynamo.config.recompile_limit = 64  # one form of it for each shape of learner; past the limit they run uncompiled
    return torch.compile(Learner.losses, dynamic=False)
