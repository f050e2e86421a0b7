"""Initialisation, training, scoring and healing do what their formulas say, on the pico parent."""
import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EXCERPT, PICO_CONFIG, architecture, variants
from safetensors.torch import load_file
from torch import nn

from benchmarks import bld as benchmark
from benchmarks import demo
from puzzle_core import bld, costs, coupling, evaluation, gkd, learners, quality, realised, scoring, search, surgery, tables, windows
from puzzle_core.children import load_child, make_child, save_child, verify_reload
from puzzle_core.corpus import Corpus
from puzzle_core.parents import load_parent
from puzzle_core.plan import plan
from puzzle_core.problem import Problem
from puzzle_core.schedule import lr_factor
from puzzle_core.spec import FFN, PARENT, SUBBLOCKS, Architecture, Joint, Scenario, Variant
from puzzle_core.subblocks import build_subblock, load_weights, resolve_layers, resolve_space, swapped

SETTINGS = bld.Settings(64, 4, 1024, 2048, 512, [0.01, 0.1], 1e-3, 0.1, 0.0, 1.0)
SCORE = scoring.Settings(256, 64, 4, ["kl", "lm_loss"])
NO_ROWS = pd.DataFrame(columns=list(tables.SCHEMAS["scores"].columns))
SPACE = {"attention": ["kv1", "linear", "no_op"], "ffn": ["w80", "linear", "no_op"]}


@pytest.fixture(scope="session")
def corpus(pico) -> Corpus:
    return Corpus(pico.tokenizer, EXCERPT)


@pytest.fixture(scope="session")
def library(pico, corpus, tmp_path_factory):
    blocks = tmp_path_factory.mktemp("library") / "blocks"
    jobs = bld.jobs(pico, resolve_layers(SPACE, pico.model.config, pico.family), SETTINGS, 0, corpus)
    table, _ = bld.train_library(pico, jobs, corpus, SETTINGS, 0, blocks)
    return tables.check("library", table), blocks, jobs


def ridge(last: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor, strengths: list[float]) -> float:
    fitting, held_out = surgery.RidgeStatistics(last), surgery.RidgeStatistics(last)
    for part, statistics in ((slice(0, 100), fitting), (slice(100, 300), fitting), (slice(300, None), held_out)):
        statistics.add(inputs[part], targets[part])
    return surgery.refit(last, fitting, held_out, strengths)


def test_ridge_with_a_weak_prior_is_least_squares_and_with_a_strong_one_the_prior():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(400, 12, generator=generator), torch.randn(400, 5, generator=generator)
    for strength in (1e-9, 1e9):
        last = nn.Linear(12, 5, bias=False)
        expected = torch.linalg.lstsq(inputs, targets).solution.T if strength < 1 else last.weight.detach().clone()
        ridge(last, inputs, targets, [strength])
        torch.testing.assert_close(last.weight.detach(), expected, atol=1e-4, rtol=1e-4)


