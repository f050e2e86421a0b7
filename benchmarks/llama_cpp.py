"""A child of the embedded parent in llama.cpp: tokens/s beside the parent's, in one process, in turn.

    python -m benchmarks.llama_cpp                  # about a minute; writes docs/results/llama_cpp.json
    python -m benchmarks.llama_cpp data/distilled   # the pipeline's own child in place of the one made here

The child made here is an architecture by hand with weights from surgery alone, neither refitted nor distilled: it shows speed,
and that llama.cpp computes what the checkpoint computes, not quality. Both files are float16. The floor of a generated token is
the time to read its weights and KV cache once, at the bandwidth that this run measures on as many threads.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
import xllamacpp
import yaml
from safetensors.torch import save_file

from benchmarks.demo import ROOT, machine, save_result
from puzzle_core import export_gguf
from puzzle_core.children import load_child, make_child, save_child
from puzzle_core.export import SavedChild
from puzzle_core.parents import Parent, load_parent
from puzzle_core.spec import ATTENTION, NO_OP, PARENT, Architecture, Variant
from puzzle_core.subblocks import build_subblock
from puzzle_core.surgery import Basis, initialise

PROMPT = (ROOT / "README.md").read_text().split("\n\n")[5]
NUM_GENERATED, ROUNDS, NUM_COMPARED = 64, 5, 16
THREADS = len(os.sched_getaffinity(0))


def by_hand(num_layers: int) -> Architecture:
    """Two layers at either end stay whole; between them heads, widths and skipped subblocks take turns."""
    w1152, w768, kv1 = Variant("w", 1152), Variant("w", 768), Variant("kv", 1)
    turns = [(NO_OP, w1152), (PARENT, w768), (kv1, w768), (NO_OP, PARENT), (kv1, NO_OP)]
    inner = [turns[layer % len(turns)] for layer in range(num_layers - 4)]
    return Architecture(tuple([(PARENT, PARENT)] * 2 + inner + [(PARENT, PARENT)] * 2))


def surgical_weights(parent: Parent, directory: Path):
    def weights_of(layer: int, subblock: str, variant: Variant) -> tuple[Path, str]:
        module, whole = build_subblock(parent, layer, subblock, variant), parent.module(layer, subblock)
        importance = None if subblock == ATTENTION else whole.down_proj.weight.norm(dim=0)
        initialise(whole, module, parent.family.subblock(subblock), variant, Basis(importance))
        path = directory / f"{layer}-{subblock}.safetensors"
        save_file(module.state_dict(), path)
        return path, ""

    return weights_of


def serve(path: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.verbosity, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 0, THREADS, THREADS
    return xllamacpp.Server(params)


def request(server: xllamacpp.Server, **options) -> dict:
    return server.handle_completions({"prompt": PROMPT, "temperature": 0, "cache_prompt": False, **options})


def step_ms(timings: dict) -> float:
    """One decode step: llama.cpp's clock starts with the first token, which prefill gives."""
    return timings["predicted_ms"] / (timings["predicted_n"] - 1)


def bytes_per_token(path: Path, num_tokens: int) -> int:
    """What a generated token must read: every matrix (a tied embedding as the LM head) and the KV cache at half way."""
    file = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    kv_channels = sum(int(t.shape[1]) for name, t in tensors.items() if name.endswith(("attn_k.weight", "attn_v.weight")))
    return sum(int(t.n_bytes) for t in tensors.values()) + 2 * kv_channels * num_tokens


def bandwidth_bytes_per_s() -> float:
    """Best of five readings of 512 MiB."""
    torch.set_num_threads(THREADS)
    buffer, seconds = torch.ones(1 << 27), []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / min(seconds)


@torch.no_grad()
def agreement(server: xllamacpp.Server, checkpoint: Path, tokenizer) -> dict[str, float]:
    """llama.cpp's next token against the checkpoint's in transformers, float32, along the checkpoint's greedy continuation."""
    model = load_child(checkpoint, torch.float32, torch.device("cpu"))
    ids, num_prompt = tokenizer(PROMPT).input_ids, len(tokenizer(PROMPT).input_ids)
    ids = model.generate(torch.tensor([ids]), max_new_tokens=NUM_COMPARED, do_sample=False, eos_token_id=None)
    logprobs_TV = model(ids).logits[0].log_softmax(-1)
    any_text = [[tokenizer("a").input_ids[0], 1000]]  # the token that is taken; the log-probabilities are the model's own
    differences, same = [], 0
    for position in range(num_prompt, num_prompt + NUM_COMPARED):
        prompt, expected = ids[0, :position].tolist(), logprobs_TV[position - 1]
        answer = request(server, prompt=prompt, n_predict=1, n_probs=100, cache_prompt=True, logit_bias=any_text)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        differences += [abs(entry["logprob"] - expected[entry["id"]].item()) for entry in top]
        same += top[0]["id"] == expected.argmax().item()
    return {
        "positions": NUM_COMPARED,
        "same_top_token": same,
        "mean_difference_of_top_100_logprobs": statistics.mean(differences),
        "largest_difference": max(differences),
    }


