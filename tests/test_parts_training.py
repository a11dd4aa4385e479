"""Trainings of an adapter with parts, which are trained beside its updates: heads, norms and rows of embeddings."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ACTIVATION_CHECKPOINTING, base_state, logits, make_model, same_bits, sara_arguments
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import MODELS, At, log_of, make_classifier, make_trainer, training_arguments

from hf_sara import SaraAdapter, SaraTrainer
from hf_sara.storage import TENSORS_FILE

FORMAT_1 = Path(__file__).parent / "data" / "format1"
TOKENS = [4, 9, 21]
# By a name: the model, and the fields of its arguments that choose its parts.
SLOW = pytest.mark.slow
CASES = {
    "head": ("deep head", {}),
    "rows": ("llama", {"trainable_token_indices": TOKENS}),
    "tied rows": ("tied", {"trainable_token_indices": TOKENS}),
    "bf16 norm and tied rows": ("bf16 tied", {"modules_to_save": ["norm"], "trainable_token_indices": TOKENS}),
    "norm": ("llama", {"modules_to_save": ["norm"]}),
    "head and rows": ("classifier", {"trainable_token_indices": TOKENS}),
    "bf16 head and rows": ("bf16 classifier", {"trainable_token_indices": TOKENS}),
    "embedding and output": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


def trainer_of(case: str, folder, method: str = "sara", trainer_class=SaraTrainer, **changes):
    model, parts = CASES[case]
    sara_args = sara_arguments(method, dropout=0.1, **parts)
    return make_trainer(folder, model=MODELS[model](), sara_args=sara_args, trainer_class=trainer_class, **changes)


def attached(case: str, method: str = "sara"):
    """A model whose adapter has parts with values of their own."""
    name, parts = CASES[case]
    model = MODELS[name]()
    torch.manual_seed(3)
    adapter = SaraAdapter.attach(model, sara_arguments(method, **parts))
    tensors = {
        key: tensor + 0.1 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in adapter.state_dict().items()
    }
    adapter.load_state_dict({k: t.abs() if k.endswith("running_var") else t for k, t in tensors.items()})
    return model


def inputs_of(model) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 4, 9, 7, 21, 8], [4, 30, 31, 12, 9, 3]])
    labels = torch.tensor([0, 2]) if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stop(control) -> None:
    control.should_training_stop = True


# ---- resuming ----


@pytest.mark.parametrize(
    ("case", "method", "changes"),
    [
        ("head", "sara", {"gradient_accumulation_steps": 2}),
        ("head and rows", "mo_sara", {}),
        pytest.param("bf16 head and rows", "sara", {"gradient_accumulation_steps": 2, "bf16": True}, marks=SLOW),
        pytest.param("tied rows", "sara", {}, marks=SLOW),
        pytest.param("rows", "mo_sara", {"gradient_accumulation_steps": 2}, marks=SLOW),
        pytest.param("embedding and output", "mo_sara", {}, marks=SLOW),
    ],
    ids=str,
)
def test_a_resumed_run_with_parts_equals_the_uninterrupted_one(case, method, changes, tmp_path):
    whole = trainer_of(case, tmp_path / "whole", method, **changes)
    start = whole.sara_adapter.state_dict()
    whole.train()
    state = whole.sara_adapter.state_dict()
    kept = {part.key for part in whole.sara_adapter.parts if case == "rows" and not part.trained}
    assert all(torch.equal(tensor, start[name]) == (name in kept) for name, tensor in state.items())
    # The checkpoint of step 4 is between two log lines.
    parts = trainer_of(case, tmp_path / "parts", method, **changes)
    parts.add_callback(At(5, stop))
    parts.train()
    resumed = trainer_of(case, tmp_path / "parts", method, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert same_bits(resumed.sara_adapter.state_dict(), state)
    assert same_bits(base_state(resumed.model), base_state(MODELS[CASES[case][0]]()))
    assert log_of(resumed) == log_of(whole)


def test_a_finished_run_that_is_resumed_saves_the_same_bytes(tmp_path):
    for name in ("first", "again"):
        trainer = trainer_of("head and rows", tmp_path, max_steps=2)
        trainer.train(resume_from_checkpoint=name == "again")
        trainer.save_model(tmp_path / name)
    first, again = ((tmp_path / name / TENSORS_FILE).read_bytes() for name in ("first", "again"))
    assert first == again


@pytest.mark.parametrize(
    "case", ["head", "tied rows", *(pytest.param(c, marks=SLOW) for c in ("rows", "bf16 head and rows"))]
)
def test_the_best_checkpoint_brings_back_its_parts(case, tmp_path):
    class Scripted(SaraTrainer):
        losses = iter([3.0, 1.0, 2.0])

        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": next(self.losses)}

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    trainer = trainer_of(case, tmp_path, trainer_class=Scripted, **best)
    trainer.train()
    models = [MODELS[CASES[case][0]]() for _ in range(2)]
    fourth, last = (
        SaraAdapter.load(model, tmp_path / f"checkpoint-{step}").state_dict()
        for model, step in zip(models, (4, 6), strict=True)
    )
    found = trainer.sara_adapter.state_dict()
    assert same_bits(found, fourth)
    assert not any(torch.equal(found[name], last[name]) for name in trainer.sara_adapter.trained())
    inputs = inputs_of(trainer.model)
    assert torch.equal(logits(trainer.model, **inputs), logits(models[0], **inputs))
    # Whoever reads the weights finds the best values too.
    for one, other in zip(trainer.model.parameters(), models[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        ({"modules_to_save": ["norm"]}, {}, "norm"),
        ({}, {"modules_to_save": ["norm"]}, "norm"),
        ({"modules_to_save": ["norm"]}, {"modules_to_save": ["lm_head"]}, "lm_head.*norm"),
        ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3, 4]}, r"embed_tokens.*3, 4.*3, 5"),
        ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3]}, "embed_tokens"),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_parts_is_refused_by_name(here, there, message, tmp_path):
    make_trainer(tmp_path, sara_args=sara_arguments(**there), max_steps=2).train()
    other = make_trainer(tmp_path, sara_args=sara_arguments(**here))
    start = other.sara_adapter.state_dict()
    with pytest.raises(ValueError, match=f"belongs to another adapter.*parts.*{message}"):
        other.train(resume_from_checkpoint=True)
    assert same_bits(other.sara_adapter.state_dict(), start)


def test_a_checkpoint_of_the_first_format_has_no_parts(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    for file in (FORMAT_1 / "sara-llama").iterdir():
        shutil.copy(file, checkpoint)
    args = SaraAdapter.load(make_model(), FORMAT_1 / "sara-llama").args
    make_trainer(tmp_path, sara_args=args).train(resume_from_checkpoint=True)
    args = sara_arguments(threshold=args.threshold, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"parts.*\[\] there.*norm"):
        make_trainer(tmp_path, sara_args=args).train(resume_from_checkpoint=str(checkpoint))


# ---- other ways to train ----


@pytest.mark.slow
def test_a_hyperparameter_search_tries_parts(tmp_path):
    optuna = pytest.importorskip("optuna")
    seen = []

    class Recording(SaraTrainer):
        def evaluate(self, *args, **kwargs):
            seen.append([part.name for part in self.sara_adapter.parts])
            return super().evaluate(*args, **kwargs)

    trainer = Recording(
        model_init=lambda: make_classifier(),
        args=training_arguments(tmp_path, max_steps=1, save_strategy="no"),
        sara_args=sara_arguments(),
        train_dataset=make_trainer(tmp_path, model=make_classifier()).train_dataset,
        eval_dataset=make_trainer(tmp_path, model=make_classifier()).eval_dataset,
    )
    choices = {"head": None, "none": [], "norm": ["score", "norm"]}
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"modules_to_save": choices[trial.suggest_categorical("parts", list(choices))]},
        n_trials=3,
        backend="optuna",
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"parts": list(choices)}),
    )
    assert sorted(seen) == [[], ["model.norm", "score"], ["score"]]


@pytest.mark.slow  # Compiling takes seconds.
@pytest.mark.parametrize("case", ["bf16 norm and tied rows", "head", "bf16 head and rows"])
def test_a_compiled_model_with_parts_computes_the_same(case):
    model = attached(case)
    inputs = inputs_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model(**inputs).loss.backward()
    trained = model.sara_adapter.trained()
    gradients = {name: tensor.grad.clone() for name, tensor in trained.items()}
    expected = logits(model, **inputs)
    assert torch.equal(logits(compiled, **inputs), expected)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, tensor in trained.items():
        # What is compiled rounds to bfloat16 in other places.
        assert torch.cosine_similarity(tensor.grad.flatten(), gradients[name].flatten(), dim=0) > 0.999, name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["head", "tied rows"])
def test_activation_checkpointing_trains_the_same_parts(case, reentrant, tmp_path):
    def trained(**changes):
        trainer = trainer_of(case, tmp_path, save_strategy="no", max_steps=3, **changes)
        trainer.train()
        return trainer.sara_adapter.state_dict()

    plain = trained()
    asked = {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    for name, tensor in trained(**asked).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["head", "norm", "tied rows", "head and rows", "embedding and output"])
def test_parts_train_in_float32_whatever_the_base_and_autocast_compute_in(case, base):
    plain = attached(case)
    inputs = inputs_of(plain)
    expected = plain(**inputs)
    expected.loss.backward()
    model = MODELS[CASES[case][0]]().to(base)
    adapter = SaraAdapter.attach(model, plain.sara_adapter.args)
    adapter.load_state_dict(plain.sara_adapter.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs)
    torch.testing.assert_close(
        found.logits.float(), expected.logits, rtol=0.1, atol=0.1 * expected.logits.std().item()
    )
    found.loss.backward()
    assert {tensor.dtype for tensor in adapter.trained().values()} == {torch.float32}
    for part in adapter.parts:
        for name in part.trained_shapes():
            one, other = (a.trained()[name].grad for a in (adapter, plain.sara_adapter))
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9, name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", ["head", "norm", "rows", "tied rows", "bf16 head and rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_model_takes_another_dtype_together_with_its_parts(case, dtype, tmp_path):
    model = attached(case)
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    base = logits(MODELS[CASES[case][0]]().to(dtype), **inputs)
    model.to(dtype)
    after = logits(model, **inputs)
    assert after.dtype == base.dtype
    torch.testing.assert_close(after.float(), before.float(), rtol=0.05, atol=0.1 * before.std().item())
    with model.sara_adapter.disabled():
        assert torch.equal(logits(model, **inputs), base)
    assert torch.equal(logits(model, **inputs), after)
    model.sara_adapter.save_pretrained(tmp_path)
    fresh = MODELS[CASES[case][0]]()
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh.to(dtype), **inputs), after)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_of_a_model_has_parts_of_its_own(case, clone):
    model = attached(case)
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    other = clone(model)
    assert torch.equal(logits(other, **inputs), before)
    state = model.sara_adapter.state_dict()
    other.sara_adapter.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert not torch.equal(logits(other, **inputs), before)
    other.sara_adapter.detach()
    assert torch.equal(logits(other, **inputs), logits(MODELS[CASES[case][0]](), **inputs))
    assert not [name for name, _ in other.named_modules() if "sara" in name]
    assert torch.equal(logits(model, **inputs), before)
    assert same_bits(model.sara_adapter.state_dict(), state)
    owners: list[nn.Module] = [model, other]
    assert not {id(p) for p in owners[0].parameters()} & {id(p) for p in owners[1].parameters()}


# ---- tensors that are spread over processes ----


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def spread(case: str):
    model = attached(case)
    for parameter in model.parameters():
        # FSDP takes these only.
        parameter.data = parameter.data.contiguous()
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("case", ["norm", "tied rows"])
def test_parts_that_fsdp_spreads_are_not_switched(case, group):
    model = spread(case)
    adapter = model.sara_adapter
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    for action in (adapter.disable, adapter.merge, adapter.detach, lambda: adapter.disabled().__enter__()):
        with pytest.raises(ValueError, match=r"(norm|embed_tokens): FSDP or DeepSpeed spreads"):
            action()
    adapter.enable()
    assert not adapter.merged
    assert torch.equal(logits(model, **inputs), before)


def test_what_is_loaded_after_an_evaluation_with_fsdp_stays(group):
    model = spread("norm")
    adapter = model.sara_adapter
    inputs = inputs_of(model)
    # The root's tensors stay whole after this.
    logits(model, **inputs)
    state = {name: 2 * tensor for name, tensor in adapter.state_dict().items()}
    logits(model, **inputs)
    adapter.load_state_dict(state)
    model.reshard()
    assert same_bits(adapter.state_dict(), state)