def test_ridge_fits_the_bias_where_there_is_one():
    inputs, weight, bias = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)), torch.randn(3, 6), torch.randn(3)
    last = nn.Linear(6, 3)
    assert ridge(last, inputs, inputs @ weight.T + bias, [1e3, 1e-10]) == 1e-10  # the one that fits held-out tokens
    torch.testing.assert_close(last.weight.detach(), weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(last.bias.detach(), bias, atol=1e-3, rtol=1e-3)


def test_ridge_is_as_strong_as_held_out_tokens_ask_for_and_in_proportion_to_the_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs, noise = torch.randn(400, 250, generator=generator), torch.randn(400, 3, generator=generator)
    fitted = []
    for scale in (1.0, 100.0):
        last = nn.Linear(250, 3, bias=False)
        last.weight.data.zero_()
        assert ridge(last, scale * inputs, noise, [1e-6, 10.0]) == 10.0  # 300 tokens of noise fit 250 weights, and held-out ones do not
        fitted.append(scale * last.weight.detach())
    torch.testing.assert_close(*fitted)


def test_the_error_of_a_fit_is_its_normalised_square_error():
    inputs, targets, weight = torch.randn(50, 6), torch.randn(50, 3), torch.randn(6, 3)
    statistics = surgery.RidgeStatistics(nn.Linear(6, 3, bias=False))
    statistics.add(inputs, targets)
    expected = learners.normalised_mse(inputs @ weight, targets).item()
    assert statistics.error(weight.double()) == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss_of_most_variants_and_no_op_is_one(library):
    table = library[0].set_index(["layer", "subblock", "variant"])
    trained = table[table.num_tokens > 0]
    assert len(trained) == 8 and (trained.loss_after < trained.loss_before).mean() > 0.7
    assert (table.xs("parent", level="variant")[["loss_before", "loss_after"]] == 0).all(None)
    np.testing.assert_allclose(table.xs("no_op", level="variant").loss_after, 1.0)
    assert (table.xs("linear", level="variant").loss_after < 1).all()


def test_refitting_lowers_the_loss(pico, corpus, library, tmp_path):
    bare = bld.Settings(64, 4, 1024, 0, 512, None, 1e-3, 0.1, 0.0, 1.0)
    jobs = bld.jobs(pico, [{FFN: [Variant("w", 80)]}] * 4, bare, 0, corpus)
    unfitted, _ = bld.train_library(pico, jobs, corpus, bare, 0, tmp_path / "blocks")
    fitted = library[0].query("variant == 'w80'")
    assert (fitted.loss_before.to_numpy() < unfitted.loss_after.to_numpy()).all()


def test_the_order_of_removal_is_the_one_found_by_trying_every_channel():
    generator = torch.Generator().manual_seed(0)  # of few causes, so that what is gone before counts
    inputs, last = torch.randn(40, 3, generator=generator) @ torch.randn(3, 7, generator=generator), torch.randn(5, 7, generator=generator)
    order = surgery.removal_order((inputs.T @ inputs) * (last.T @ last)).tolist()
    whole, left = inputs @ last.T, list(range(7))
    for rank in range(7):
        errors = {gone: (inputs[:, kept := [i for i in left if i != gone]] @ last[:, kept].T - whole).square().sum() for gone in left}
        least = min(errors, key=errors.get)
        assert order[least] == rank
        left.remove(least)


@torch.no_grad()
def test_a_channel_matters_by_what_it_adds_or_by_all_its_weights(pico):
    ffn, batches = copy.deepcopy(pico.module(0, FFN)), torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    ffn.down_proj.weight.mul_(torch.linspace(0.1, 2, 160))
    inner = ffn.act_fn(ffn.gate_proj(batches)) * ffn.up_proj(batches)
    weights = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T], dim=1)
    columns = ffn.down_proj.weight.square().sum(0).sqrt()
    expected = {"contribution": inner.abs().mean((0, 1)) * columns, "weight_norm": weights.square().sum(1).sqrt()}
    for channels, importance in expected.items():
        with surgery.watch_ffn(ffn, pico.family.ffn, channels) as seen:
            for batch in batches:
                ffn(batch)
        torch.testing.assert_close(surgery.importance(seen, ffn, pico.family.ffn, channels, "0"), importance)


def test_each_initialisation_is_named_and_another_remakes_only_what_it_is_for(pico, corpus, tmp_path):
    bare = replace(SETTINGS, train_tokens=0, ridge=None)
    space, losses = {FFN: [Variant("w", 80), Variant("linear")], "attention": [Variant("kv", 1)]}, {}
    for channels in surgery.CHANNELS:
        settings = replace(bare, channels=channels)
        table, made = bld.train_library(pico, bld.jobs(pico, [space] * 4, settings, 0, corpus), corpus, settings, 0, tmp_path / "blocks")
        assert made == (12 if not losses else 4) and set(table.query("variant == 'w80'").init) == {channels}
        losses[channels] = table.query("variant == 'w80'").loss_before.median()
    assert losses["iterative"] < losses["contribution"] < losses["random"] and losses["weight_norm"] < losses["random"]
    settings = replace(settings, kv_heads="best")
    table, made = bld.train_library(pico, bld.jobs(pico, [space] * 4, settings, 0, corpus), corpus, settings, 0, tmp_path / "blocks")
    assert made == 4 and set(table.query("variant == 'kv1'").init) == {"best"}
    with pytest.raises(ValueError, match="bld.channels: unknown 'iteratve'. Did you mean 'iterative'?"):
        replace(SETTINGS, channels="iteratve")


def made_in_layer(layer, pico, corpus, settings, space, blocks) -> pd.DataFrame:
    """The library of one layer alone."""
    jobs = [job for job in bld.jobs(pico, [space] * 4, settings, 0, corpus) if job.layer == layer]
    return bld.train_library(pico, jobs, corpus, settings, 0, blocks)[0].set_index("variant")


