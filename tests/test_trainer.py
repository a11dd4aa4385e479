import json
import logging
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ACTIVATION_CHECKPOINTING, base_state, logits, make_inputs, make_model, same_bits, sara_arguments
from datasets import Dataset
from torch import nn
from training import STEPS, TWO_PROCESSES, At, dataset, log_of, make_trainer, run_script, training_arguments
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from hf_sara import AdapterError, SaraAdapter, SaraArguments, SaraSeq2SeqTrainer, SaraTrainer, SaraTrainerMixin
from hf_sara.checkpoints import LIST_FILE
from hf_sara.hub import TRAINING_ARGS_FILE
from hf_sara.model_card import CARD_FILE, LOSS_FILE, RANKS_FILE
from hf_sara.storage import CONFIG_FILE, TENSORS_FILE
from hf_sara.trainer import RUNNING_LOSS_FILE, last_complete_checkpoint


def stopped_at(step: int, folder, method: str, **changes):
    """A run that ends after a step, whatever is saved by then."""
    trainer = make_trainer(folder, method, **changes)

    def stop(control):
        control.should_training_stop = True

    trainer.add_callback(At(step, stop))
    trainer.train()
    return trainer


# ---- what is trained and what is written ----


def test_only_the_adapter_is_trained_and_the_base_keeps_its_bits(method, tmp_path):
    model = make_model()
    state = base_state(model)
    trainer = make_trainer(tmp_path, method, model=model)
    start = trainer.sara_adapter.state_dict()
    result = trainer.train()
    assert trainer.model is model
    assert result.global_step == STEPS
    assert math.isfinite(result.training_loss)
    assert same_bits(base_state(model), state)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trainer.sara_adapter.state_dict().items())


def test_a_checkpoint_holds_the_adapter_and_the_state_of_the_training_not_the_base(method, tmp_path):
    trainer = make_trainer(tmp_path, method, save_steps=STEPS)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert {path.name for path in checkpoint.iterdir()} == {
        CONFIG_FILE,
        TENSORS_FILE,
        TRAINING_ARGS_FILE,
        RUNNING_LOSS_FILE,
        LIST_FILE,
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    # Two moments per trained parameter, and nothing of the frozen base.
    moments = sum(2 * tensor.numel() * 4 for tensor in trainer.sara_adapter.trained().values())
    count = len(trainer.sara_adapter.trained())
    assert moments < (checkpoint / "optimizer.pt").stat().st_size < moments + 1000 * count + 10_000


def test_a_saved_model_is_the_adapter_alone_and_does_what_it_did(method, tmp_path):
    trainer = make_trainer(tmp_path / "run", method, save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    card = {CARD_FILE, RANKS_FILE, LOSS_FILE}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} - card == {
        *(CONFIG_FILE, TENSORS_FILE, TRAINING_ARGS_FILE)
    }
    assert (tmp_path / "adapter" / CARD_FILE).is_file()
    fresh = make_model()
    SaraAdapter.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(trainer.model), rtol=0, atol=1e-6)


def test_no_token_is_written(tmp_path):
    trainer = make_trainer(tmp_path, hub_token="hf_secretsecretsecret", save_steps=STEPS)
    trainer.train()
    trainer.save_model()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(b"secretsecret" in path.read_bytes() for path in written)
    assert json.loads((tmp_path / TRAINING_ARGS_FILE).read_text())["learning_rate"] == 0.02


def test_the_start_follows_from_the_seed_of_the_arguments(method, tmp_path):
    def start(seed):
        return make_trainer(tmp_path, method, seed=seed).sara_adapter.state_dict()

    assert same_bits(start(1), start(1))
    assert not same_bits(start(1), start(2))