def measure(files: dict[str, Path]) -> dict[str, dict]:
    """Median times of requests to each model in turn, and their floors."""
    servers, bandwidth = {name: serve(path) for name, path in files.items()}, bandwidth_bytes_per_s()
    timings = {name: [] for name in files}
    for turn in range(ROUNDS + 1):
        for name, server in servers.items():
            answer = request(server, n_predict=NUM_GENERATED, ignore_eos=True)["timings"]
            if turn:  # the first warms up
                timings[name].append(answer)
    rows = {}
    for name, path in files.items():
        runs = timings[name]
        read = bytes_per_token(path, runs[0]["prompt_n"] + NUM_GENERATED // 2)
        decode_ms = statistics.median(step_ms(run) for run in runs)
        rows[name] = {
            "params_in_file": sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors),
            "file_mib": path.stat().st_size / 2**20,
            "read_mib_per_token": read / 2**20,
            "floor_ms_per_token": 1000 * read / bandwidth,
            "ms_per_token": decode_ms,
            "times_floor": decode_ms / (1000 * read / bandwidth),
            "fastest_ms_per_token": min(map(step_ms, runs)),
            "tokens_per_s": 1000 / decode_ms,
            "prompt_tokens_per_s": statistics.median(run["prompt_per_second"] for run in runs),
            "prompt_tokens": runs[0]["prompt_n"],
        }
    pairs = zip(timings["parent"], timings["child"], strict=True)  # of one turn: what else the machine does, does to both
    speedups = [step_ms(parent) / step_ms(child) for parent, child in pairs]
    return {
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "load_average": os.getloadavg()[0],
        "speedups": speedups,
        "speedup": statistics.median(speedups),
        "models": rows,
    }


def table(rows: dict[str, dict]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:,.2f}" if isinstance(row[c], float) else f"{row[c]:,}" for c in columns) + " |")
    return "\n".join(lines)


def main(checkpoint: str | None = None) -> None:
    parent = load_parent(**yaml.safe_load((ROOT / "conf/parent/smollm2-135m.yaml").read_text()))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        save_child(parent.model, parent.tokenizer, work / "parent")
        if checkpoint is None:
            made = make_child(parent, by_hand(len(parent.layers)), surgical_weights(parent, work))
            save_child(made, parent.tokenizer, work / "child")
        saved = {"parent": work / "parent", "child": Path(checkpoint) if checkpoint else work / "child"}
        files = {name: work / f"{name}.gguf" for name in saved}
        for name, path in saved.items():
            export_gguf.write(SavedChild.read(path), files[name], "float16")
        result = {
            "command": " ".join(["python -m benchmarks.llama_cpp", *filter(None, [checkpoint])]),
            "machine": machine(),
            "threads": THREADS,
            "versions": {name: version(name) for name in ("xllamacpp", "gguf", "torch", "transformers")},
            "child": "weights from surgery alone, neither refitted nor distilled" if checkpoint is None else checkpoint,
            "architecture": [f"{attention} {ffn}" for attention, ffn in SavedChild.read(saved["child"]).architecture.layers],
            "generated_tokens": NUM_GENERATED,
            "rounds": ROUNDS,
            **measure(files),
            "agreement": {name: agreement(serve(files[name]), saved[name], parent.tokenizer) for name in files},
        }
    print(table(result["models"]))
    print(
        f"tokens/s of the child over the parent's: {result['speedup']:.2f}, median of {ROUNDS} turns "
        f"({min(result['speedups']):.2f} to {max(result['speedups']):.2f}); "
        f"{THREADS} threads read {result['bandwidth_gb_per_s']:.1f} GB/s; "
        f"load average {result['load_average']:.1f}"
    )
    print(json.dumps(result["agreement"]))
    save_result("llama_cpp", result)


if __name__ == "__main__":
    main(*sys.argv[1:])