def test_a_variant_does_not_depend_on_which_others_are_trained_beside_it(pico, corpus, tmp_path):
    settings = replace(SETTINGS, ridge=None, grad_clip=1e-6)  # so small that AdamW's epsilon counts: how much is clipped shows
    several = {"attention": [Variant("kv", 1)], FFN: [Variant("w", 96), Variant("w", 80), Variant("w", 48), Variant("linear")]}
    beside = made_in_layer(1, pico, corpus, settings, several, tmp_path / "beside")
    for subblock, variant in ((FFN, Variant("w", 80)), (FFN, Variant("w", 48)), ("attention", Variant("kv", 1))):
        alone = made_in_layer(1, pico, corpus, settings, {subblock: [variant]}, tmp_path / str(variant))
        pd.testing.assert_frame_equal(alone, beside.loc[[str(variant)]], rtol=1e-5)
        assert alone.outcome.item() == "trained" and alone.loss_after.item() < 0.999 * alone.loss_before.item()
        ours, theirs = (load_file(tmp_path / folder / alone.path.item()) for folder in (str(variant), "beside"))
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, atol=2e-5, rtol=0)


def test_a_variant_is_made_again_where_anything_that_determines_it_changed_and_not_where_only_the_work_is_done_otherwise(pico, corpus):
    def mark(parent=pico, seed=0, text=corpus, **changes) -> str:
        (job,) = bld.jobs(parent, [{FFN: [Variant("w", 80)]}], replace(SETTINGS, **changes), seed, text)
        return job.fingerprint

    another = SimpleNamespace(fingerprint="another")
    others = [mark(), mark(replace(pico, identity="another")), mark(seed=1), mark(text=another), mark(eval_every_steps=2, settled=0.1)]
    changes = {"seq_len": 32, "batch_size": 2, "calibration_tokens": 2048, "train_tokens": 512, "val_tokens": 256, "ridge": None}
    changes |= {"lr": 2e-3, "warmup_fraction": 0.2, "weight_decay": 0.1, "grad_clip": 2.0, "channels": "random", "target": "block"}
    changes |= {"loss_per": "token", "eval_every_steps": 2}
    others += [mark(**{name: value}) for name, value in changes.items()]
    assert len(set(others)) == len(others) == 19
    assert {mark(save_every_steps=3), mark(memory_gib=1.0), mark(compile=True), mark(kv_heads="best")} == {mark()}


def test_growing_the_space_trains_and_scores_the_new_variant_only(pico, corpus, library, tmp_path):
    table, blocks, _ = library
    before = {f.name: f.stat().st_mtime_ns for f in blocks.iterdir()}
    spaces = resolve_layers({**SPACE, "ffn": [*SPACE["ffn"], "w48"]}, pico.model.config, pico.family)
    scores, made = scoring.score_library(pico, table, blocks, corpus, SCORE, NO_ROWS, lambda rows: None)
    assert made == len(table) == 32
    grown, made = bld.train_library(pico, bld.jobs(pico, spaces, SETTINGS, 0, corpus), corpus, SETTINGS, 0, blocks)
    assert made == 4 and len(grown) == 36
    assert {f.name: f.stat().st_mtime_ns for f in blocks.iterdir() if "w48" not in f.name} == before
    _, made = scoring.score_library(pico, grown, blocks, corpus, SCORE, scores, lambda rows: None)
    assert made == 4
    shrunk, made = bld.train_library(pico, library[2], corpus, SETTINGS, 0, blocks)
    assert made == 0 and {f.name for f in blocks.iterdir()} == set(before)
    pd.testing.assert_frame_equal(tables.check("library", shrunk), table)


def test_the_rate_weight_decay_and_the_clip_of_gradients_are_those_of_the_settings(pico, corpus, tmp_path):
    def weights(train_tokens=256, **changes) -> torch.Tensor:
        blocks = tmp_path / f"{train_tokens} {changes}" / "blocks"
        settings = replace(SETTINGS, ridge=None, train_tokens=train_tokens, **changes)
        table = made_in_layer(0, pico, corpus, settings, {FFN: [Variant("w", 80)]}, blocks)
        assert table.outcome.item() == ("trained" if train_tokens else "untrained")
        return load_file(blocks / table.path.item())["up_proj.weight"]

    begun, plain, rate = weights(train_tokens=0), weights(), SETTINGS.lr * lr_factor(0, 1, SETTINGS.warmup_fraction)
    assert (plain - begun).abs().median().item() == pytest.approx(rate, rel=1e-2)  # AdamW's first step
    torch.testing.assert_close(weights(weight_decay=1.0) - plain, -rate * begun, atol=1e-6, rtol=1e-3)
    assert 0 < (weights(grad_clip=1e-9) - begun).abs().max() < 0.1 * rate  # below AdamW's epsilon


