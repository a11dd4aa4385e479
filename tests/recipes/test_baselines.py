import gc
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, logits, make_inputs, make_model
from datasets import Dataset
from training import At, dataset, log_of, training_arguments
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer

from harness import arguments as method_arguments
from harness import baselines
from harness.arguments import ALL_METHODS, MethodArguments
from harness.baselines import attach_baseline, make_trainer, report
from harness.bottleneck import load_bottleneck
from harness.e2e_task import E2ETrainerMixin
from harness.ranks import ranks_for
from hf_sara import SaraAdapter, SaraArguments, SaraTrainer, plan
from hf_sara.planning import count_base
from hf_sara.tasks import e2e

SMALL = {"lora_r": 2, "vera_r": 8, "num_virtual_tokens": 3, "bottleneck_size": 4, "adalora_interval": 1}
OURS = {"sara": {"threshold": 0.3}, "mo_sara": {"threshold": 0.5, "num_heads": 3}}
BASELINES = [method for method in ALL_METHODS if method not in OURS]
PEFT_METHODS = [method for method in BASELINES if method in method_arguments.PEFT_METHODS]


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Trainer collects garbage at the start of each training, through all that was ever imported: 0.3 s a time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=ALL_METHODS)
def method(request) -> str:
    return request.param


def arguments(method: str, **changes) -> MethodArguments:
    return MethodArguments(method=method, **{**SMALL, **OURS.get(method, {}), "dropout": 0.2, **changes})


def trainer_of(method, folder, family="llama", mixin=None, options=None, data=None, **changes) -> Trainer:
    return make_trainer(
        arguments(method, **(options or {})),
        mixin=mixin,
        model=make_model(family),
        args=training_arguments(folder, **changes),
        train_dataset=dataset() if data is None else data,
        eval_dataset=dataset(8),
    )


def parse(*argv) -> MethodArguments:
    return HfArgumentParser(MethodArguments).parse_args_into_dataclasses(list(argv))[0]


def trained_of(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


# ---- arguments ----


def test_the_defaults_are_those_of_the_papers_baselines():
    args = parse("--method", "lora")
    assert (args.lora_r, args.alpha, args.dropout) == (10, 20, 0.05)
    assert (args.num_virtual_tokens, args.bottleneck_size, args.vera_r) == (30, 256, 1024)
    assert parse().sara_arguments() == SaraArguments()
    adalora = parse("--method", "adalora", "--lora_r", "4", "--lora_alpha", "32")
    assert (adalora.initial_rank, adalora.alpha) == (6, 32)


def test_ours_keep_their_options_and_checks():
    ours = parse("--method", "mo_sara", "--threshold", "0.4", "--num_heads", "3", "--layers", "0-1")
    assert ours.sara_arguments() == SaraArguments(method="mo_sara", threshold=0.4, num_heads=3, layers="0-1")
    assert type(ours.sara_arguments()) is SaraArguments
    assert MethodArguments(method="series_adapter", layers=3).layers == "3"
    with pytest.raises(ValueError, match="v_position='front' is an option of method='mo_sara'"):
        MethodArguments(v_position="front")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora2"}, "method='lora2' is unknown. Choose one of: sara, mo_sara, lora, dora"),
        ({"method": "lora", "lora_r": 0}, "lora_r=0 has to be at least 1"),
        ({"method": "prefix", "num_virtual_tokens": -1}, "num_virtual_tokens=-1 has to be"),
        ({"method": "lora", "dropout": 1.0}, "dropout=1.0 has to lie in"),
        ({"method": "lora", "layers": "3-1"}, "runs backwards"),
        ({"method": "lora", "threshold": 0.1}, "threshold=0.1 is no option of method='lora', only of sara, mo_sara"),
        ({"method": "lora", "num_heads": 3}, "num_heads=3 is no option of method='lora'"),
        ({"method": "dora", "v_position": "front"}, "v_position='front' is no option of method='dora'"),
        ({"method": "full", "target_modules": ["q_proj"]}, "target_modules=.* is no option of method='full'"),
        ({"method": "prefix", "layers": 0}, "layers=0 is no option of method='prefix', only of sara, mo_sara, lora"),
        ({"method": "adalora", "adalora_init_r": 10}, "has to be larger than lora_r=10"),
        ({"method": "adalora", "adalora_init_r": 0}, "adalora_init_r=0 has to be larger"),
        ({"method": "lora", "lora_alpha": 0}, "lora_alpha=0 has to be at least 1"),
        ({"method": "adalora", "adalora_final": 0.95}, "below 1"),
    ],
)
def test_what_does_not_fit_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        MethodArguments(**values)


