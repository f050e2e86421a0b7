"""Costs: what is measured, how differences become a table, and when a measurement is taken over."""
import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import PICO_FAMILIES, architecture, pico_parent, variants
from test_export import bpe

from benchmarks import costs as benchmark
from puzzle_core import constraints, costs, llama_cpp, plots, search, serving, tables, turns
from puzzle_core.children import make_child
from puzzle_core.problem import Problem
from puzzle_core.spec import ATTENTION, FFN, NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Architecture, Joint, Scenario, Solution, Variant, Workload
from puzzle_core.subblocks import resolve_space

SCENARIO = Scenario(2, 16, 6)
QUICK = costs.Torch(device="cpu", repeats=2, warmup=0, decode_contexts=2, decode_steps=1)
NOTHING = tables.read_known("costs")


def space_of(parent, attention=("kv1", "no_op"), ffn=("w80", "no_op")):
    return resolve_space({ATTENTION: list(attention), FFN: list(ffn)}, parent.model.config, parent.family)


def profile(parent, space, *scenarios, backend=QUICK, known=NOTHING):
    table, made = costs.profile(parent, space, list(scenarios), backend, known)
    return tables.check("costs", table), made


def test_costs_cover_the_space_and_sum_to_the_model(pico):
    space = space_of(pico)
    table, made = profile(pico, space, SCENARIO)
    value = table.set_index(["subblock", "variant", "metric"]).value
    expected = {(s, str(v)) for s, some in space.items() for v in some} | {(OUTSIDE, "parent")}
    assert set(zip(table.subblock, table.variant, strict=True)) == expected and made == len(expected)
    assert (value.xs(str(NO_OP), level="variant") == 0).all()
    blocks = 4 * sum(value[subblock, "parent", "num_params"] for subblock in space)
    assert value[OUTSIDE, str(PARENT), "num_params"] + blocks == sum(p.numel() for p in pico.model.parameters())
    assert value["attention", "kv1", "kv_bytes_per_token"] * 2 == value["attention", "parent", "kv_bytes_per_token"]
    assert costs.unsure(table.assign(spread=0.0, value=1.0)) == "" and "10 of 10 times" in costs.unsure(table.assign(spread=2.0, value=1.0))
    assert set(table.source[table.unit == "ms"]) == {"measured"} and (table.spread[table.unit == "ms"] > 0).any()


def test_differences_become_costs_whatever_the_machine_does_meanwhile():
    truth = {
        "prefill_ms": {"outside": 20.0, ATTENTION: 5.0, FFN: 10.0, "w": 4.0},
        "decode_ms": {"outside": 2.0, ATTENTION: 0.5, FFN: 1.0, "w": 0.4},
    }
    layers, slower, both = 4, (1.0, 3.0, 1.5), 0.2  # the machine is three times as slow in one turn; what two subblocks cost together

    def timed(subblock, variant):
        def total(metric, **replaced):
            named = {**{s: s for s in SUBBLOCKS}, **replaced}.values()
            block = sum(truth[metric].get(name, 0.0) for name in named) + both * ("nothing" not in named)
            return truth[metric]["outside"] + layers * block

        own, nothing = {subblock: variant}, {s: "nothing" for s in SUBBLOCKS if s != subblock}
        return [tuple({m: f * total(m, **some) for m in truth} for some in ({}, own, nothing, {**own, **nothing})) for f in slower]

    whole = tuple(range(layers))
    base = turns.base_times({whole: timed(ATTENTION, "nothing")})
    found = turns.times_of(timed(FFN, "w"), whole, FFN, base)
    for metric, expected in truth.items():
        scale = 1.5  # the median of the parent's turns
        for subblock in SUBBLOCKS:  # half of what they cost together is each one's
            assert base[whole, subblock, PARENT][metric][0] == pytest.approx(scale * (expected[subblock] + both / 2))
        assert base[(), OUTSIDE, PARENT][metric][0] == pytest.approx(scale * expected["outside"])
        assert found[metric] == pytest.approx((scale * (expected["w"] + both / 2), 0.0), abs=1e-9)