def test_a_variant_that_diverges_is_rolled_back_and_harms_no_neighbour(pico, corpus, tmp_path, monkeypatch, capsys):
    space = {FFN: [Variant("w", 80), Variant("w", 48)], "attention": [Variant("kv", 1)]}
    healthy = made_in_layer(0, pico, corpus, SETTINGS, space, tmp_path / "healthy")
    clip, poisoned = windows.Window._clip, []

    def poison(self):
        for group in self.groups:
            for index, trainee in enumerate(group.trainees):
                for gradient in group.learner.gradients(index) if str(trainee.job.variant) == "w48" else ():
                    poisoned.append(gradient.fill_(float("nan")))
        clip(self)

    monkeypatch.setattr(windows.Window, "_clip", poison)
    table = made_in_layer(0, pico, corpus, SETTINGS, space, tmp_path / "blocks")
    assert poisoned and table.outcome["w48"] == "rolled back" and table.loss_after["w48"] == table.loss_before["w48"]
    assert "variant w48 of ffn in layer 0: development loss" in capsys.readouterr().out
    parameters = load_file(tmp_path / "blocks" / table.path["w48"]).values()
    assert all(parameter.isfinite().all() for parameter in parameters)
    pd.testing.assert_frame_equal(table.drop("w48"), healthy.drop("w48"))


def test_the_refit_always_holds_a_batch_out():
    with pytest.raises(ValueError, match="is one batch .4 x 64.: the refit holds one out"):
        replace(SETTINGS, calibration_tokens=256)


def test_settled_variants_stop_early_and_say_when(pico, corpus, tmp_path):
    settings = replace(SETTINGS, train_tokens=4096, eval_every_steps=4, settled=0.5)
    jobs = bld.jobs(pico, [{FFN: [Variant("w", 80), Variant("w", 48)]}] * 4, settings, 0, corpus)
    table, _ = bld.train_library(pico, jobs, corpus, settings, 0, tmp_path / "blocks")
    settled = table[table.outcome == "settled"]
    assert len(settled) and (settled.num_tokens % 1024 == 0).all() and (settled.num_tokens < 4096).all()
    assert (table.loss_after <= table.loss_before).all()


@pytest.mark.parametrize("changes", [{"target": "subblock"}, {"target": "block"}, {"loss_per": "token"}])
def test_every_target_and_loss_can_be_learnt(pico, corpus, tmp_path, changes):
    settings = replace(SETTINGS, **changes)
    space = {"attention": [Variant("kv", 1)], FFN: [Variant("w", 80), Variant("w", 48)]}
    table, _ = bld.train_library(pico, bld.jobs(pico, [space] * 4, settings, 0, corpus), corpus, settings, 0, tmp_path / "blocks")
    assert (table.loss_after < table.loss_before).mean() > 0.7
    module, losses, said = build_subblock(pico, 1, FFN, Variant("w", 80)), [], []
    load_weights(module, *tables.variant_files(table, tmp_path / "blocks")(1, FFN, Variant("w", 80)))
    handles = [m.register_forward_hook(lambda _, args, out: said.append(out)) for m in (pico.module(1, FFN), module, pico.layers[1])]
    for ids in bld.text_of(corpus, settings, 0)["val"]:
        with torch.no_grad():
            pico.model(torch.as_tensor(ids))
            with swapped(pico, 1, FFN, module):
                pico.model(torch.as_tensor(ids))
        of_parent, whole, of_child, of_block = said
        said.clear()
        error, size = (whole - of_block).square(), (whole if changes == {"target": "block"} else of_parent).square()
        losses.append((error.mean(-1) / size.mean(-1)).mean() if changes == {"loss_per": "token"} else error.mean() / size.mean())
    for handle in handles:
        handle.remove()
    row = table.query("layer == 1 and variant == 'w80'")
    assert row.loss_after.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_windows_that_rerun_the_parent_give_the_same_library(pico, corpus, tmp_path):
    space = {FFN: [Variant("w", 80), Variant("w", 48)], "attention": [Variant("kv", 1)]}
    jobs = bld.jobs(pico, [space] * 4, SETTINGS, 0, corpus)
    wanted = bld.wanted_of(jobs)
    whole = plan(pico, wanted, SETTINGS)
    assert whole.holds_training and len(whole.windows) == 4
    gib = (whole.peak_bytes - 2048 * 64 * 4 + 1000) / 2**30
    small = plan(pico, wanted, replace(SETTINGS, memory_gib=gib))
    assert not small.holds_training and len(small.windows) == 4 and small.parent_flops == 2.5 * whole.parent_flops
    with pytest.raises(ValueError, match="one layer's variants need"):
        plan(pico, wanted, replace(SETTINGS, memory_gib=gib / 2))
    tables_of = []
    for number, memory_gib in enumerate((None, gib, 1.5 * gib)):
        settings = replace(SETTINGS, memory_gib=memory_gib)
        tables_of.append(bld.train_library(pico, jobs, corpus, settings, 0, tmp_path / str(number) / "blocks")[0])
    pd.testing.assert_frame_equal(tables_of[0], tables_of[1])
    pd.testing.assert_frame_equal(tables_of[0], tables_of[2])