def test_weight_decay_applies_to_every_trained_tensor(method, tmp_path):
    trainer = make_trainer(tmp_path, method)
    trained = trainer.sara_adapter.trained()
    optimizer = trainer.create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.01 for p in group["params"]}
    assert decayed == {id(tensor) for tensor in trained.values()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


# ---- resuming ----


def test_batches_grouped_by_length_are_the_same_in_a_run_resumed_in_a_later_epoch(tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    options |= {"max_steps": 14, "save_steps": 8}

    def trainer_in(folder):
        trainer = make_trainer(folder, "sara", model=make_model(), **options)
        # What is grouped by; the rows can stay as they are.
        lengths = [3 + index % 7 for index in range(24)]
        trainer.train_dataset = dataset().remove_columns("length").add_column("length", lengths)
        return trainer

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    # Six batches make an epoch: step 8 is in the second one.
    resumed = trainer_in(tmp_path / "resumed")
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)


def test_a_resumed_run_equals_the_uninterrupted_one(method, tmp_path):
    whole = make_trainer(tmp_path / "whole", method)
    result = whole.train()
    # A checkpoint between two log lines: the loss since the last one has to travel.
    stopped_at(5, tmp_path / "parts", method)
    resumed = make_trainer(tmp_path / "parts", method, model=make_model())
    continued = resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)
    assert continued.training_loss == pytest.approx(result.training_loss, rel=1e-6)


@pytest.mark.parametrize("steps", [STEPS, 12])
def test_a_finished_run_that_is_resumed_trains_no_further(steps, tmp_path):
    # 12 steps are the end of an epoch, 7 are not.
    whole = make_trainer(tmp_path, max_steps=steps)
    result = whole.train()
    again = make_trainer(tmp_path, max_steps=steps)
    seconds = json.loads((tmp_path / f"checkpoint-{steps}" / RUNNING_LOSS_FILE).read_text())["seconds"]
    assert 0.0 < seconds <= whole.training_seconds
    continued = again.train(resume_from_checkpoint=True)
    assert continued.global_step == steps
    assert continued.training_loss == pytest.approx(result.training_loss, rel=1e-6)
    assert same_bits(again.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    # What it took counts the first call too.
    assert again.training_seconds >= seconds


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"lr_scheduler_type": "cosine"}]
)
def test_a_resumed_run_equals_the_uninterrupted_one_with_other_settings(changes, tmp_path):
    whole = make_trainer(tmp_path / "whole", "mo_sara", **changes)
    whole.train()
    stopped_at(3, tmp_path / "parts", "mo_sara", **changes)
    resumed = make_trainer(tmp_path / "parts", "mo_sara", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)


# New processes take most of the time.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["sara", "mo_sara"])
def test_a_killed_run_ends_with_the_bits_and_the_log_of_the_uninterrupted_one(method, tmp_path):
    whole = make_trainer(tmp_path / "whole", method)
    whole.train()
    folder = tmp_path / "killed"
    killed = run_script(str(folder), method, "5", "{}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "checkpoint-4").is_dir()
    assert not (folder / "rank0.pt").exists()
    resumed = run_script(str(folder), method, "0", json.dumps({"resume_from_checkpoint": True}))
    assert resumed.returncode == 0, resumed.stderr
    assert same_bits(torch.load(folder / "rank0.pt"), whole.sara_adapter.state_dict())
    assert json.loads((folder / "log0.json").read_text()) == json.loads(json.dumps(log_of(whole)))


def test_a_checkpoint_that_a_crash_cut_off_is_passed_over(tmp_path, caplog):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    stopped_at(4, tmp_path / "parts", "sara")
    (tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.')
    resumed = make_trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4" in caplog.text
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())


def test_without_a_complete_checkpoint_resuming_is_an_error(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"threshold": 0.6}, "q_proj: k="), ({"layers": "0"}, "layers.1"), ({"num_heads": 2}, "num_heads: 3 there, 2")],
)
def test_a_checkpoint_of_another_adapter_is_refused_before_the_optimizer_loads(
    changes, message, tmp_path, monkeypatch
):
    stopped_at(2, tmp_path, "mo_sara")
    other = make_trainer(tmp_path, sara_args=sara_arguments("mo_sara", **changes))
    start = other.sara_adapter.state_dict()
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert same_bits(other.sara_adapter.state_dict(), start)


# ---- the best checkpoint ----


def best_arguments(**changes):
    return {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, **changes}