def test_the_command_line_refuses_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        parse("--method", "lora2")
    assert "invalid choice: 'lora2'" in capsys.readouterr().err


def test_without_peft_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method='dora' needs PEFT.*pip install 'hf_sara\[peft\]'"):
        trainer_of("dora", tmp_path)
    trainer_of("series_adapter", tmp_path)


def test_baselines_refuse_what_they_do_not_do(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub is not made for method='lora'"):
        trainer_of("lora", tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match=r"plan='plan\.json' has ranks of SARA, which method='lora' does not use"):
        make_trainer(arguments("lora"), plan="plan.json", model=make_model(), args=training_arguments(tmp_path))


# ---- sizes ----

# (d_in, d_out) of the modules of one layer.
QV = {"llama": [(24, 24), (24, 12)], "gpt2": [(24, 72)]}
QKV = {"llama": [(24, 24), (24, 12), (24, 12)], "gpt2": [(24, 24)] * 3}
FEED_FORWARD = {"llama": 3, "gpt2": 2}
KEYS_AND_VALUES = {"llama": 2 * 12, "gpt2": 2 * 24}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", BASELINES)
def test_the_trained_parameters_are_those_of_the_formula(name, family):
    model = make_model(family)
    everything = count_base(model)
    per_layer = {
        "lora": sum(2 * (d_in + d_out) for d_in, d_out in QV[family]),
        **dict.fromkeys(("dylora", "eva", "pissa"), sum(2 * (d_in + d_out) for d_in, d_out in QV[family])),
        "dora": sum(2 * (d_in + d_out) + d_out for d_in, d_out in QV[family]),
        "vera": sum(8 + d_out for _, d_out in QV[family]),
        # Before its pruning, from rank 3 to 2.
        "adalora": sum(3 * (d_in + d_out + 1) for d_in, d_out in QV[family]),
        "prefix": 3 * KEYS_AND_VALUES[family],
        "series_adapter": FEED_FORWARD[family] * (24 + 24) * 4,
        "parallel_adapter": sum((d_in + d_out) * 4 for d_in, d_out in QKV[family]),
        # Weights and biases, and the layer norm of the one behind the feed-forward block.
        "adapter_l": 2 * 24 * 4 + 4 + 24 + 2 * 24,
        "adapter_h": 2 * (2 * 24 * 4 + 4 + 24),
    }
    attached = attach_baseline(model, arguments(name))
    trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert trained == (everything if name == "full" else 2 * per_layer[name])


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("lora", {"lora_r": 4}, 393_216),
        ("vera", {}, 98_304),
        ("dylora", {"lora_r": 4}, 393_216),
        ("adapter_l", {"bottleneck_size": 6}, 368_784),
        ("adapter_l", {"bottleneck_size": 224}, 11_089_152),
        ("adapter_h", {"bottleneck_size": 112}, 11_064_576),
    ],
)
def test_gpt2_medium_has_the_counts_of_table_3(name, options, count):
    # LoRA is printed as 0.35M, VeRA as 0.098M. Both adapt q and v there, and the fused c_attn here. DyLoRA is printed
    # as 0.39M, Adapter-L as 0.37M and 11.09M. Adapter-H is printed as 11.09M, to which 112 is the nearest width.
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    model = attach_baseline(model, MethodArguments(method=name, **options))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    "name", ["lora", "dora", "dylora", "vera", "adalora", "series_adapter", "parallel_adapter", "adapter_l"]
)
def test_layers_and_modules_can_be_chosen(name):
    model = attach_baseline(make_model(), arguments(name, layers="1", target_modules=["k_proj", "down_proj"]))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split("layers.")[1].split(".")[0] for n in trained} == {"1"}
    assert {part for n in trained for part in n.split(".") if part.endswith("_proj")} == {"k_proj", "down_proj"}