def test_the_dry_run_plans_joint_blocks_as_a_round_of_their_own_and_needs_no_weights(pico):
    spaces = resolve_layers({**SPACE, "block": ["kv1+w80"]}, pico.model.config, pico.family)
    wanted = [(layer, s, v) for layer, space in enumerate(spaces) for s, some in space.items() for v in some]
    halves, blocks = [w for w in wanted if w[1] != "block"], [w for w in wanted if w[1] == "block"]
    plans = [plan(pico, some, SETTINGS) for some in (halves, blocks)]
    assert bld.rounds(wanted, lambda one: one[2]) == [halves, blocks]

    def rows(parent):
        lines = [line.split("|")[1:-1] for line in bld.forecast(parent, spaces, SETTINGS).splitlines() if line.startswith("|")]
        return {int(row[0]): dict(zip([cell.strip() for cell in lines[0]], map(float, row), strict=True)) for row in lines[2:]}

    alone = rows(pico)[1]
    assert (alone["windows"], alone["layers run per token"]) == (8, 8)
    assert alone["training FLOPs"] == pytest.approx(sum(p.training_flops for p in plans), rel=0.01)
    assert alone["parent FLOPs"] == pytest.approx(8 * 2048 * 2 * (64 * 64 * 3 + 3 * 64 * 160 + 64 * 64), rel=0.01)  # and attention
    skeleton = load_parent("random", config={"model_type": "llama", **PICO_CONFIG}, skeleton=True)
    assert all(p.is_meta for p in skeleton.model.parameters())
    without_peak = [{n: {**row, "peak GiB": 0} for n, row in table.items()} for table in (rows(skeleton), rows(pico))]
    assert without_peak[0] == without_peak[1]
    assert rows(pico)[8]["days"] < alone["days"]


def test_the_benchmark_times_the_steps_of_bld_and_of_the_naive_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "matmul_flops_per_s", lambda device, dtype: 1e11)  # slow to measure, and not what is tested
    monkeypatch.setattr(benchmark, "bytes_per_s", lambda device: 1e10)
    benchmark.main(["--parents", "pico", "--seq-len", "32", "--batch-size", "2", "--repeats", "1", "--layers-sampled", "1"])
    figures = json.loads((tmp_path / "docs/results/bld.json").read_text())["figures"]["parents"]["pico"]
    ours, naive = figures["float32"], figures["naive loop, float32"]
    assert naive["float32_is_times_faster"] == naive["step_s"] / ours["step_s"]
    assert ours["utilisation"] == pytest.approx(ours["flops"] / 1e11 / ours["step_s"]) and ours["tokens_per_s"] == 64 / ours["step_s"]
    assert figures["memory"]["windows"] == figures["memory"]["layers"] == 1 and figures["memory"]["planned_gib"] > 0
    assert figures["memory"]["peak_gib"] is figures["memory"]["peak_over_plan"] is None  # nobody counts on a CPU; NaN is no JSON


@pytest.mark.parametrize(("settled", "layer", "killed_at", "saved_at"), [(None, 1, 5, 3), (0.0, 1, 5, 3)])
def test_a_window_in_training_goes_on_where_it_was_killed(pico, corpus, tmp_path, monkeypatch, settled, layer, killed_at, saved_at):
    settings = replace(SETTINGS, save_every_steps=3, eval_every_steps=1, settled=settled)
    jobs = bld.jobs(pico, [{FFN: [Variant("w", 80), Variant("w", 48)]}] * 4, settings, 0, corpus)
    whole, _ = bld.train_library(pico, jobs, corpus, settings, 0, tmp_path / "whole" / "blocks")
    step, taken = windows.Window.step, []

    def killed(self, hidden):
        taken.append(self.layers.start)
        if taken.count(layer) == killed_at:
            raise KeyboardInterrupt
        return step(self, hidden)

    monkeypatch.setattr(windows.Window, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        bld.train_library(pico, jobs, corpus, settings, 0, tmp_path / "blocks")
    taken.clear()
    monkeypatch.setattr(windows.Window, "step", lambda self, hidden: (taken.append(self.layers.start), step(self, hidden))[1])
    resumed, made = bld.train_library(pico, jobs, corpus, settings, 0, tmp_path / "blocks")
    steps = whole.query("layer == @layer").num_tokens / 256
    assert made == 2 * (4 - layer) and taken.count(layer) == steps.max() - saved_at
    assert settled is None or steps.min() <= saved_at, "none had settled when it was killed"
    pd.testing.assert_frame_equal(resumed, whole)
    for name in whole.path:
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / "blocks" / name).read_bytes()
    assert not list((tmp_path / ".bld").iterdir())