def test_a_larger_space_and_another_workload_measure_only_what_is_new(pico, monkeypatch):
    other = Scenario(1, 8, 4)
    first, _ = profile(pico, space_of(pico), SCENARIO)
    grown, made = profile(pico, space_of(pico, ffn=("w80", "w48", "no_op")), SCENARIO, known=first)
    assert made == 1
    kept = grown[grown.variant != "w48"].reset_index(drop=True)
    assert kept.equals(first)
    both, made = profile(pico, space_of(pico), SCENARIO, other, known=grown)
    assert made == 7 and set(both.scenario) == {"b2p16g6", "b1p8g4"} and both[both.scenario == "b2p16g6"].equals(first)
    alone, made = profile(pico, space_of(pico), other, known=both)
    assert made == 0 and set(alone.scenario) == {"b1p8g4"}
    geometry = pico_parent(intermediate_size=192)
    assert profile(geometry, space_of(geometry), SCENARIO, known=first)[1] == 7
    for changed in ({"repeats": 3}, {"warmup": 1}, {"decode_contexts": 1}, {"decode_steps": 2}):
        assert profile(pico, space_of(pico), SCENARIO, backend=replace(QUICK, **changed), known=first)[1] == 7
    monkeypatch.setattr(costs.Torch, "place", lambda self, parent: "another machine")
    assert profile(pico, space_of(pico), SCENARIO, known=first)[1] == 7


def test_a_killed_profile_keeps_the_variants_it_has(pico):
    kept = []

    def keep(table):
        kept.append(table)
        if len(table.groupby(["subblock", "variant"])) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        costs.profile(pico, space_of(pico), [SCENARIO], QUICK, NOTHING, keep)
    assert profile(pico, space_of(pico), SCENARIO, known=kept[-1])[1] == 1


def test_tokens_are_timed_at_several_context_lengths(pico, monkeypatch):
    asked = []
    monkeypatch.setattr(serving.Eager, "decode", lambda self, context, steps: asked.append((context, steps)) or [float(context)] * steps)
    session = serving.served(partial(nullcontext, pico.model), Scenario(1, 10, 13), "eager")
    assert costs.Torch(decode_contexts=3, decode_steps=2)._decode_ms(session, session.scenario) == (11 + 15 + 19) / 3
    assert asked == [(11, 2), (15, 2), (19, 2)]