def test_the_best_checkpoint_is_loaded_at_the_end(method, tmp_path):
    class Scripted(SaraTrainer):
        losses = iter([3.0, 1.0, 2.0])

        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": next(self.losses)}

    trainer = make_trainer(tmp_path, method, trainer_class=Scripted, **best_arguments())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best, last = (SaraAdapter.load(make_model(), tmp_path / f"checkpoint-{step}").state_dict() for step in (4, 6))
    assert same_bits(trainer.sara_adapter.state_dict(), best)
    assert not same_bits(trainer.sara_adapter.state_dict(), last)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_best_checkpoint_that_cannot_be_loaded_is_an_error(damage, tmp_path):
    trainer = make_trainer(tmp_path, **best_arguments())

    class Spoil(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "train_loss" in logs:
                file = Path(state.best_model_checkpoint, TENSORS_FILE)
                file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-8])

    trainer.add_callback(Spoil())
    with pytest.raises((FileNotFoundError, AdapterError), match="checkpoint"):
        trainer.train()


# ---- other ways to start ----


def test_a_plain_training_arguments_and_no_sara_arguments_train_the_default(tmp_path):
    trainer = SaraTrainer(
        model=make_model(), args=TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True), train_dataset=dataset()
    )
    trainer.train()
    assert trainer.sara_adapter.args == SaraArguments()


def test_without_training_arguments_trainer_takes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SaraTrainer(model=make_model(), sara_args=sara_arguments(), train_dataset=dataset())
    assert trainer.sara_adapter.num_parameters() > 0


def test_an_attached_adapter_is_trained_on(method, tmp_path):
    model = make_model()
    adapter = SaraAdapter.attach(model, sara_arguments(method))
    args = training_arguments(tmp_path, max_steps=1)
    assert SaraTrainer(model=model, args=args, train_dataset=dataset()).sara_adapter is adapter
    same = replace(adapter.args)
    assert SaraTrainer(model=model, args=args, sara_args=same, train_dataset=dataset()).sara_adapter is adapter
    with pytest.raises(ValueError, match="already carries"):
        SaraTrainer(model=model, args=args, sara_args=sara_arguments(method, threshold=0.9))


def test_a_merged_adapter_is_not_trained(tmp_path):
    model = make_model()
    SaraAdapter.attach(model, sara_arguments()).merge()
    with pytest.raises(ValueError, match="merged"):
        SaraTrainer(model=model, args=training_arguments(tmp_path), train_dataset=dataset())


def test_model_init_gives_every_training_a_new_adapter_and_trains_it_alone(method, tmp_path):
    trainer = SaraTrainer(
        model_init=lambda: make_model(),
        args=training_arguments(tmp_path),
        sara_args=sara_arguments(method),
        train_dataset=dataset(),
    )
    trainer.train()
    first = trainer.sara_adapter
    assert same_bits(base_state(trainer.model), base_state(make_model()))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == first.num_parameters()
    trainer.train()
    assert trainer.sara_adapter is not first
    assert same_bits(trainer.sara_adapter.state_dict(), first.state_dict())