def test_weights_that_are_not_the_librarys_are_refused(pico, library):
    table, blocks, _ = library
    path, fingerprint = tables.variant_files(table, blocks)(0, FFN, Variant("w", 80))
    module = build_subblock(pico, 0, FFN, Variant("w", 80))
    load_weights(module, path, fingerprint)
    with pytest.raises(ValueError, match="trained under other settings than library.parquet says"):
        load_weights(module, path, "another")


def test_a_bfloat16_parent_has_a_bfloat16_child(corpus, tmp_path):
    parent = load_parent("random", dtype="bfloat16", config={"model_type": "llama", **PICO_CONFIG})
    jobs = bld.jobs(parent, resolve_layers(SPACE, parent.model.config, parent.family), SETTINGS, 0, corpus)
    table, _ = bld.train_library(parent, jobs, corpus, SETTINGS, 0, tmp_path / "blocks")
    assert table.query("variant == 'kv1'").kv_bytes_per_token.eq(2 * 16 * 2).all()
    scores, _ = scoring.score_library(parent, table, tmp_path / "blocks", corpus, SCORE, NO_ROWS, lambda rows: None)
    assert (tables.check("scores", scores).query("variant != 'parent' and metric == 'kl'").value > 0).all()
    child = make_child(parent, architecture(*["kv1 w80"] * 3, "no_op linear"), tables.variant_files(table, tmp_path / "blocks"))
    save_child(child, parent.tokenizer, tmp_path / "child")
    verify_reload(child, tmp_path / "child", torch.randint(1, 257, (2, 16)))
    trained = load_child(tmp_path / "child", torch.float32, parent.device)
    gkd.heal(parent, trained, corpus, gkd.Settings(64, 4, 512, 1e-3, 0.1, 0.0, 1.0, 1.0, 1.0, 100), 0, tmp_path / "work")
    save_child(trained, parent.tokenizer, tmp_path / "trained")
    assert trained.dtype == torch.bfloat16
    verify_reload(trained, tmp_path / "trained", torch.randint(1, 257, (2, 16)))


def test_a_model_has_lost_nothing_against_itself_and_logits_are_made_a_few_tokens_at_a_time(pico, corpus, monkeypatch):
    made, weight = [], pico.model.lm_head.weight

    def lm_head(hidden):
        made.append(hidden.shape[:-1].numel())
        return nn.functional.linear(hidden, weight)

    monkeypatch.setattr(pico.model.lm_head, "forward", lm_head)
    monkeypatch.setattr(quality, "TOKENS_AT_ONCE", 48)
    rows = evaluation.compare(pico.model, pico.model, corpus.batches("test", 512, 64, 4, seed="evaluation"))
    assert rows["child"] == rows["parent"] and rows["child"]["kl"] == 0 and set(made) == {48, 16}


def test_quality_is_measured_on_each_domain_of_the_corpus(pico, tmp_path):
    settings = evaluation.Settings({"num_tokens": 512, "seq_len": 64, "batch_size": 4}, 128, 1, None, 1)
    known = Corpus(pico.tokenizer, {**EXCERPT, "domain_column": "source"})
    child = make_child(pico, architecture(*["kv1 w80"] * 4), variants(pico, tmp_path))
    rows = evaluation.by_domain(pico.model, child, known, settings)["child"]
    assert {name.split("_", 1)[1] for name in rows if name.startswith("kl_")} == {"django", "postgres", "python", "rustbooks", "wikilead"}
    own = [d.text for d in known.splits["test"] if d.domain == "django"]
    ids = known.sequences("test", 128, 64, "evaluation", domain="django")
    assert pico.tokenizer.decode(ids[0])[:40] in " ".join(own)
    assert rows["kl_django"] == evaluation.compare(pico.model, child, [ids])["child"]["kl"]
    assert evaluation.by_domain(pico.model, child, Corpus(pico.tokenizer, EXCERPT), settings)["child"] == {}


COUPLED = {"attention": ["kv1", "no_op"], "ffn": ["w80"], "block": ["kv1+w80", "no_op+w80", "parent+w80", "kv1+parent"]}


QUICK = costs.Torch(device="cpu", repeats=2, warmup=0, decode_contexts=2, decode_steps=1)


