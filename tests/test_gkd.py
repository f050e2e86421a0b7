"""GKD: its losses are the plain formulas', it heals, measures itself, goes on where it was, and may be sharded."""
import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from accelerate import DistributedType, PartialState
from conftest import EXCERPT, architecture, pico_parent, variants
from test_ranks import in_two_processes
from torch.nn import functional

from benchmarks import demo
from benchmarks import gkd as benchmark
from puzzle_core import evaluation, gkd
from puzzle_core.children import load_child, make_child, save_child
from puzzle_core.corpus import Corpus
from puzzle_core.files import fingerprint
from puzzle_core.losses import Comparison, Weights

IDS = torch.randint(1, 257, (3, 16), generator=torch.Generator().manual_seed(0))


def plain(parent, child, weights: Weights) -> dict[str, torch.Tensor]:
    """The formulas as one reads them, on whole logits."""
    layers = {model: [] for model in (parent.model, child)}
    for model, hiddens in layers.items():
        for layer in model.get_submodule(parent.family.layers):
            layer.register_forward_hook(lambda m, a, out, into=hiddens: into.append(out[0] if isinstance(out, tuple) else out))
    of_parent, of_child = parent.model(IDS).logits.detach(), child(IDS).logits
    log_p, log_c = ((x / weights.temperature).log_softmax(-1) for x in (of_parent, of_child))
    pairs = zip(layers[child], layers[parent.model], strict=True)
    losses = {
        "kl": functional.kl_div(log_c, log_p, log_target=True, reduction="none").sum(-1).mean() * weights.temperature**2,
        "lm": functional.cross_entropy(of_child[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()),
        "cosine": torch.stack([1 - functional.cosine_similarity(c, p.detach(), dim=-1).mean() for c, p in pairs]).mean(),
    }
    for model in layers:
        for layer in model.get_submodule(parent.family.layers):
            layer._forward_hooks.clear()
    return losses | {"loss": sum(getattr(weights, name) * value for name, value in losses.items())}


@pytest.mark.parametrize(
    ("parent", "weights", "head_tokens", "checkpointing"),
    [
        ({}, Weights(1.0, 1.0, 0.0, 1.0), 7, True),
        ({"tie_word_embeddings": False}, Weights(0.5, 2.0, 0.3, 1.0), 1000, False),
        ({}, Weights(1.0, 0.0, 0.0, 2.0), 16, False),
        ({}, Weights(0.0, 0.0, 1.0, 1.0), 16, False),
        ({}, Weights(0.0, 1.0, 0.0, 1.0), 16, False),
        ({"model_type": "gemma2", "final_logit_softcapping": 0.5}, Weights(1.0, 1.0, 0.5, 0.7), 7, False),  # a cap that bites
        ({"model_type": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False}, Weights(1.0, 1.0, 1.0, 1.0), 16, True),
        ({"model_type": "gpt_neo"}, Weights(1.0, 1.0, 0.0, 1.0), 16, True),
    ],
)
def test_losses_and_their_gradients_are_the_plain_formulas(tmp_path, parent, weights, head_tokens, checkpointing):
    parent = pico_parent(**parent)
    layers = ["no_op parent", "linear no_op", "kv1 w80", "no_op no_op"]
    child = make_child(parent, architecture(*layers[: len(parent.layers)]), variants(parent, tmp_path)).requires_grad_(True)
    expected = plain(parent, child, weights)
    expected["loss"].backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in child.named_parameters()}
    child.zero_grad()
    comparison = Comparison(parent.model, child, weights, head_tokens)
    with comparison.installed(checkpointing):
        losses = child(input_ids=IDS)
        (losses["loss"] / 2).backward()
        with torch.no_grad():
            held_out = child(input_ids=IDS, held_out=True)
    assert set(losses) == {"loss"} | {name for name in ("kl", "lm", "cosine") if getattr(weights, name)}
    for name, value in losses.items():
        torch.testing.assert_close(value.detach(), expected[name].detach(), atol=1e-6, rtol=1e-4)
    for name, p in child.named_parameters():
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else 2 * p.grad, gradients[name], atol=2e-6, rtol=1e-3)
    torch.testing.assert_close(held_out["lm"], expected["lm"].detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(child(IDS).logits, child(input_ids=IDS).logits)  # both are themselves again


SETTINGS = gkd.Settings(64, 4, 4096, 1e-3, 0.1, 0.0, 1.0, 1.0, 1.0, 100, eval_tokens=512)


@pytest.fixture(scope="module")
def corpus(pico) -> Corpus:
    return Corpus(pico.tokenizer, EXCERPT)


@pytest.fixture
def child(pico, tmp_path):
    return make_child(pico, architecture("no_op w80", *["kv1 w80"] * 3), variants(pico, tmp_path)).requires_grad_(True)


def test_gkd_brings_the_child_closer_to_the_parent(pico, corpus, child, tmp_path):
    batches = corpus.batches("development", 1024, 64, 4, seed="evaluation")
    before = evaluation.compare(pico.model, child, batches)["child"]["kl"]
    curve = gkd.heal(pico, child, corpus, SETTINGS, 0, tmp_path / "work")
    assert len(gkd.training_rows(curve)) == 16 and set(curve[1]) == {"step", "loss", "kl", "cosine", "learning_rate"}
    assert evaluation.compare(pico.model, child, batches)["child"]["kl"] < 0.8 * before


def test_what_is_measured_on_the_way_is_what_evaluation_measures(pico, corpus, child, tmp_path):
    curve = gkd.heal(pico, child, corpus, replace(SETTINGS, train_tokens=1024, eval_every_steps=3), 0, tmp_path / "work")
    assert [row["step"] for row in gkd.held_out_rows(curve)] == [0, 3, 4]
    measured = evaluation.compare(pico.model, child, corpus.batches("development", 512, 64, 4, seed="gkd-0"))["child"]
    last = gkd.held_out_rows(curve)[-1]
    assert (last["held_out_kl"], last["held_out_perplexity"]) == pytest.approx((measured["kl"], measured["perplexity"]))


def test_small_steps_add_up_to_the_large_one(pico, corpus, tmp_path):
    curves = []
    for changes in ({}, {"micro_batch_size": 1, "gradient_checkpointing": True, "head_tokens": 40, "log_every_steps": 2}):
        child = make_child(pico, architecture("no_op w80", *["kv1 w80"] * 3), variants(pico, tmp_path))
        settings = replace(SETTINGS, train_tokens=1024, **changes)
        curves.append(gkd.heal(pico, child, corpus, settings, 0, tmp_path / f"work{len(curves)}"))
    ours, theirs = (gkd.training_rows(curve) for curve in curves)
    assert [row["step"] for row in theirs] == [2, 4]
    for name in ("loss", "kl", "cosine"):
        assert [row[name] for row in theirs] == pytest.approx([(ours[i][name] + ours[i + 1][name]) / 2 for i in (0, 2)], rel=1e-4), name
    assert curves[0][-2]["held_out_kl"] == pytest.approx(curves[1][-2]["held_out_kl"], rel=1e-4)


def test_weight_decay_and_the_clip_of_gradients_are_those_of_the_settings(pico, corpus, child, tmp_path):
    begun = child.model.layers[1].mlp.up_proj.weight.detach().clone()

    def moved(**changes) -> torch.Tensor:
        own = copy.deepcopy(child)
        settings = replace(SETTINGS, train_tokens=256, eval_tokens=0, save_every_steps=None, **changes)
        gkd.heal(pico, own, corpus, settings, 0, tmp_path / f"work{changes}")
        return own.model.layers[1].mlp.up_proj.weight.detach() - begun

    plain, rate = moved(), SETTINGS.lr * gkd.lr_factor(0, num_steps=1, warmup_fraction=SETTINGS.warmup_fraction)
    torch.testing.assert_close(moved(weight_decay=10.0) - plain, -rate * 10.0 * begun, atol=1e-6, rtol=1e-3)
    assert 0 < moved(grad_clip=1e-9).abs().max() < 0.1 * plain.abs().max()  # below AdamW's epsilon


def test_the_best_state_is_kept_and_not_the_last(pico, corpus, child, tmp_path, monkeypatch):
    """The learning rate explodes half way: what was best before that is what one gets."""
    factor = gkd.lr_factor
    monkeypatch.setattr(gkd, "lr_factor", lambda step, *args, **more: factor(step, *args, **more) if step < 8 else 300.0)
    settings = replace(SETTINGS, eval_every_steps=4)
    held_out = gkd.held_out_rows(gkd.heal(pico, child, corpus, settings, 0, tmp_path / "work"))
    best = min(row["held_out_kl"] for row in held_out[1:])
    assert best < held_out[0]["held_out_kl"] < held_out[-1]["held_out_kl"]
    measured = evaluation.compare(pico.model, child, corpus.batches("development", 512, 64, 4, seed="gkd-0"))["child"]
    assert measured["kl"] == pytest.approx(best)


def test_a_second_phase_goes_on_from_the_first_also_after_a_kill(pico, corpus, tmp_path, monkeypatch):
    second = {"seq_len": 256, "batch_size": 1, "train_tokens": 1024, "lr": 2e-4}
    settings = replace(SETTINGS, train_tokens=1024, save_every_steps=2, phases=[second])
    fresh = lambda: make_child(pico, architecture("no_op w80", *["kv1 w80"] * 3), variants(pico, tmp_path))  # noqa: E731
    curve = gkd.heal(pico, whole := fresh(), corpus, settings, 0, tmp_path / "whole")
    assert [row["step"] for row in gkd.training_rows(curve)] == list(range(1, 9)) and curve[-1]["learning_rate"] < 2e-4
    step, taken = gkd.Distiller.training_step, []

    def killed(self, *args, **kwargs):
        taken.append(self.args.output_dir)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gkd.Distiller, "training_step", killed)
        gkd.heal(pico, fresh(), corpus, settings, 0, tmp_path / "work")
    resumed = fresh()
    assert gkd.heal(pico, resumed, corpus, settings, 0, tmp_path / "work") == curve
    assert all(p.equal(q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


def rebuilt(pico, tmp_path):
    return make_child(pico, architecture("no_op w80", *["kv1 w80"] * 3), variants(pico, tmp_path))


def is_equal(one, two) -> bool:
    return all(p.equal(q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


WILD = {"train_tokens": 1024, "lr": 0.3, "eval_every_steps": 2}


@pytest.mark.parametrize("changes", [{}, {"save_every_steps": None}, {"save_every_steps": 1, "eval_every_steps": None}])
def test_gkd_that_does_harm_gives_back_the_child_as_it_was_and_says_so(pico, corpus, child, tmp_path, changes):
    before = copy.deepcopy(child)
    curve = gkd.heal(pico, child, corpus, replace(SETTINGS, **WILD | changes), 0, tmp_path / "work")
    rows = gkd.held_out_rows(curve)
    assert rows[0]["step"] == 0 and min(row["held_out_kl"] for row in rows[1:]) > rows[0]["held_out_kl"]
    assert is_equal(child, before)
    words = gkd.kept(curve)
    assert words.startswith("kept: before the first step; KL on development text") and "Lower `lr` in conf/gkd/" in words
    assert f"{rows[0]['held_out_kl']:.4g} before GKD, {rows[0]['held_out_kl']:.4g} after" in words


def test_a_killed_run_knows_what_the_child_was_before_its_first_step(pico, corpus, child, tmp_path, monkeypatch):
    before, settings = copy.deepcopy(child), replace(SETTINGS, **WILD, save_every_steps=1)
    with killed_at(monkeypatch, 4), pytest.raises(KeyboardInterrupt):
        gkd.heal(pico, copy.deepcopy(child), corpus, settings, 0, tmp_path / "work")
    gkd.heal(pico, child, corpus, settings, 0, tmp_path / "work")
    assert is_equal(child, before)


def test_a_phase_that_does_harm_is_taken_back_and_the_one_before_stays(pico, corpus, child, tmp_path):
    first = replace(SETTINGS, train_tokens=1024, save_every_steps=None)
    healed = copy.deepcopy(child)
    gkd.heal(pico, healed, corpus, first, 0, tmp_path / "first")
    curve = gkd.heal(pico, child, corpus, replace(first, phases=[WILD]), 0, tmp_path / "both")
    assert is_equal(child, healed) and gkd.kept(curve).startswith("kept: after step 4; KL on development text")


def test_phases_that_are_better_on_their_own_text_alone_do_not_count(pico, corpus, child, tmp_path, monkeypatch):
    """The first phase's text praises a state that is worse on the last one's: there the child as it was given is the nearest."""
    before, means = copy.deepcopy(child), gkd.Distiller._means

    def praised(self):
        kl, lm = means(self)
        return (kl / (1 + self.state.global_step) if self.settings.seq_len == 64 else kl), lm

    monkeypatch.setattr(gkd.Distiller, "_means", praised)
    settings = replace(SETTINGS, **WILD, phases=[{"seq_len": 128, "batch_size": 2, "train_tokens": 256, "lr": 1e-9}])
    curve = gkd.heal(pico, child, corpus, settings, 0, tmp_path / "work")
    assert is_equal(child, before) and gkd.kept(curve).startswith("kept: before the first step")


def test_what_is_not_logged_is_looked_at_too(pico, corpus, child, tmp_path):
    settings = replace(SETTINGS, train_tokens=1536, lr=1e30, grad_clip=1e30, eval_tokens=0, log_every_steps=100)
    with pytest.raises(FloatingPointError, match="gkd loss is nan by step 6: lower `lr`"):
        gkd.heal(pico, child, corpus, settings, 0, tmp_path / "work")


def test_steps_count_on_through_phases_however_seldom_they_are_logged(pico, corpus, child, tmp_path):
    settings = replace(SETTINGS, train_tokens=768, eval_tokens=0, log_every_steps=2, phases=[{"lr": 1e-4}])
    assert [row["step"] for row in gkd.heal(pico, child, corpus, settings, 0, tmp_path / "work")] == [2, 5]


def test_where_nothing_is_measured_a_warning_says_that_the_child_may_be_worse(pico, corpus, child, tmp_path):
    with pytest.warns(UserWarning, match="gkd.eval_tokens is 0: no states are compared"):
        curve = gkd.heal(pico, child, corpus, replace(SETTINGS, train_tokens=256, eval_tokens=0), 0, tmp_path / "work")
    assert gkd.kept(curve) == "kept: after the last step; gkd.eval_tokens is 0, so no state was measured"


@contextlib.contextmanager
def killed_at(monkeypatch, step: int):
    """A run is interrupted in its optimizer step number `step`, counted from 1 in each phase."""
    train = gkd.Distiller.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gkd.Distiller, "training_step", killed)
        yield


@pytest.mark.parametrize(
    ("log", "save", "evaluate", "kill"), [(2, 3, None, 4), (3, 2, 3, 6), (4, 1, 2, 7), (5, 3, 4, 8), (3, 4, None, 5), (1, 3, 1, 5)]
)
def test_a_resumed_curve_is_that_of_an_uninterrupted_run(pico, corpus, tmp_path, monkeypatch, log, save, evaluate, kill):
    changes = {"log_every_steps": log, "save_every_steps": save, "eval_every_steps": evaluate}
    settings = replace(SETTINGS, train_tokens=2048, micro_batch_size=2, **changes)
    curve = gkd.heal(pico, whole := rebuilt(pico, tmp_path), corpus, settings, 0, tmp_path / "whole")
    assert len(gkd.training_rows(curve)) == 8 // log
    with killed_at(monkeypatch, kill), pytest.raises(KeyboardInterrupt):
        gkd.heal(pico, rebuilt(pico, tmp_path), corpus, settings, 0, tmp_path / "work")
    assert list((tmp_path / "work" / "phase").glob("checkpoint-*"))
    resumed = rebuilt(pico, tmp_path)
    assert gkd.heal(pico, resumed, corpus, settings, 0, tmp_path / "work") == curve
    assert is_equal(resumed, whole)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, None)])