@pytest.mark.slow
def test_a_hyperparameter_search_tries_fields_of_both_arguments(tmp_path, caplog):
    optuna = pytest.importorskip("optuna")
    seen = []

    class Recording(SaraTrainer):
        def evaluate(self, *args, **kwargs):
            adapter = self.sara_adapter
            seen.append((adapter.args.threshold, adapter.num_parameters(), self.args.learning_rate))
            return super().evaluate(*args, **kwargs)

    trainer = Recording(
        model_init=lambda: make_model(),
        args=training_arguments(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no"),
        sara_args=sara_arguments("mo_sara"),
        train_dataset=dataset(),
        eval_dataset=dataset(8),
    )

    def space(trial):
        return {
            "threshold": trial.suggest_categorical("threshold", [0.2, 0.9]),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
        }

    sampler = optuna.samplers.GridSampler({"threshold": [0.2, 0.9], "learning_rate": [1e-3, 9e-3]})
    best = trainer.hyperparameter_search(
        hp_space=space, n_trials=4, backend="optuna", direction="minimize", sampler=sampler
    )
    assert set(best.hyperparameters) == {"threshold", "learning_rate"}
    assert {threshold for threshold, _, _ in seen} == {0.2, 0.9}
    assert {rate for _, _, rate in seen} == {1e-3, 9e-3}
    small, large = (next(n for t, n, _ in seen if t == threshold) for threshold in (0.2, 0.9))
    assert small < large
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any("threshold" in warning for warning in warnings)


def test_another_trainer_takes_the_mixin(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class MySaraTrainer(SaraTrainerMixin, Mine):
        pass

    plain = make_trainer(tmp_path / "plain")
    doubled = make_trainer(tmp_path / "doubled", trainer_class=MySaraTrainer)
    assert doubled.evaluate()["eval_loss"] == pytest.approx(2 * plain.evaluate()["eval_loss"])
    doubled.train()


def test_a_sequence_to_sequence_model_trains_and_generates(method, tmp_path):
    model = make_model("t5")
    inputs = make_inputs(model, batch=4)
    data = Dataset.from_dict({name: inputs[name].tolist() for name in ("input_ids", "labels")})
    values = training_arguments(tmp_path).to_dict()
    args = Seq2SeqTrainingArguments(
        **{name: values[name] for name in ("output_dir", "max_steps", "use_cpu", "disable_tqdm")},
        predict_with_generate=True,
    )
    trainer = SaraSeq2SeqTrainer(
        model=model, args=args, sara_args=sara_arguments(method), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    trainer.save_model()
    generated = trainer.predict(data).predictions
    fresh = make_model("t5")
    SaraAdapter.load(fresh, tmp_path)
    with torch.no_grad():
        expected = fresh.generate(input_ids=inputs["input_ids"])
    assert torch.equal(torch.tensor(generated)[:, : expected.shape[1]], expected)


def test_a_classifier_trains_with_metrics(method, tmp_path):
    model = make_model("bert")
    inputs = make_inputs(model, batch=8)
    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in inputs.items()})
    trainer = SaraTrainer(
        model=model,
        args=training_arguments(tmp_path),
        sara_args=sara_arguments(method),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    assert 0.0 <= trainer.evaluate()["eval_accuracy"] <= 1.0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_the_same_adapter(family, reentrant, tmp_path):
    inputs = make_inputs(make_model(family), batch=4)
    data = [{name: tensor[i] for name, tensor in inputs.items() if name != "attention_mask"} for i in range(4)]

    def trained(**changes):
        trainer = SaraTrainer(
            model=make_model(family),
            args=training_arguments(tmp_path, save_strategy="no", **changes),
            sara_args=sara_arguments("mo_sara"),
            train_dataset=data,
        )
        trainer.train()
        hooks = getattr(trainer.model, "_require_grads_hooks", [])
        return trainer.sara_adapter.state_dict(), hooks

    plain, _ = trained()
    asked = {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    checkpointed, hooks = trained(**asked)
    # What Trainer itself puts on a model of tokens stays; what we put on others goes.
    assert family != "vit" or not hooks
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_saves_clean_names(method, tmp_path):
    trainer = make_trainer(tmp_path, method, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    trainer.train()
    trainer.save_model()
    fresh = make_model()
    adapter = SaraAdapter.load(fresh, tmp_path)
    assert same_bits(adapter.state_dict(), trainer.sara_adapter.state_dict())


def test_a_quantized_base_is_accepted_since_the_adapter_is_one(tmp_path):
    model = make_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=training_arguments(tmp_path))
    SaraTrainer(model=model, args=training_arguments(tmp_path), sara_args=sara_arguments(), train_dataset=dataset())
    assert not model._hf_peft_config_loaded


# ---- the loss ----


def test_label_smoothing_shifts_and_smooths_as_cross_entropy_does(method, tmp_path):
    trainer = make_trainer(tmp_path, method, label_smoothing_factor=0.1)
    trainer.model.eval()
    batch = {"input_ids": torch.tensor(dataset()["input_ids"][:3]), "labels": torch.tensor(dataset()["labels"][:3])}
    batch["labels"][:, :3] = -100
    with torch.no_grad():
        scores = trainer.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = F.cross_entropy(scores, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_generation_has_its_cache_again_after_training(tmp_path):
    model = make_model()
    assert model.config.use_cache
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert model.config.use_cache
    off = make_model()
    off.config.use_cache = False
    trainer = make_trainer(tmp_path, model=off)
    trainer.train()
    assert not off.config.use_cache


def test_an_adapter_that_cannot_learn_is_an_error_that_names_its_tensors(tmp_path):
    model = make_model()
    # No loss depends on this projection.
    model.extra = nn.Linear(24, 24, bias=False)
    trainer = make_trainer(tmp_path, model=model, sara_args=sara_arguments(target_modules=["extra"]))
    with pytest.raises(RuntimeError, match=r"none of the 3 trained tensors had a gradient: extra\.U"):
        trainer.train()


def test_a_tensor_that_somebody_froze_is_an_error_that_names_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.sara_adapter.trained()["model.layers.0.self_attn.q_proj.U"].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"frozen and would not train: model\.layers\.0\.self_attn\.q_proj\.U"):
        trainer.train()


def test_a_disabled_adapter_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.sara_adapter.disable()
    with pytest.raises(ValueError, match=r"'default' is disabled, so nothing would train. Call adapter.enable\(\)"):
        trainer.train()


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_end_with_the_same_adapter_as_one_with_their_batches(tmp_path):
    arguments = json.dumps({"per_device_train_batch_size": 1, "sara_args": {"dropout": 0.0}})
    run = run_script(str(tmp_path), "mo_sara", "0", arguments, launcher=TWO_PROCESSES)
    assert run.returncode == 0, run.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same_bits(*ranks)
    assert same_bits(SaraAdapter.load(make_model(), tmp_path).state_dict(), ranks[0])
    check_is_what_one_process_trains(ranks[0], "mo_sara", tmp_path / "single")


def check_is_what_one_process_trains(found: dict[str, torch.Tensor], method: str, folder: Path) -> None:
    single = make_trainer(folder, method, dropout=0.0)
    single.train()
    for name, tensor in single.sara_adapter.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def zero(stage: int) -> dict:
    sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **sizes}}


def run_sharded(folder: Path, method: str, sara_args=None, **arguments) -> dict[str, torch.Tensor]:
    """Train on two processes with one example each; returns the trained tensors."""
    arguments |= {"per_device_train_batch_size": 1, "sara_args": {"dropout": 0.0, **(sara_args or {})}}
    run = run_script(str(folder), method, "0", json.dumps(arguments), launcher=TWO_PROCESSES, DS_ACCELERATOR="cpu")
    assert run.returncode == 0, run.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert same_bits(*ranks)
    # The class is the base's own, not FSDP's, so that others can load it.
    assert json.loads((folder / CONFIG_FILE).read_text())["base"]["class"] == "LlamaForCausalLM"
    assert same_bits(SaraAdapter.load(make_model(), folder).state_dict(), ranks[0])
    return ranks[0]


def check_resuming(tmp_path: Path, whole: dict[str, torch.Tensor], method: str, **arguments) -> None:
    """Go on from step 4 of the run in the folder `whole`: the bits and the log are the same in the end."""
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", parts / "checkpoint-4")
    assert same_bits(run_sharded(parts, method, **arguments, resume_from_checkpoint=True), whole)
    log = [json.loads((tmp_path / part / "log0.json").read_text()) for part in ("whole", "parts")]
    assert log[0] == log[1]


@pytest.mark.slow
def test_fsdp_ends_with_the_same_adapter_as_one_process(tmp_path):
    found = run_sharded(tmp_path, "sara", **FSDP)
    check_is_what_one_process_trains(found, "sara", tmp_path / "single")


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [("sara", {}), ("sara", {ACTIVATION_CHECKPOINTING: True}), ("mo_sara", {"bf16": True})],
    ids=str,
)
def test_fsdp_resumes_exactly_and_loads_the_best(method, changes, tmp_path):
    changes = {**FSDP, **changes, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = run_sharded(tmp_path / "whole", method, **changes)
    state = json.loads((tmp_path / "whole" / "checkpoint-7" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert same_bits(SaraAdapter.load(make_model(), best).state_dict(), whole)
    check_resuming(tmp_path, whole, method, **changes)


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [("sara", 2), ("sara", 3), ("mo_sara", 3)])
def test_deepspeed_ends_with_the_same_adapter_and_resumes_exactly(method, stage, tmp_path):
    pytest.importorskip("deepspeed", reason="needs: pip install -e '.[deepspeed]'")
    factors = {"factors": "save"} if method == "mo_sara" else {}
    whole = run_sharded(tmp_path / "whole", method, factors, **zero(stage))
    check_is_what_one_process_trains(whole, method, tmp_path / "single")
    check_resuming(tmp_path, whole, method, sara_args=factors, **zero(stage))


def test_the_first_fsdp_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match="FSDP1 is not supported"):
        trainer.train()