@pytest.fixture(scope="module")
def coupled(pico, corpus, tmp_path_factory):
    """A decoupled library, and the same grown by joint blocks: tables, blocks, how many were made to grow it."""
    blocks, found = tmp_path_factory.mktemp("coupled") / "blocks", []
    for space in ({s: COUPLED[s] for s in ("attention", "ffn")}, COUPLED):
        jobs = bld.jobs(pico, resolve_layers(space, pico.model.config, pico.family), SETTINGS, 0, corpus)
        found.append(bld.train_library(pico, jobs, corpus, SETTINGS, 0, blocks))
    (decoupled, _), (grown, made) = found
    return decoupled, tables.check("library", grown), blocks, made


def test_joint_blocks_start_from_their_halves_and_lose_no_more(pico, corpus, coupled, tmp_path):
    decoupled, grown, blocks, made = coupled
    assert made == 4 * 5 and set(decoupled.fingerprint) < set(grown.fingerprint)
    table = grown.set_index(["layer", "subblock", "variant"])
    joint = table.xs("block", level="subblock")
    assert (joint.xs("parent+parent", level="variant").loss_after == 0).all()
    trained = joint[joint.outcome != "untrained"]
    assert len(trained) == 16 and (trained.loss_after <= trained.loss_before).all()
    assert (trained.loss_after < trained.loss_before).mean() > 0.7
    lost = [blocks / "001-block-kv1+w80.safetensors", blocks / "001-ffn-w80.safetensors"]
    before = [path.read_bytes() for path in lost]
    for path in lost:  # as if a run had been killed before it had them
        path.unlink()
    jobs = bld.jobs(pico, resolve_layers(COUPLED, pico.model.config, pico.family), SETTINGS, 0, corpus)
    again, made = bld.train_library(pico, jobs, corpus, SETTINGS, 0, blocks)
    assert made == 2 and [path.read_bytes() for path in lost] == before
    pd.testing.assert_frame_equal(again, grown)
    for column in ("num_params", "kv_bytes_per_token"):
        assert joint[column][1, "kv1+w80"] == table[column][1, "attention", "kv1"] + table[column][1, "ffn", "w80"]
        assert joint[column][1, "no_op+w80"] == table[column][1, "attention", "no_op"] + table[column][1, "ffn", "w80"]
    untrained = replace(SETTINGS, train_tokens=0)
    jobs = bld.jobs(pico, resolve_layers(COUPLED, pico.model.config, pico.family), untrained, 0, corpus)
    jobs = [job for job in jobs if job.layer == 0]
    begun, _ = bld.train_library(pico, jobs, corpus, untrained, 0, tmp_path / "blocks")
    assert begun.query("subblock == 'block' and variant != 'parent+parent'").outcome.eq("untrained").all()
    both, *halves = (load_file(tmp_path / "blocks" / f"000-{name}.safetensors") for name in ("block-kv1+w80", "attention-kv1", "ffn-w80"))
    expected = {f"{s}.{name}": value for s, half in zip(SUBBLOCKS, halves, strict=True) for name, value in half.items()}
    assert both.keys() == expected.keys() and all(both[name].equal(expected[name]) for name in both)


def test_joint_blocks_are_scored_searched_and_assembled(pico, corpus, coupled):
    _, library, blocks, _ = coupled
    scores, _ = scoring.score_library(pico, library, blocks, corpus, SCORE, NO_ROWS, lambda rows: None)
    scores = tables.check("scores", scores)
    assert (scores.query("subblock == 'block' and metric == 'kl' and variant != 'parent+parent'").value > 0).all()
    halves = {s: [Variant.parse(v) for v in COUPLED[s]] for s in SUBBLOCKS}
    table = tables.check("costs", costs.profile(pico, halves, [Scenario(1, 8, 4)], QUICK, tables.read_known("costs"))[0])
    here = scores.query("layer != 2 or subblock == 'block'")  # layer 2 as blocks alone: joint, or the parent's
    problem = Problem.from_tables(here, table, "kl", "b1p8g4")
    (solution, *_) = search.search(problem, {"params_fraction": 0.5}, search.Settings("kl"))
    assert 2 in solution.architecture.joint
    weights_of = tables.variant_files(library, blocks)
    child = make_child(pico, solution.architecture, weights_of)
    assert sum(p.numel() for p in child.parameters()) == solution.totals["num_params"] <= 0.5 * solution.parent_totals["num_params"]
    one = Architecture(((PARENT, PARENT), (Variant("kv", 1), Variant("w", 80))) + ((PARENT, PARENT),) * 2, joint=(1,))
    child = make_child(pico, one, weights_of)
    batches = corpus.batches("development", SCORE.num_tokens, SCORE.seq_len, SCORE.batch_size, seed="score")
    score = scores.query("layer == 1 and variant == 'kv1+w80' and metric == 'kl'").value.item()
    assert evaluation.compare(pico.model, child, batches)["child"]["kl"] == pytest.approx(score, rel=1e-4)
    (joint_kl,) = realised.joint_kl(pico, [one], weights_of, batches, realised.Settings(SCORE.num_tokens, SCORE.seq_len, SCORE.batch_size))
    assert joint_kl == pytest.approx(score, rel=1e-4)


