"""How fast scoring is: against a full forward pass per variant, and against what the chip can multiply.

    python -m benchmarks.scoring                                          # on a GPU: both geometries of the table in the docs
    python -m benchmarks.scoring --parents pico --seq-len 64 --batch-size 4

The plain way is what one writes first: swap the variant in, run the whole model over the same batches, compare its
log-softmax with the parent's, held in float32. Both score the same variants of every sampled layer on the same random
tokens, turn by turn in one run; weights are random, which times do not see. Timed without reading weights from disk.
"""
import argparse
import statistics

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.machine import bytes_per_s, matmul_flops_per_s, now, random_parent, write_results
from puzzle_core.parents import Parent, pick_device
from puzzle_core.quality import Text
from puzzle_core.scoring import Scorer
from puzzle_core.spec import PARENT, SUBBLOCKS
from puzzle_core.subblocks import build_subblock, resolve_space, swapped

SPACE = {"attention": ["kv50%", "kv25%", "linear", "no_op"], "ffn": ["w75%", "w50%", "w25%", "no_op"]}


def random_tokens(parent: Parent, num_tokens: int, seq_len: int, batch_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, seq_len)
    num_batches = -(-num_tokens // (seq_len * batch_size))
    return [torch.randint(1, parent.model.config.vocab_size, shape, generator=generator).to(parent.device) for _ in range(num_batches)]


def random_variants(parent: Parent, layer: int) -> list[tuple[str, str, nn.Module]]:
    """Every variant of SPACE for one layer: subblock, name, module with random weights."""
    generator = torch.Generator(parent.device).manual_seed(layer)
    found = []
    for subblock, variants in resolve_space(SPACE, parent.model.config, parent.family).items():
        for variant in variants:
            if variant != PARENT:
                module = build_subblock(parent, layer, subblock, variant)
                for parameter in module.parameters():
                    nn.init.normal_(parameter.requires_grad_(False), std=parent.model.config.initializer_range, generator=generator)
                found.append((subblock, str(variant), module))
    return found


@torch.no_grad()
def plain_score(parent: Parent, layer: int, subblock: str, module: nn.Module, batches: list, log_p: list) -> tuple[float, float]:
    """KL and LM loss by full forward passes, in nats a token; of logits in the parent's dtype, which in 16 bits differ from scoring's."""
    kl = loss = 0.0
    with swapped(parent, layer, subblock, module):
        for ids, log_p_BTV in zip(batches, log_p, strict=True):
            logits_BTV = parent.model(input_ids=ids, use_cache=False).logits.float()
            log_c_BTV = logits_BTV.log_softmax(-1)
            kl += nn.functional.kl_div(log_c_BTV, log_p_BTV, log_target=True, reduction="sum").item()
            loss += nn.functional.nll_loss(log_c_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    num_rows, seq_len = batches[0].shape
    return kl / (len(batches) * num_rows * seq_len), loss / (len(batches) * num_rows * (seq_len - 1))


def linear_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def floor_of(parent: Parent, layer: int, subblock: str, module: nn.Module, num_tokens: int, seq_len: int, num_batches: int) -> dict:
    """The least that scoring one variant takes: FLOPs, and bytes moved if every kernel of a layer were one.

    FLOPs: the products of the replaced layer, of the layers above it and of the head, and causal attention's two.
    Bytes: those weights once a batch; in and out of each layer one hidden state a token; of the head the parent's logits
    read, and the child's written and read, in float32.
    """
    config, itemsize = parent.model.config, parent.model.dtype.itemsize
    per_token = 2 * config.hidden_size * config.vocab_size
    weights = config.hidden_size * config.vocab_size
    for index in range(layer, len(parent.layers)):
        modules = {s: module if (index, s) == (layer, subblock) else parent.module(index, s) for s in SUBBLOCKS}
        weights += sum(map(linear_weights, modules.values()))
        per_token += 2 * sum(map(linear_weights, modules.values()))
        if hasattr(modules["attention"], parent.family.attention.q):
            per_token += 2 * seq_len * config.num_attention_heads * config.head_dim  # half of 4 · T · H · E: causal
    num_layers = len(parent.layers) - layer
    moved = itemsize * (num_batches * weights + num_tokens * 2 * num_layers * config.hidden_size)
    logits = torch.float32.itemsize * num_tokens * 3 * config.vocab_size
    return {"flops": per_token * num_tokens, "bytes": moved + logits}


def measure(name: str, options: argparse.Namespace, device: torch.device, rate: float, bandwidth: float) -> tuple[dict, list[dict]]:
    """The figures of one geometry, and those of each of its sampled variants."""
    parent = random_parent(name, options.dtype, device)
    batches = random_tokens(parent, options.tokens, options.seq_len, options.batch_size)
    num_tokens, num_layers = sum(ids.numel() for ids in batches), len(parent.layers)
    layers = sorted(set(np.linspace(0, num_layers - 1, min(options.layers, num_layers)).round().astype(int).tolist()))
    compiled = options.compile and device.type == "cuda"
    start = now(device)
    scorer = Scorer(parent, [Text(parent, batches, {"kl": "kl", "lm_loss": "lm_loss"}, options.head_tokens, compiled)], options.memory_gib)
    prepare_s = now(device) - start
    with torch.no_grad():
        logits = [parent.model(input_ids=ids, use_cache=False).logits.float() for ids in batches]
        log_p = [logits.pop(0).log_softmax(-1) for _ in batches]
        parent_loss = plain_score(parent, 0, "ffn", parent.module(0, "ffn"), batches, log_p)[1]
    rows, climb_s, scoring_s, plain_s = [], [], [], []
    for layer in layers:
        variants = random_variants(parent, layer)
        start = now(device)
        scorer.climb(layer)
        climb_s.append(now(device) - start)
        groups = [variants[at : at + options.at_once] for at in range(0, len(variants), options.at_once)]
        if layer == layers[0]:  # what is compiled or chosen on first use is not timed
            for size in {len(group) for group in groups}:
                scorer.values(scorer.sums([{s: m} for s, _, m in variants[:size]]))
        start = now(device)
        sums = [scorer.sums([{s: m} for s, _, m in group]) for group in groups]
        values = [v for part in sums for v in scorer.values(part)]
        scoring_s.append(now(device) - start)
        start = now(device)
        plain = [plain_score(parent, layer, s, m, batches, log_p) for s, _, m in variants]
        plain_s.append(now(device) - start)
        for (subblock, variant, module), ours, (kl, loss) in zip(variants, values, plain, strict=True):
            floor = floor_of(parent, layer, subblock, module, num_tokens, options.seq_len, len(batches))
            difference = max(abs(ours["kl"] / kl - 1), abs((ours["lm_loss"] + parent_loss) / loss - 1))
            rows.append({"layer": layer, "subblock": subblock, "variant": variant, "kl": ours["kl"], "difference": difference, **floor})
    # Climbing is part of scoring, layers that the sample leaves out too. The parent's own pass is not: either way needs one.
    ours, flops = sum(scoring_s) + sum(climb_s), sum(row["flops"] for row in rows)
    moved = sum(row["bytes"] for row in rows)
    figures = {
        "parent": name, "dtype": options.dtype, "num_tokens": num_tokens, "variants": len(rows),
        "plain_s": sum(plain_s), "scoring_s": ours, "times_plain": sum(plain_s) / ours, "difference": max(r["difference"] for r in rows),
        "floor_s": flops / rate, "floor_bytes_s": moved / bandwidth, "utilisation": flops / rate / ours,
        "prepare_s": prepare_s, "climb_s": sum(climb_s), "median_kl": statistics.median(r["kl"] for r in rows),
        "flops": flops, "bytes": moved,
    }  # fmt: skip
    return figures, rows


def main(arguments: list[str] | None = None) -> list[dict]:
    device = pick_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", default="smollm2-135m,llama-3.2-1b" if on_gpu else "pico", help="of benchmarks/machine.py")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--tokens", type=int, default=32768 if on_gpu else 2048)
    parser.add_argument("--seq-len", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--batch-size", type=int, default=8 if on_gpu else 4)
    parser.add_argument("--layers", type=int, default=6, help="how many layers are sampled, evenly")
    parser.add_argument("--at-once", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--head-tokens", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--memory-gib", type=float, help="for what is held; default: as much as it takes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    options = parser.parse_args(arguments)
    rate = matmul_flops_per_s(device, torch.bfloat16 if on_gpu else getattr(torch, options.dtype))
    bandwidth = bytes_per_s(device)
    print(f"products {rate / 1e12:,.4g} TFLOP/s, copies {bandwidth / 1e9:,.4g} GB/s, both measured here", flush=True)
    asked, figures, details = {key: value for key, value in vars(options).items() if value is not None}, [], {}
    for name in options.parents.split(","):
        summary, details[name] = measure(name, options, device, rate, bandwidth)
        figures.append(summary)
        print(pd.Series(summary).to_string(float_format=lambda value: f"{value:,.4g}"), flush=True)
        results = {"asked": asked, "matmul_flops_per_s": rate, "bytes_per_s": bandwidth, "geometries": figures, "variants": details}
        print(f"written: {write_results('scoring', results, device)}", flush=True)
    return figures


if __name__ == "__main__":
    main()