def test_a_run_goes_on_with_other_micro_batches_logs_and_saves(pico, corpus, tmp_path, monkeypatch, before, after):
    settings = replace(SETTINGS, train_tokens=2048, log_every_steps=4, micro_batch_size=before, save_every_steps=3)
    curve = gkd.heal(pico, rebuilt(pico, tmp_path), corpus, settings, 0, tmp_path / "whole")
    with killed_at(monkeypatch, 6), pytest.raises(KeyboardInterrupt):
        gkd.heal(pico, rebuilt(pico, tmp_path), corpus, settings, 0, tmp_path / "work")
    compute, seen = gkd.Distiller.compute_loss, []

    def watched(self, model, inputs, **kwargs):
        seen.append((self.state.global_step, len(inputs["input_ids"])))
        return compute(self, model, inputs, **kwargs)

    monkeypatch.setattr(gkd.Distiller, "compute_loss", watched)
    changes = {"micro_batch_size": after, "head_tokens": 50, "gradient_checkpointing": True, "save_every_steps": None}
    resumed = gkd.heal(pico, rebuilt(pico, tmp_path), corpus, replace(settings, **changes), 0, tmp_path / "work")
    assert seen == [(step, after or 4) for step in range(4 - 1, 8) for _ in range(4 // (after or 4))]  # nothing is seen twice
    assert [row["step"] for row in resumed] == [row["step"] for row in curve]
    for one, other in zip(resumed, curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    seen.clear()
    rows = gkd.heal(pico, rebuilt(pico, tmp_path), corpus, replace(settings, log_every_steps=2), 0, tmp_path / "whole")
    assert not seen and rows == curve  # it was at its end


def test_a_runs_fingerprint_is_of_what_determines_the_child(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = replace(SETTINGS, phases=[{"seq_len": 128}])

    def run(**changes) -> str:
        return gkd.run_fingerprint(tmp_path, replace(settings, **changes), 0)

    how = {"micro_batch_size": 1, "head_tokens": 7, "gradient_checkpointing": True, "compile": True, "log_every_steps": 3,
           "save_every_steps": None, "shard": True}  # fmt: skip
    of_phase = {key: value for key, value in how.items() if key != "shard"}
    same = [*({key: value} for key, value in how.items()), {"phases": [{"seq_len": 128, **of_phase}]}]
    same += [{"lm_weight": 0, "weight_decay": 0, "kl_weight": 1, "grad_clip": 1}, {"phases": [{"seq_len": 128.0, "lr": 1e-3}]}]
    assert {run(**changes) for changes in same} == {run()}
    others = [{"eval_every_steps": 2}, {"eval_tokens": 256}, {"parent_dtype": "bfloat16"}, {"lr": 2e-3}, {"batch_size": 2}]
    others += [{"lm_weight": 0.5}]
    others += [{"phases": []}, {"phases": [{"seq_len": 128, "lr": 1}]}, {"phases": [{"seq_len": 128, "eval_every_steps": 2}]}]
    assert len({run(), *(run(**changes) for changes in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (({"ridge": [0, 1]}, 0), ({"ridge": [0.0, 1.0]}, 0.0), True), ((1e30,), (10**30,), False), ((True,), (1,), False),
        ((0.5, None, "1"), (0.5, None, "1.0"), False), (((1.0, 2),), ([1, 2.0],), True), ((-0.0,), (0,), True),
    ],
)  # fmt: skip
def test_a_fingerprint_takes_1_and_1_point_0_for_one_number(one, other, same):
    assert (fingerprint(*one) == fingerprint(*other)) is same


def test_the_parent_may_run_in_a_lower_precision_and_is_left_as_it_was(pico, corpus, child, tmp_path):
    before = {name: p.clone() for name, p in pico.model.named_parameters()}
    settings = replace(SETTINGS, train_tokens=256, parent_dtype="bfloat16", eval_tokens=0, save_every_steps=None)
    low = gkd.heal(pico, copy.deepcopy(child), corpus, settings, 0, tmp_path / "low")
    own = gkd.heal(pico, child, corpus, replace(settings, parent_dtype=None), 0, tmp_path / "own")
    assert low[0]["kl"] == pytest.approx(own[0]["kl"], rel=0.05) and low[0]["kl"] != pytest.approx(own[0]["kl"], rel=1e-5)
    assert all(p.equal(before[name]) and p.dtype == torch.float32 for name, p in pico.model.named_parameters())
    assert not list(tmp_path.glob("*/phase/checkpoint-*"))


def test_dropout_is_off(corpus, tmp_path):
    parent = pico_parent("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    child = make_child(parent, architecture(*["parent parent"] * 3), variants(parent, tmp_path))
    curve = gkd.heal(parent, child, corpus, replace(SETTINGS, train_tokens=256), 0, tmp_path / "work")
    assert gkd.training_rows(curve)[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_weight": 0.0, "cosine_weight": 0.0}, "one of them must count"),
        ({"micro_batch_size": 3}, "batch_size 4 is not a multiple of micro_batch_size 3"),
        ({"seq_len": 1024}, "gkd.seq_len is 1024, and the parent's positions end at 512"),
        ({"phases": [{"seq_length": 128}]}, "a phase has the unknown key 'seq_length'. Did you mean 'seq_len'"),
        ({"phases": [{"shard": True}]}, "a phase has the unknown key 'shard'"),
        ({"phases": [{"eval_tokens": 0}]}, "eval_tokens is 0 in one phase and not in another"),
    ],
)
def test_settings_that_cannot_be_are_named(pico, corpus, child, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        gkd.heal(pico, child, corpus, replace(SETTINGS, **changes), 0, tmp_path / "work")


def heal_in_shards(mine, pico, corpus, settings, folder) -> None:
    """In one of two processes: healed in shards, killed at step 6, healed on; the first one keeps what came of it."""
    create, step = gkd.Distiller.create_accelerator_and_postprocess, gkd.Distiller.training_step

    def as_if_on_gpus(self):  # accelerate shards on accelerators only; all else is as it is there
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    gkd.Distiller.create_accelerator_and_postprocess = as_if_on_gpus
    child = load_child(folder / "child", torch.float32, torch.device("cpu"))
    gkd.Distiller.training_step = killed
    with pytest.raises(KeyboardInterrupt):
        gkd.heal(pico, child, corpus, settings, 0, folder / "two", mine)
    assert all(p.to_local().numel() < p.numel() for p in child.parameters())
    gkd.Distiller.training_step = step
    child = load_child(folder / "child", torch.float32, torch.device("cpu"))
    curve = gkd.heal(pico, child, corpus, settings, 0, folder / "two", mine)
    child = gkd.whole(child, folder / "child", torch.float32, mine)
    if mine.first:
        torch.save((curve, child.state_dict()), folder / "two.pt")


def test_two_processes_in_shards_do_what_one_does(pico, corpus, child, tmp_path):
    save_child(child, pico.tokenizer, tmp_path / "child")
    settings = replace(SETTINGS, train_tokens=1536, log_every_steps=3, eval_every_steps=4, save_every_steps=4, shard=True)
    in_two_processes(heal_in_shards, pico, corpus, settings, tmp_path)
    curve, weights = torch.load(tmp_path / "two.pt")
    alone = gkd.heal(pico, child, corpus, settings, 0, tmp_path / "one")
    assert len(curve) == len(alone) == 5
    for two, one in zip(curve, alone, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for name, value in child.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-3)


def heal_wildly(mine, pico, folder, settings) -> None:
    """In one of two processes: two phases that do harm, in shards and without; the first one keeps what came of it."""
    create, corpus = gkd.Distiller.create_accelerator_and_postprocess, Corpus(pico.tokenizer, EXCERPT)

    def as_if_on_gpus(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    for shard in (False, True):  # in this order: accelerate would go on as it was set for shards
        if shard:
            gkd.Distiller.create_accelerator_and_postprocess = as_if_on_gpus
        child = load_child(folder / "child", torch.float32, torch.device("cpu"))
        curve = gkd.heal(pico, child, corpus, replace(settings, shard=shard), 0, folder / "work", mine)
        child = gkd.whole(child, folder / "child", torch.float32, mine)
        if mine.first:
            torch.save((gkd.kept(curve), child.state_dict()), folder / f"{shard}.pt")


def test_two_processes_give_back_the_child_as_it_was_too(pico, child, tmp_path):
    save_child(child, pico.tokenizer, tmp_path / "child")
    in_two_processes(heal_wildly, pico, tmp_path, replace(SETTINGS, **WILD, save_every_steps=2, phases=[{"seq_len": 128, "batch_size": 2}]))
    for shard in (True, False):
        words, weights = torch.load(tmp_path / f"{shard}.pt")
        assert words.startswith("kept: before the first step")
        assert all(weights[name].equal(value) for name, value in child.state_dict().items())
    assert {path.name for path in (tmp_path / "work").iterdir()} == {f"phase{n}{kind}" for n in ("", "-1") for kind in ("", "-sharded")}


def test_the_benchmark_times_every_way_and_counts_products(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "matmul_flops_per_s", lambda device, dtype: 1e12)  # slow to measure, and not what is tested
    rows = benchmark.main(["--parents", "pico", "--seq-len", "32", "--batch-size", "2", "--steps", "1"])
    assert [row["way"] for row in rows] == ["plain Trainer", "gkd", "gkd, layers checkpointed"]
    assert all(0 < row["floor_s"] < row["step_s"] for row in rows) and rows[1]["step_of_limit"] > 0
    assert rows[0]["floor_s"] * 1e12 > 64 * 4 * 2 * 64 * 320  # the heads alone, four times
    assert (tmp_path / "docs/results/gkd.json").exists()