@pytest.mark.parametrize("kind", ["eager", "static", "compile"])
def test_however_it_is_served_the_answer_is_the_same(pico, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what can be traced, without the minute of compiling
    chosen = architecture("no_op w80", "kv1 parent", "linear no_op", "parent linear")
    child = make_child(pico, chosen, variants(pico, tmp_path))
    opened = partial(nullcontext, child)
    session = serving.Eager(opened, SCENARIO) if kind == "eager" else serving.Static(opened, SCENARIO, compiled=kind == "compile")
    ids = session.ids_BT[:, :16]
    session.prefill()
    for step in range(5):
        ids = torch.cat([ids, session.token], 1)
        assert len(session.decode(16 + step, 1)) == 1
    with torch.no_grad():
        expected = child(input_ids=ids, use_cache=False).logits[:, 15:].argmax(-1)
    assert (torch.cat([ids[:, 16:], session.token], 1) == expected).all()
    assert session.kv_bytes() == 2 * 2 * 21 * 16 * 4 * (1 + 2)  # keys, values; two sequences of 21 tokens; 1 and 2 heads of 16 channels
    assert len(serving.request(session).steps_ms) == 5


def test_predicted_memory_is_what_the_child_takes(pico, tmp_path):
    chosen = architecture("no_op w80", "kv1 parent", "parent no_op", "parent w80")
    child = make_child(pico, chosen, variants(pico, tmp_path))
    found = serving.side_by_side({"child": child}, SCENARIO, "eager", repeats=1, warmup=0)["child"]
    value = profile(pico, space_of(pico), SCENARIO)[0].set_index(["subblock", "variant", "metric"]).value
    rows = [(OUTSIDE, "parent"), *((s, str(v)) for _, s, v in chosen.items())]
    params, kv = (sum(value[(*row, metric)] for row in rows) for metric in ("param_bytes", "kv_bytes_per_token"))
    assert found["memory_mib"] == pytest.approx((params + 2 * 21 * kv) / 2**20)


def test_what_cannot_be_served_is_refused_with_the_way_out():
    cpu = torch.device("cpu")
    assert serving.pick_serving("auto", cpu) == "eager" and serving.pick_serving("auto", torch.device("cuda")) == "cuda_graph"
    with pytest.raises(ValueError, match="Did you mean 'cuda_graph'"):
        serving.pick_serving("cuda_graphs", cpu)
    with pytest.raises(ValueError, match="the device is a CPU; use eager or compile"):
        serving.pick_serving("cuda_graph", cpu)
    with pytest.raises(ValueError, match="has no static KV cache in transformers.*serving: eager"):
        serving.Static(partial(nullcontext, pico_parent("gpt_neo").model), SCENARIO, compiled=False)
    with pytest.raises(ValueError, match="unknown key 'repeat' in hardware. Did you mean 'repeats'"):
        costs.backend({"backend": "torch", "repeat": 3})
    with pytest.raises(ValueError, match="hardware.backend is 'llamacpp'"):
        costs.backend({"backend": "llamacpp"})


def test_a_workload_lists_its_scenarios_once():
    assert Workload(8, 512, 128, ("b1p512g128", "b8p512g128")).scenarios == [Scenario(8, 512, 128), Scenario(1, 512, 128)]
    with pytest.raises(ValueError, match="'b1' is not a scenario id"):
        Workload(8, 512, 128, ("b1",)).scenarios  # noqa: B018


def roofline(**changes):
    rates = {"name": "a chip", "peak_tflops": {"bfloat16": 1.0, "fp8": 2.0}, "memory_gb_per_s": 10.0, "link_gb_per_s": 1.0}
    return costs.backend({"backend": "roofline", **rates, **changes})


def of(pico, backend):
    table, _ = profile(pico, space_of(pico), SCENARIO, backend=backend)
    return table.set_index(["subblock", "variant", "metric"]).value, table


def test_a_roofline_is_the_longer_of_arithmetic_and_memory(pico):
    value, table = of(pico, roofline())
    assert set(table.source[table.unit == "ms"]) == {"analytic"} and table.hardware[0].startswith("1 × a chip, roofline, bfloat16")
    weights, between = 3 * 64 * 160 * 2, 3 * 2 * (64 + 160) * 2  # bytes of the FFN's matrices, and of what two tokens bring and take
    assert value["ffn", "parent", "decode_ms"] == pytest.approx(1e3 * (weights + between + 4 * 2 * 64 * 2) / 10e9)
    assert value["ffn", "no_op", "decode_ms"] == 0 < value["ffn", "w80", "decode_ms"] < value["ffn", "parent", "decode_ms"]
    assert value["attention", "kv1", "kv_bytes_per_token"] == 2 * 16 * 2 == value["attention", "parent", "kv_bytes_per_token"] / 2
    slow, _ = of(pico, roofline(peak_tflops={"bfloat16": 1e-6, "fp8": 2e-6}, memory_gb_per_s=1e9))
    assert slow["ffn", "parent", "prefill_ms"] == pytest.approx(1e3 * 2 * 32 * 3 * 64 * 160 / 1e6)


def test_a_roofline_knows_fp8_and_several_devices(pico):
    (one, _), (fp8, _) = of(pico, roofline()), of(pico, roofline(dtype="fp8", kv_dtype="fp8"))
    assert fp8["ffn", "parent", "param_bytes"] == one["ffn", "parent", "param_bytes"] / 2
    assert fp8["attention", "parent", "kv_bytes_per_token"] == one["attention", "parent", "kv_bytes_per_token"] / 2
    assert one["outside", "parent", "decode_ms"] - fp8["outside", "parent", "decode_ms"] == pytest.approx(1e3 * 64 * 320 / 10e9)
    two, _ = of(pico, roofline(num_devices=2))
    shared = one["ffn", "parent", "decode_ms"] - 1e3 * 4 * 2 * 64 * 2 / 10e9  # norm and residual are everywhere
    joined = 1e3 * 2 * (1 - 1 / 2) * 2 * 64 * 2 / 1e9
    assert two["ffn", "parent", "decode_ms"] == pytest.approx(one["ffn", "parent", "decode_ms"] - shared / 2 + joined)
    with pytest.raises(ValueError, match="link_gb_per_s of a chip is not known"):
        roofline(num_devices=2, link_gb_per_s=None)
    with pytest.raises(ValueError, match="hardware.dtype is 'float8'.*Known of a chip: bfloat16, fp8"):
        roofline(dtype="float8")
    with pytest.raises(ValueError, match="hardware lacks name, peak_tflops, memory_gb_per_s"):
        costs.backend({"backend": "roofline"})


def a_solution(hardware):
    totals = {"latency_ms": 10.0, "throughput_tokens_per_s": 1200.0, "memory_mib": 0.5}
    proof = {"score": 0.2, "bound": 0.2, "status": "optimal", "seconds": 0.0, "constraints": ()}
    priced = {"totals": totals, "parent_totals": totals, "source": "measured", "hardware": hardware}
    found = Solution(Architecture.uniform(4), SCENARIO, "kl", **proof, **priced)
    assert Solution.from_json(found.to_json()) == found and found.to_json()["source"] == "measured"
    return found


def test_costs_of_another_machine_are_named_beside_this_one(pico, capsys):
    serving.warn_if_elsewhere(a_solution(QUICK.place(pico)), pico.model, "auto")
    assert capsys.readouterr().err == ""
    serving.warn_if_elsewhere(a_solution("NVIDIA H200, cuda_graph, bfloat16"), pico.model, "auto")
    warning = capsys.readouterr().err
    assert "measured costs of NVIDIA H200, cuda_graph, bfloat16" in warning and QUICK.place(pico) in warning
    assert "dvc repro --force profile-hardware" in warning


def test_predicted_against_realised_is_drawn_where_both_are_known(tmp_path):
    drawn = []
    for known in ({}, {"speedup": 1.1, "memory_mib": 0.5, "kl": 0.3}):
        plots.predicted_picture(a_solution("here"), {"parent": {**known, "kl": 0.0}, "child": known}, tmp_path / "picture.png")
        drawn.append((tmp_path / "picture.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in drawn) and drawn[0] != drawn[1]


def test_llama_cpp_is_timed_with_what_it_can_load(capsys):
    parent = replace(pico_parent(head_dim=32, num_hidden_layers=6), tokenizer=bpe())
    space = space_of(parent, attention=("kv1", "linear", "no_op"))
    backend = costs.backend({"backend": "llama_cpp", "num_layers": 3, "repeats": 1, "warmup": 0})
    table, made = profile(parent, space, Scenario(1, 16, 4), backend=backend)
    value = table.set_index(["subblock", "variant", "metric"]).value
    assert "no costs of attention linear: gguf has no form for it" in capsys.readouterr().err
    assert ("attention", "linear", "decode_ms") not in value.index and made == 7 and "llama.cpp" in table.hardware[0]
    blocks = 6 * sum(value[s, "parent", "num_params"] for s in SUBBLOCKS)
    assert value["outside", "parent", "num_params"] + blocks == sum(p.numel() for p in parent.model.parameters())
    assert value["attention", "parent", "kv_bytes_per_token"] == 2 * 2 * 32 * 2 == 2 * value["attention", "kv1", "kv_bytes_per_token"]
    assert (value.xs("decode_ms", level="metric") > 0).any()
    with pytest.raises(ValueError, match="times one sequence at a time"):
        profile(parent, space, SCENARIO, backend=backend)


def test_the_benchmark_compares_children_with_their_predictions(capsys):
    found = benchmark.compare("pico", torch.device("cpu"), Scenario(1, 8, 4), "pico", QUICK, requests=1)
    assert len(found["architectures"]) >= 8 and found["error"]["memory_mib"]["worst"] < 1e-9
    for row in found["architectures"].values():
        assert row["latency_ms"]["error"] == row["latency_ms"]["predicted"] / row["latency_ms"]["realised"] - 1
    assert "pico memory_mib: median error 0.0%, worst 0.0% (5 %, 10 %: met)" in capsys.readouterr().out


def test_a_request_of_n_tokens_is_one_prefill_and_n_minus_one_steps(pico, monkeypatch):
    monkeypatch.setattr(serving.Eager, "prefill", lambda self: 10.0)
    monkeypatch.setattr(serving.Eager, "decode", lambda self, context, steps: [2.0] * steps)
    at = Scenario(2, 16, 6)
    problem = Problem.from_tables(parent_scores(pico), profile(pico, {ATTENTION: [], FFN: []}, at)[0], "kl", str(at))
    asked = serving.request(serving.served(partial(nullcontext, pico.model), at, "eager"))
    assert 1 + len(asked.steps_ms) == 6 and asked.latency_ms == 10 + 5 * 2
    assert problem.parent_totals["latency_ms"] == pytest.approx(asked.latency_ms)
    assert problem.parent_totals["throughput_tokens_per_s"] == pytest.approx(2 * 6 / 0.020)
    assert (asked.latency_ms - asked.prefill_ms) / (6 - 1) == asked.decode_ms  # time per output token, as serving benchmarks have it


def test_a_request_of_one_token_has_no_decode_step(pico):
    at = Scenario(2, 16, 1)
    problem = Problem.from_tables(parent_scores(pico), profile(pico, {ATTENTION: [], FFN: []}, at)[0], "kl", str(at))
    assert problem.parent_totals["decode_ms"] == 0 and problem.parent_totals["latency_ms"] == problem.parent_totals["prefill_ms"] > 0
    for kind in ("eager", "compile"):
        asked = serving.request(serving.served(partial(nullcontext, pico.model), at, kind))
        assert asked.steps_ms == [] and asked.decode_ms == 0 and asked.kv_bytes == problem.parent_totals["kv_mib"] * 2**20


def test_the_request_generates_what_it_is_said_to(pico, monkeypatch):
    fed = []
    monkeypatch.setattr(pico.model, "forward", lambda *a, f=pico.model.forward, **kw: fed.append(kw["input_ids"].shape[1]) or f(*a, **kw))
    serving.request(serving.Eager(partial(nullcontext, pico.model), Scenario(1, 7, 4)))
    assert fed[:4] == [7, 1, 1, 1]


def test_llama_cpp_pays_for_n_minus_one_steps():
    timings = {"prompt_n": 16, "predicted_n": 5, "prompt_ms": 10.0, "predicted_ms": 8.0, "predicted_per_token_ms": 1.6}
    server = SimpleNamespace(handle_completions=lambda request: {"timings": timings})
    assert llama_cpp._request(server, Scenario(1, 16, 5), 300) == {"prefill_ms": 10.0, "decode_ms": 2.0}


def test_a_roofline_averages_over_the_contexts_of_the_decode_steps(pico):
    slow = roofline(peak_tflops={"bfloat16": 1e9}, memory_gb_per_s=1.0)
    at = {n: profile(pico, space_of(pico), Scenario(1, 10, n), backend=slow)[0] for n in (2, 8)}
    decode = {n: t.set_index(["subblock", "variant", "metric"]).value["attention", "parent", "decode_ms"] for n, t in at.items()}
    of_token = 2 * 2 * 16 * 2  # keys and values of 2 heads of 16 channels in bfloat16; the steps attend to 11, and to 11 to 17 tokens
    assert decode[8] - decode[2] == pytest.approx(1e3 * (14 - 11) * of_token / 1e9)


FAMILIES_WITH_CACHES = sorted({"llama", *PICO_FAMILIES})
SIZES_ONLY = {"name": "none", "peak_tflops": {"float32": 1.0}, "memory_gb_per_s": 1.0, "dtype": "float32", "kv_dtype": "float32"}


def parent_scores(parent, space=None):
    """A score of 0 for the parent's own, 0.1 for every other variant of `space` in every layer."""
    options = {s: dict.fromkeys([PARENT, *(space or {}).get(s, [])]) for s in SUBBLOCKS}
    common = {"metric": "kl", "num_tokens": 1, "fingerprint": ""}
    rows = [
        {**common, "layer": layer, "subblock": s, "variant": str(v), "value": 0.0 if v == PARENT else 0.1}
        for layer in range(len(parent.layers))
        for s in SUBBLOCKS
        for v in options[s]
    ]
    return tables.check("scores", pd.DataFrame(rows))


@pytest.mark.parametrize("family", FAMILIES_WITH_CACHES)
def test_predicted_kv_bytes_are_those_of_the_childs_cache_to_the_byte(family, tmp_path):
    parent = pico_parent(family)
    texts = [f"{kind}" for kind in ("kv1", "window5", "window7") if kind.rstrip("157") in parent.family.size_keys]
    space = resolve_space({ATTENTION: [*texts, "linear", "no_op"], FFN: ["no_op"]}, parent.model.config, parent.family)
    table, _ = profile(parent, space, Scenario(1, 4, 2), backend=costs.backend({"backend": "roofline", **SIZES_ONLY}))
    problem = Problem.from_tables(parent_scores(parent, space), table, "kl", "b1p4g2")
    draw = random.Random(family)
    for number in range(3):
        chosen = Architecture(tuple((draw.choice(space[ATTENTION]), PARENT) for _ in parent.layers))
        child = make_child(parent, chosen, variants(parent, tmp_path))
        for at in (Scenario(1, 1, 1), Scenario(2, 7, 3), Scenario(1 + number, 8, 5), Scenario(1, 10, 20)):
            predicted = problem.total("kv_mib", problem.rows_of(chosen), at) * 2**20
            sessions = [serving.Eager(partial(nullcontext, child), at)]
            if child._can_compile_fullgraph:
                sessions.append(serving.Static(partial(nullcontext, child), at, compiled=False))
            for session in sessions:
                assert serving.request(session).kv_bytes == predicted, (type(session).__name__, at, chosen.to_json())


def test_a_kv_limit_holds_in_a_parent_whose_layers_differ(tmp_path):
    """Gemma 3 has 5 sliding layers in 6, so its full layers hold nearly all of a long context's cache."""
    types = ["sliding_attention"] * 5 + ["full_attention"]
    parent = pico_parent("gemma3_text", num_hidden_layers=6, layer_types=types)
    space = resolve_space({ATTENTION: ["no_op", "kv1"], FFN: []}, parent.model.config, parent.family)
    at = Scenario(1, 190, 3)
    table, _ = profile(parent, space, at, backend=costs.backend({"backend": "roofline", **SIZES_ONLY}))
    assert set(table.loc[table.subblock == ATTENTION, "layer"]) == set(range(6))
    problem = Problem.from_tables(parent_scores(parent, space), table, "kl", str(at))
    (found,) = search.search(problem, {"kv_fraction": 0.5}, search.Settings())
    child = make_child(parent, found.architecture, variants(parent, tmp_path))
    held, whole = (serving.Eager(partial(nullcontext, model), at).kv_bytes() for model in (child, parent.model))
    assert found.status == "optimal" and held / whole <= 0.5 and found.totals["kv_mib"] * 2**20 == held
    assert whole == 2 * 2 * 24 * 4 * (5 * 12 + 192)  # keys, values; 2 heads of 24 channels in float32; windows of 12 tokens


def test_a_window_costs_what_it_holds_at_any_context():
    parent = pico_parent("mistral", num_key_value_heads=4, head_dim=64, sliding_window=None, max_position_embeddings=8192)
    space = resolve_space({ATTENTION: ["window64"], FFN: []}, parent.model.config, parent.family)
    table, _ = profile(parent, space, Scenario(1, 80, 16), backend=costs.backend({"backend": "roofline", **SIZES_ONLY}))
    problem = Problem.from_tables(parent_scores(parent, space), table, "kl", "b1p80g16")
    rows = problem.rows_of(Architecture.uniform(3, Variant("window", 64)))
    limits = {"kv_mib": [{"at_most": 1, "context_len": context} for context in (32, 8192)]}
    held = [constraints.reached(limit, problem, rows) / 3 for limit in constraints.constraints_from(limits, problem)]
    assert held == [0.0625, 0.125]  # 2,048 bytes a token of a layer, of 32 tokens and of the window's 64


def test_layers_that_differ_are_timed_apart(monkeypatch):
    parent = pico_parent("gemma3_text")  # sliding, full, sliding
    price = {"sliding": 2.0, "full": 5.0, "kv1": 1.0, "ffn": 3.0}
    original = [{s: parent.module(layer, s) for s in SUBBLOCKS} for layer in range(3)]

    def times(self, session, scenario):
        total = 7.0
        with session.opened():
            for layer, own in enumerate(original):
                for subblock in SUBBLOCKS:
                    module = parent.module(layer, subblock)
                    if module is own[subblock]:
                        total += price["ffn" if subblock == FFN else "full" if layer == 1 else "sliding"]
                    elif not type(module).__name__.startswith("NoOp"):
                        total += price["kv1"] * (1 + (layer == 1))
        return {"prefill_ms": total, "decode_ms": total / 10}

    monkeypatch.setattr(costs.Torch, "_times", times)
    table, made = profile(parent, resolve_space({ATTENTION: ["kv1"], FFN: []}, parent.model.config, parent.family), SCENARIO)
    value = table.set_index(["layer", "subblock", "variant", "metric"]).value
    for layer, expected in enumerate([2.0, 5.0, 2.0]):
        assert value[layer, "attention", "parent", "prefill_ms"] == pytest.approx(expected)
        assert value[layer, "attention", "kv1", "decode_ms"] == pytest.approx(0.1 * (1 + (layer == 1)))
        assert value[layer, "ffn", "parent", "prefill_ms"] == pytest.approx(3.0)
    assert value[-1, "outside", "parent", "prefill_ms"] == pytest.approx(7.0) and made == 2 * 5 + 1
    assert profile(parent, resolve_space({ATTENTION: ["kv1"], FFN: []}, parent.model.config, parent.family), SCENARIO, known=table)[1] == 0


def test_a_joint_block_keeps_the_window_of_its_attention():
    parent = pico_parent("gemma3_text")  # sliding, full, sliding, with windows of 12
    space = resolve_space({ATTENTION: ["window5"], FFN: ["no_op"]}, parent.model.config, parent.family)
    table, _ = profile(parent, space, Scenario(1, 4, 2), backend=costs.backend({"backend": "roofline", **SIZES_ONLY}))
    rows = [("parent+parent", 0.0), ("window5+no_op", 0.1)]
    common = {"subblock": "block", "metric": "kl", "num_tokens": 1, "fingerprint": ""}
    blocks = [{**common, "layer": layer, "variant": v, "value": score} for layer in range(3) for v, score in rows]
    scores = pd.concat([parent_scores(parent, space).query("layer == 1"), pd.DataFrame(blocks)], ignore_index=True)
    problem, at = Problem.from_tables(tables.check("scores", scores), table, "kl", "b1p4g2"), Scenario(1, 4000, 97)
    share_O, _ = problem.shares("kv_mib", at)
    held = {option: share * 2**20 / (2 * 2 * 24 * 4) for option, share in zip(problem.options, share_O, strict=True)}
    parents, windows = (Joint(a, f) for a, f in ((PARENT, PARENT), (Variant("window", 5), NO_OP)))
    assert [held[layer, "block", parents] for layer in range(3)] == [12, 4096, 12]
    assert [held[layer, "block", windows] for layer in range(3)] == [5, 5, 5]
    own = table.query("variant == 'window5' and layer == 0").assign(subblock="block", variant="window5+no_op")
    whole = pd.concat([table, own[own.metric != "kv_window"]], ignore_index=True)  # a row of the block's own, without a window
    share_O, _ = Problem.from_tables(scores, tables.check("costs", whole), "kl", "b1p4g2").shares("kv_mib", at)
    assert share_O[problem.options.index((0, "block", windows))] * 2**20 == 4096 * 2 * 2 * 24 * 4


def test_latencies_that_stand_side_by_side_have_the_ratio_of_the_speed_up(pico, monkeypatch):
    drift = iter([3.0, 1.0, 4.0, 1.0, 2.0, 6.0])  # of a machine that others share: child, parent; parent, child; child, parent
    monkeypatch.setattr(serving, "request", lambda session: serving.Request(10.0 * next(drift), [1.0], 8))
    found = serving.side_by_side({"parent": pico.model, "child": pico.model}, SCENARIO, "eager", repeats=3, warmup=0)
    pair = [found[name]["latency_ms"] for name in ("parent", "child")]
    assert pair == [61.0, 21.0] and found["child"]["speedup"] == 61 / 21 and found["parent"]["speedup"] == 1.0
