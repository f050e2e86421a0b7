"""Costs: what is measured, how differences become a table, and when a measurement is taken over."""
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import architecture, pico_parent, variants
from test_export import bpe

from benchmarks import costs as benchmark
from puzzle_core import costs, plots, serving, tables, turns
from puzzle_core.children import make_child
from puzzle_core.spec import ATTENTION, FFN, NO_OP, OUTSIDE, PARENT, SUBBLOCKS, Architecture, Scenario, Solution, Workload
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

    base = turns.base_times(timed(ATTENTION, "nothing"), layers, layers)
    found = turns.times_of(timed(FFN, "w"), FFN, base, layers, layers)
    for metric, expected in truth.items():
        scale = 1.5  # the median of the parent's turns
        for subblock in SUBBLOCKS:  # half of what they cost together is each one's
            assert base[subblock, PARENT][metric][0] == pytest.approx(scale * (expected[subblock] + both / 2))
        assert base[OUTSIDE, PARENT][metric][0] == pytest.approx(scale * expected["outside"])
        assert found[metric] == pytest.approx((scale * (expected["w"] + both / 2), 0.0), abs=1e-9)


def test_a_larger_space_and_another_workload_measure_only_what_is_new(pico):
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
    again = costs.Torch(device="cpu", repeats=3, warmup=0, decode_contexts=2, decode_steps=1)
    assert profile(pico, space_of(pico), SCENARIO, backend=again, known=first)[1] == 7


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
    session = serving.served(partial(nullcontext, pico.model), Scenario(1, 10, 12), "eager")
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
    assert session.kv_bytes() == 2 * 2 * 22 * 16 * 4 * (1 + 2)  # keys, values; two sequences of 22 tokens; 1 and 2 heads of 16 channels
    assert len(serving.request(session).steps_ms) == 6


def test_predicted_memory_is_what_the_child_takes(pico, tmp_path):
    chosen = architecture("no_op w80", "kv1 parent", "parent no_op", "parent w80")
    child = make_child(pico, chosen, variants(pico, tmp_path))
    found = serving.side_by_side({"child": child}, SCENARIO, "eager", repeats=1, warmup=0)["child"]
    value = profile(pico, space_of(pico), SCENARIO)[0].set_index(["subblock", "variant", "metric"]).value
    rows = [(OUTSIDE, "parent"), *((s, str(v)) for _, s, v in chosen.items())]
    params, kv = (sum(value[(*row, metric)] for row in rows) for metric in ("param_bytes", "kv_bytes_per_token"))
    assert found["memory_mib"] == pytest.approx((params + 2 * 22 * kv) / 2**20)


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
    for known in ({}, {"latency_ms": 12.0, "memory_mib": 0.5, "kl": 0.3}):
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