@pytest.mark.parametrize("name", BASELINES)
def test_trained_tensors_are_float32_on_a_base_in_half_precision(name):
    model = attach_baseline(make_model(dtype=torch.bfloat16).requires_grad_(False), arguments(name))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_parameter(next(n for n, _ in model.named_parameters() if "embed_tokens" in n)).requires_grad == (
        name == "full"
    )
    assert torch.isfinite(logits(model)).all()


# ---- training ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_falls_and_what_is_saved_does_the_same_on_a_fresh_base(method, family, tmp_path):
    trainer = trainer_of(method, tmp_path, family, max_steps=12, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_loss"] < before
    fresh = make_model(family)
    # Without labels: PEFT's AdaLoRA, loaded for inference, fails on them.
    inputs = {name: tensor for name, tensor in make_inputs(fresh).items() if name != "labels"}
    start = logits(fresh, **inputs)
    if method in OURS:
        SaraAdapter.load(fresh, tmp_path)
    elif method in PEFT_METHODS:
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(fresh, tmp_path)
    elif method == "full":
        fresh = type(fresh).from_pretrained(tmp_path)
    else:
        load_bottleneck(fresh, tmp_path)
    expected = logits(trainer.model, **inputs)
    torch.testing.assert_close(logits(fresh, **inputs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - start).abs().max() > 1e-3
    # The report counts exactly what was loaded.
    costs = report(trainer)
    trained = trained_of(trainer)
    count = sum(p.numel() for p in trained.values())
    assert (costs["method"], costs["trained_parameters"]) == (method, count)
    everything = count_base(make_model(family))
    assert costs["share"] == pytest.approx(1.0 if method == "full" else count / (count + everything))
    assert costs["adapter_bytes"] == sum(
        path.stat().st_size
        for path in tmp_path.iterdir()
        if path.suffix == ".safetensors" or path.name.endswith("config.json")
    )
    assert costs["train_seconds"] > 0.0
    assert costs["peak_memory_bytes"] > 50e6
    assert ("threshold" in costs) == (method in OURS)


class Recorder:
    """A mixin that keeps the ids of each batch of the training."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def ragged(size: int = 8) -> Dataset:
    """Two epochs are 8 steps. The lengths are made up: only the sampler looks at them."""
    return dataset(size).remove_columns("length").add_column("length", [5, 3, 9, 1, 7, 2, 8, 4])


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_all_methods_see_the_same_batches_in_the_same_order(strategy, tmp_path):
    seen = {}
    for name in ALL_METHODS:
        trainer = trainer_of(
            name,
            tmp_path / name,
            mixin=Recorder,
            data=ragged(),
            max_steps=8,
            train_sampling_strategy=strategy,
            save_strategy="no",
        )
        trainer.train()
        seen[name] = trainer.batches
    assert all(batches == seen["sara"] for batches in seen.values())
    first, second = seen["sara"][:4], seen["sara"][4:]
    assert first != second
    assert sorted(row for batch in first for row in batch) == sorted(row for batch in second for row in batch)


@pytest.mark.one_in(2)
def test_a_resumed_training_ends_with_the_same_bits_and_a_finished_one_does_nothing(method, tmp_path):
    settings = {"data": ragged(), "train_sampling_strategy": "group_by_length", "save_steps": 3}
    whole = trainer_of(method, tmp_path / "whole", **settings)
    whole.train()
    # Stopped in the second epoch, after the checkpoint at step 6.
    parts = trainer_of(method, tmp_path / "parts", **settings)
    parts.add_callback(At(6, lambda control: setattr(control, "should_training_stop", True)))
    parts.train()
    assert parts.state.global_step == 6
    resumed = trainer_of(method, tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, found = trained_of(whole), trained_of(resumed)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for one, other in zip(log_of(resumed), log_of(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    again = trainer_of(method, tmp_path / "parts", mixin=Recorder, **settings)
    result = again.train(resume_from_checkpoint=True)
    assert not hasattr(again, "batches")
    assert all(torch.equal(expected[name], tensor) for name, tensor in trained_of(again).items())
    assert result.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"])
    assert again.training_seconds > 0.0


def test_the_start_follows_from_the_seed(method, tmp_path):
    one, same, other = (trained_of(trainer_of(method, tmp_path, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    # VeRA's trained vectors start at constants, a whole model where it was, and EVA and PiSSA from data and weights.
    if method not in ("vera", "full", "eva", "pissa"):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_weight_decay_applies_to_every_trained_tensor(method, tmp_path):
    trainer = trainer_of(method, tmp_path)
    trainer.create_optimizer()
    decayed = [group["params"] for group in trainer.optimizer.param_groups if group["weight_decay"] > 0]
    assert {id(p) for params in decayed for p in params} == {
        id(p) for p in trainer.model.parameters() if p.requires_grad
    }


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    trainer_of("lora", tmp_path).train()
    with pytest.raises(ValueError, match=r"lora_A.*shape \(2, 24\), expected \(3, 24\)"):
        trainer_of("lora", tmp_path, options={"lora_r": 3}).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"it has no sara_config.json|is not a hf_sara adapter"):
        trainer_of("sara", tmp_path).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_of_prefix_tuning_is_loaded(tmp_path):
    # PEFT itself cannot, under prompt learning.
    trainer = trainer_of(
        "prefix",
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=30.0,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
    assert min(losses) < losses[-1]


# ---- the loss ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_labels_are_smoothed_in_training_and_not_in_evaluation(method, family, tmp_path):
    trainer = trainer_of(method, tmp_path, family, mixin=E2ETrainerMixin, label_smoothing_factor=0.1)
    model = trainer.model.eval()
    inputs = make_inputs(trainer.model, batch=3, length=7)
    # As in the task, no first token counts: Trainer miscounts those of GPT-2.
    inputs["labels"][:, 0] = inputs["labels"][0, :4] = -100
    scores = logits(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    scores, labels = scores[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    smoothed = F.cross_entropy(scores, labels, label_smoothing=0.1)
    plain = F.cross_entropy(scores, labels)
    assert abs(smoothed - plain) > 1e-3
    count = (labels != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs), num_items_in_batch=count), smoothed)
    torch.testing.assert_close(trainer.prediction_step(model, dict(inputs), True)[0], plain)


def test_adalora_adds_its_own_term_to_the_loss_of_training_alone(tmp_path):
    trainer = trainer_of("adalora", tmp_path, options={"dropout": 0.0}, label_smoothing_factor=0.1)
    trainer.current_gradient_accumulation_steps = 2
    inputs = make_inputs(trainer.model)
    count = (inputs["labels"][:, 1:] != -100).sum()
    in_training = trainer.compute_loss(trainer.model.train(), dict(inputs), num_items_in_batch=count)
    in_evaluation = trainer.compute_loss(trainer.model.eval(), dict(inputs), num_items_in_batch=count)
    # PEFT's own, which it adds where the model computes the loss itself.
    plain = trainer.model(**inputs).loss
    trainer.model.peft_config["default"].orth_reg_weight = 0.5
    term = trainer.model(**inputs).loss - plain
    assert term > 0.1
    torch.testing.assert_close(in_training - in_evaluation, term / 2, rtol=1e-4, atol=1e-5)


def test_adalora_prunes_to_its_mean_rank_within_its_schedule(tmp_path):
    trainer = trainer_of("adalora", tmp_path, max_steps=10, options={"adalora_final": 0.3})
    kept = {}

    def count(control):
        entries = [p for n, p in trainer.model.named_parameters() if ".lora_E." in n]
        kept[trainer.state.global_step] = int(sum((p != 0).sum() for p in entries))

    for step in range(1, 11):
        trainer.add_callback(At(step, count))
    trainer.train()
    config = trainer.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (10, 1, 3)
    # Four modules, from rank 3 to 2: 12 entries, 8 in the end, and for the last three steps.
    assert kept[2] == 12
    assert [kept[step] for step in range(8, 11)] == [8, 8, 8]


def test_eva_and_pissa_start_elsewhere_and_leave_the_data_as_they_were(tmp_path):
    lora, eva, pissa = (trainer_of(name, tmp_path / name, options={"lora_r": 3}) for name in ("lora", "eva", "pissa"))
    ranks = [len(module.weight) for name, module in eva.model.named_modules() if name.endswith("lora_A.default")]
    assert sum(ranks) == 3 * 4
    inputs = make_inputs(lora.model)
    # EVA's LoRA adds nothing at its start, and PiSSA's adds what it took from the base.
    for trainer in (eva, pissa):
        torch.testing.assert_close(logits(trainer.model, **inputs), logits(lora.model, **inputs), rtol=1e-4, atol=1e-4)
    own = pissa.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(own, make_model().model.layers[0].self_attn.q_proj.weight, atol=1e-2)


# ---- other ranks than the rule's ----


def trained_by_shape(sites) -> dict:
    found = {}
    for site in sites:
        found.setdefault(site.shape, []).append(site.k)
    return found


@pytest.mark.parametrize("name", ["sara", "mo_sara"])
def test_ranks_that_are_equal_or_upside_down_have_the_parameters_of_the_rule(name):
    model = make_model(num_hidden_layers=6)
    args = SaraArguments(method=name, threshold=0.5, target_modules=["q_proj", "v_proj", "up_proj"])
    rule, equal, turned = (ranks_for(model, args, kind) for kind in ("sara", "equal", "reversed"))
    assert rule == plan(model, args)
    assert len({site.k for site in equal.sites}) == 1
    one = max(rule.count(site) for site in equal.sites)
    assert abs(equal.trained_parameters - rule.trained_parameters) <= len(rule.sites) * one
    assert turned.trained_parameters == rule.trained_parameters
    for shape, ks in trained_by_shape(turned.sites).items():
        before = trained_by_shape(rule.sites)[shape]
        assert sorted(ks) == sorted(before)
        # What had most has least.
        assert before[ks.index(min(ks))] == max(before)


@pytest.mark.parametrize(
    ("name", "kind"), [("sara", "equal"), ("sara", "reversed"), ("lora", "sara"), ("lora", "reversed")]
)
def test_other_ranks_train_and_come_back(name, kind, tmp_path):
    options = {"ranks": kind, "threshold": 0.3}
    trainer = trainer_of(name, tmp_path, options=options, max_steps=8, save_steps=4)
    wanted = ranks_for(make_model(), SaraArguments(threshold=0.3), kind)
    trainer.train()
    trainer.save_model()
    if name == "sara":
        fresh = make_model()
        adapter = SaraAdapter.load(fresh, tmp_path)
        assert [site.k for site in adapter.sites] == [site.k for site in wanted.sites]
    else:
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(make_model(), tmp_path)
        ranks = {n: len(m.weight) for n, m in fresh.named_modules() if n.endswith("lora_A.default")}
        assert sorted(ranks.values()) == sorted(wanted.rank_pattern().values())
        scales = {m.scaling["default"] for m in fresh.modules() if isinstance(getattr(m, "scaling", None), dict)}
        assert scales == {2.0}
    inputs = make_inputs(trainer.model)
    torch.testing.assert_close(logits(fresh, **inputs), logits(trainer.model, **inputs), rtol=1e-5, atol=1e-5)
    again = trainer_of(name, tmp_path, options=options, max_steps=8, save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key, tensor in trained_of(trainer).items():
        assert torch.equal(trained_of(again)[key], tensor)


def test_choices_of_ranks_that_mean_nothing_are_refused(tmp_path):
    for values in ({"method": "lora", "ranks": "equal"}, {"method": "sara", "ranks": "sara"}):
        with pytest.raises(ValueError, match="is no choice of method"):
            MethodArguments(**values)
    with pytest.raises(ValueError, match="ranks='equal' is no option of method='dora'"):
        MethodArguments(method="dora", ranks="equal")
    with pytest.raises(ValueError, match="ask for different ranks"):
        make_trainer(
            arguments("sara", ranks="equal"), plan="plan.json", model=make_model(), args=training_arguments(tmp_path)
        )


def test_dylora_trains_the_first_ranks_of_a_lora(tmp_path):
    trainer = trainer_of("dylora", tmp_path, options={"lora_r": 3, "dropout": 0.0}, max_steps=12, weight_decay=0.0)
    model, ranks, alive = trainer.model, [], []
    step = trainer.training_step

    def look(*args, **kwargs):
        loss = step(*args, **kwargs)
        grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        alive.append(max(int(grad.abs().sum(0).ne(0).sum()) for grad in grads))
        return loss

    cut = baselines.DyLoraTrainer._cut
    trainer._cut = None
    trainer.training_step = look
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__func__", None) is cut:
                module._forward_hooks[key] = lambda m, a, o: ranks.append(trainer._sara_rank) or cut(trainer, m, a, o)
    trainer.train()
    # The gradient of each step is that of the ranks that it drew, and all were drawn.
    assert set(ranks) == {1, 2, 3}
    drawn = ranks[:: len(ranks) // len(alive)]
    assert alive == drawn[: len(alive)]

    # A smaller rank is the LoRA cut to it, with its own scaling.
    losses = trainer.evaluate_ranks()
    assert list(losses) == ["eval_loss_rank_1", "eval_loss_rank_2"]
    whole = trainer.evaluate()["eval_loss"]
    for rank in (1, 2):
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter[rank:] = 0.0
                    parameter *= 3 / rank
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[f"eval_loss_rank_{rank}"], rel=1e-5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
    assert trainer.evaluate()["eval_loss"] == whole
    assert len({whole, *losses.values()}) == 3


def test_a_training_too_short_for_adalora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 steps are too few"):
        trainer_of("adalora", tmp_path, max_steps=1).train()


# ---- decoding ----

PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]


@torch.no_grad()
def greedy(model, prompt: list[int], steps: int) -> list[int]:
    """The plain way: everything again for each token, by the wrapper's own forward."""
    ids = list(prompt)
    for _ in range(steps):
        whole = torch.tensor([ids])
        ids.append(int(model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("name", ["prefix", "lora", "vera"])
def test_beam_search_and_generate_decode_what_the_trained_model_computes(name, family, tmp_path):
    trainer = trainer_of(name, tmp_path, family, max_steps=12, learning_rate=0.3, save_strategy="no")
    trainer.train()
    model = trainer.model.eval()
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert expected != [greedy(make_model(family), prompt, 6) for prompt in PROMPTS]
    search = {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 6, "eos_token_ids": [VOCABULARY]}
    assert e2e.beam_search(model, PROMPTS, **search) == expected
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(**padded(), **settings)
    assert generated[:, 5:].tolist() == expected
    assert torch.equal(generated[:, :5], padded()["input_ids"])
    # So many beams that nothing is missed: the most probable of all pairs of tokens.
    with torch.no_grad():
        ids = torch.tensor([[*PROMPTS[0], token] for token in range(VOCABULARY)])
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        best = int((scores[:, -2].diagonal()[:, None] + scores[:, -1]).argmax())
    settings = {**settings, "max_new_tokens": 2, "num_beams": VOCABULARY, "length_penalty": 0.0}
    pairs = model.generate(**padded(), **settings)[:, 5:].tolist()
    assert pairs[0] == [best // VOCABULARY, best % VOCABULARY]
    search = {**search, "num_beams": VOCABULARY, "max_new_tokens": 2, "length_penalty": 0.0}
    assert e2e.beam_search(model, PROMPTS, **search) == pairs


def test_the_prefix_takes_positions_too(tmp_path):
    model = attach_baseline(make_model("gpt2"), arguments("prefix"))
    e2e.beam_search(model, PROMPTS, num_beams=1, max_new_tokens=24)
    with pytest.raises(ValueError, match="take 33 of 32 positions"):
        e2e.beam_search(model, PROMPTS, num_beams=1, max_new_tokens=25)


def test_ours_are_the_libraries_own_trainer(tmp_path):
    assert isinstance(trainer_of("sara", tmp_path), SaraTrainer)


def test_without_the_module_of_unix_the_memory_is_not_measured(monkeypatch):
    assert baselines._peak_memory()["peak_memory_bytes"] > 50e6
    monkeypatch.setattr(baselines, "resource", None)
    assert "peak_memory_bytes" not in baselines._peak_memory()