def test_promising_variants_are_paired_and_become_a_search_space(pico, library):
    table, _, _ = library
    value = {"parent": 0.0, "kv1": 0.1, "w80": 0.1, "linear": 1.0, "no_op": 0.9}  # linear: worse than no_op, and dearer
    scores = table[["layer", "subblock", "variant"]].assign(metric="kl", value=table.variant.map(value))
    blocks = coupling.promising(table, scores, "kl", {"attention": 3, "ffn": 2}, 1024)
    assert sorted(blocks) == [0, 1, 2, 3] and all(len(some) == 6 for some in blocks.values())
    assert {str(j.attention) for j in blocks[0]} == {"parent", "kv1", "no_op"} and "linear" not in {str(j.ffn) for j in blocks[0]}
    space = coupling.with_blocks({**SPACE, "layers": {0: {"ffn": ["w80", "no_op"], "block": ["kv1+w80"]}}}, blocks)
    layers = resolve_layers(space, pico.model.config, pico.family)
    assert all(set(layer["block"]) == {*some, Joint(PARENT, PARENT)} for layer, some in zip(layers, blocks.values(), strict=True))
    assert list(map(str, layers[0]["ffn"])) == ["parent", "w80", "no_op"]
    with pytest.raises(ValueError, match="library and scores differ in 1 variants, e.g. layer 0 attention parent"):
        coupling.promising(table, scores[1:], "kl", {"attention": 3, "ffn": 2}, 1024)


def test_a_layer_may_have_a_list_of_its_own(pico, corpus, tmp_path):
    space = {**SPACE, "layers": {"0": {"attention": [], "ffn": ["w48"]}, "2-3": {"ffn": ["w96"]}}}
    layers = resolve_layers(space, pico.model.config, pico.family)
    named = [{s: [str(v) for v in some] for s, some in layer.items()} for layer in layers]
    everywhere = {s: ["parent", *some] for s, some in SPACE.items()}
    own = [{"attention": ["parent"], "ffn": ["parent", "w48"]}, {}, {"ffn": ["parent", "w96"]}, {"ffn": ["parent", "w96"]}]
    assert named == [{**everywhere, **some} for some in own]
    assert set(map(str, resolve_space(space, pico.model.config, pico.family)["ffn"])) == {"parent", "w80", "linear", "no_op", "w48", "w96"}
    table, made = bld.train_library(pico, bld.jobs(pico, layers, SETTINGS, 0, corpus), corpus, SETTINGS, 0, tmp_path / "blocks")
    assert made == len(table) == 3 + 8 + 6 + 6 and set(table.query("layer == 0").variant) == {"parent", "w48"}


def test_shares_become_sizes_of_the_parent(pico):
    space = resolve_space({"attention": ["kv50%", "kv25%"], "ffn": ["w87%", "w50%", "w10%"]}, pico.model.config, pico.family)
    assert list(map(str, space["attention"])) == ["parent", "kv1"]
    assert list(map(str, space["ffn"])) == ["parent", "w128", "w64", "w32"]


def test_a_window_is_worth_what_its_cache_saves_at_the_context():
    rows = [("parent", 0.0, 0), ("window64", 0.1, 64), ("window512", 0.05, 512), ("kv1", 0.2, 0)]
    common = {"layer": 0, "subblock": "attention", "num_params": 100}
    library = [{**common, "variant": v, "kv_bytes_per_token": 8 if v == "kv1" else 16, "kv_window": w} for v, _, w in rows]
    library += [{**common, "subblock": "ffn", "variant": "parent", "kv_bytes_per_token": 0, "kv_window": 0}]
    scores = [{"layer": 0, "subblock": "attention", "variant": v, "metric": "kl", "value": score} for v, score, _ in rows]
    scores += [{**scores[0], "subblock": "ffn"}]
    for context, expected in ((1024, {"window64", "window512"}), (32, {"parent", "kv1"})):
        blocks = coupling.promising(pd.DataFrame(library), pd.DataFrame(scores), "kl", {"attention": 2, "ffn": 1}, context)
        assert expected & {str(block.attention) for block in blocks[0]} and len(blocks[0]) == 2
        assert ("window64" in {str(block.attention) for block in blocks[0]}) == (context == 1024)
