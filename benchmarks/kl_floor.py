"""What the precision of logits adds to a KL, and what float32 logits cost: a 16-bit parent's, against float64.

    python -m benchmarks.kl_floor                                  # on a GPU: the geometries of the docs
    python -m benchmarks.kl_floor --parents pico,smollm2-135m      # under a minute on a CPU

Parent and child have the same random head, with logits as large as real ones (standard deviation 3); the child's last hidden states are
the parent's and 5 % of noise, so that the KL is that of a mild variant. Both ways compare them as scoring does, with the parent's logits
held; they differ in the head alone. The float64 KL is of the same 16-bit hidden states and weights.
"""
import argparse
import statistics
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.machine import RandomTokens, emptied, now, peak_gib, random_parent, write_results
from puzzle_core import quality
from puzzle_core.parents import Parent, pick_device
from puzzle_core.trace import last_hidden

LOGITS_STD, NOISE, REPEATS = 3.0, 0.05, 5
KINDS = ("kl", "lm_loss", "top1_disagreement")


def random_head(parent: Parent) -> nn.Linear:
    """The parent's head with weights of its own, drawn so that logits have the standard deviation LOGITS_STD."""
    head, generator = parent.model.get_output_embeddings(), torch.Generator(parent.device).manual_seed(1)
    std = LOGITS_STD / head.in_features**0.5  # last hidden states are normalised to 1
    weight_VD = torch.empty_like(head.weight).normal_(std=std, generator=generator)
    head.weight = nn.Parameter(weight_VD, requires_grad=False)
    return head


@torch.no_grad()
def in_float64(weight_VD: Tensor, parent_ND: Tensor, child_ND: Tensor) -> tuple[float, float]:
    """KL in nats a token, and the share of tokens after which another next one is the likeliest."""
    kl, other, pieces = 0.0, 0, weight_VD.split(4096)
    for pair in zip(parent_ND.split(64), child_ND.split(64), strict=True):
        logits = [torch.cat([x_ND.double() @ piece.double().T for piece in pieces], dim=1) for x_ND in pair]
        log_p, log_c = (x.log_softmax(-1) for x in logits)
        kl += (log_p.exp() * (log_p - log_c)).sum().item()
        other += (logits[0].argmax(-1) != logits[1].argmax(-1)).sum().item()
    return kl / len(parent_ND), other / len(parent_ND)


def compared(parent: Parent, batch: Tensor, child_BTD: Tensor, head_tokens: int, compiled: bool) -> dict:
    """What scoring says of the child, the median time that it takes, and the most memory."""
    emptied(parent.device)
    text = quality.Text(parent, [batch], {kind: kind for kind in KINDS}, head_tokens, compiled)
    text.prepare(float("inf"))
    values, times = text.values(text.measure(0, child_BTD[None])[0].tolist()), []
    for _ in range(REPEATS):
        start = now(parent.device)
        text.measure(0, child_BTD[None])
        times.append(now(parent.device) - start)
    return {**values, "ms": 1e3 * statistics.median(times), "peak_gib": peak_gib(parent.device)}


@torch.no_grad()
def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict:
    parent = random_parent(name, options.dtype, device, most_layers=1)  # of the model the head alone is measured
    shape = (options.tokens, options.tokens // options.sequences, options.sequences)
    batch = torch.as_tensor(RandomTokens(parent.model.config.vocab_size).batches("", *shape, seed="")[0], device=device)
    head, hidden_BTD = random_head(parent), last_hidden(parent, batch)
    noise_BTD = torch.randn(hidden_BTD.shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=hidden_BTD.dtype)
    child_BTD = hidden_BTD + NOISE * noise_BTD
    kl, other = in_float64(head.weight, hidden_BTD.flatten(0, 1), child_BTD.flatten(0, 1))
    compiled = device.type == "cuda"
    ours = compared(parent, batch, child_BTD, options.head_tokens, compiled)
    with patch.object(quality, "head", lambda _, hidden_ND: head(hidden_ND).float()):
        theirs = compared(parent, batch, child_BTD, options.head_tokens, compiled)
    return {
        "parent": name, "dtype": options.dtype, "num_tokens": batch.numel(), "kl": kl,
        "error_16_bit": theirs["kl"] - kl, "error_float32": ours["kl"] - kl, "top1_disagreement": other,
        "top1_error_16_bit": theirs["top1_disagreement"] - other, "top1_error_float32": ours["top1_disagreement"] - other,
        "ms_16_bit": theirs["ms"], "ms_float32": ours["ms"], "times_as_long": ours["ms"] / theirs["ms"],
        "peak_gib_16_bit": theirs["peak_gib"], "peak_gib_float32": ours["peak_gib"],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--parents", default="pico,smollm2-135m,llama-3.2-1b", help="of benchmarks/machine.py")
    parser.add_argument("--dtype", default="bfloat16", help="or float16")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a GPU, 128 on a CPU")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--head-tokens", type=int, help="tokens whose logits exist at a time; default: 4096 on a GPU, 128 on a CPU")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    options.tokens = options.tokens or {"cuda": 16384, "cpu": 128}[device.type]
    options.head_tokens = options.head_tokens or {"cuda": 4096, "cpu": 128}[device.type]
    rows = []
    for name in options.parents.split(","):
        rows.append(measure(name, options, device))
        print(", ".join(f"{k} {v:,.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        emptied(device)
    result = "kl_floor_gpu" if device.type == "cuda" else "kl_floor_cpu"
    written = write_results("kl_floor", {"asked": vars(options), "geometries": rows}, device, result)
    print(pd.DataFrame(rows).T.to_string(float_format=lambda value: f"{value:,.3g}"))
    print(f"written: {written}")
    return rows


if __name__ == "__main__":
    main()
