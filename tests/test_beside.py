"""hf_sara beside other tools, with the real ones: TRL, Transformers' pipelines, lm_eval, TensorBoard."""

import math

import pytest
import torch
from conftest import (
    attach_trained,
    base_state,
    logits,
    make_base,
    make_model,
    make_tokenizer,
    same_bits,
    sara_arguments,
    train,
)
from datasets import Dataset
from datasets.utils import disable_progress_bars
from training import STEPS, At, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback, pipeline
from with_trl import DATA, trl_settings

from hf_sara import SaraAdapter, SaraTrainer, SaraTrainerMixin, from_hub
from hf_sara.checkpoints import LIST_FILE
from hf_sara.hub import TRAINING_ARGS_FILE
from hf_sara.model_card import CARD_FILE, LOSS_FILE, RANKS_FILE
from hf_sara.storage import CONFIG_FILE, TENSORS_FILE
from hf_sara.trainer import RUNNING_LOSS_FILE

disable_progress_bars()

TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }}{{ eos_token }}{% endfor %}"


def token_ids(length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(3, 200, (2, length), generator=generator)}


# ---- TRL ----


def make_sft_trainer(trl, folder, method="sara", form="text", model=None, **changes):
    class SaraSFTTrainer(SaraTrainerMixin, trl.SFTTrainer):
        pass

    model = make_base() if model is None else model
    tokenizer = None if isinstance(model, str) else make_tokenizer()
    if form == "conversation" and "chat_template_path" not in changes:
        tokenizer.chat_template = TEMPLATE
    data = Dataset.from_dict(DATA[form])
    return SaraSFTTrainer(
        model=model,
        args=trl.SFTConfig(**trl_settings(folder, **changes)),
        sara_args=sara_arguments(method, threshold=0.9, dropout=0.1),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )


def losses(trainer) -> list[dict[str, float]]:
    """What was logged of each loss, without TRL's own sums, which TRL starts anew when a run is resumed."""
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["text", "prompt and completion", "conversation"])
def test_trl_trains_the_adapter_alone_on_every_form_of_data(trl, form, method, tmp_path):
    model = make_base()
    state = base_state(model)
    trainer = make_sft_trainer(trl, tmp_path, method, form, model)
    start, loss = trainer.sara_adapter.state_dict(), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss - 0.2
    assert same_bits(base_state(model), state)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trainer.sara_adapter.state_dict().items())

    names = {path.name for path in (tmp_path / "checkpoint-16").iterdir()}
    state_files = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", LIST_FILE, RUNNING_LOSS_FILE}
    tokenizer_files = {name for name in names if name.startswith(("tokenizer", "chat_template"))}
    assert "tokenizer.json" in tokenizer_files
    assert names - tokenizer_files == {CONFIG_FILE, TENSORS_FILE, TRAINING_ARGS_FILE, *state_files}

    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names - tokenizer_files - {RANKS_FILE, LOSS_FILE} == {
        CONFIG_FILE,
        TENSORS_FILE,
        TRAINING_ARGS_FILE,
        CARD_FILE,
    }
    fresh = make_base()
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, **token_ids()), logits(model, **token_ids()))
    assert not torch.equal(logits(make_base(), **token_ids()), logits(model, **token_ids()))


@pytest.mark.one_in(2)
def test_a_resumed_trl_run_equals_the_uninterrupted_one(trl, method, tmp_path):
    whole = make_sft_trainer(trl, tmp_path / "whole", method)
    whole.train()
    parts = make_sft_trainer(trl, tmp_path / "parts", method)
    parts.add_callback(At(10, lambda control: setattr(control, "should_training_stop", True)))
    parts.train()
    resumed = make_sft_trainer(trl, tmp_path / "parts", method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert losses(resumed) == losses(whole)


def test_trl_loads_a_model_by_its_name(trl, base_folder, method, tmp_path):
    trainer = make_sft_trainer(trl, tmp_path, method, model=base_folder)
    again = make_sft_trainer(trl, tmp_path, method, model=base_folder)
    assert same_bits(trainer.sara_adapter.state_dict(), again.sara_adapter.state_dict())
    trainer.train()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trained == trainer.sara_adapter.num_parameters()
    trainer.save_model()
    loaded = from_hub(tmp_path, base_model=base_folder)
    assert torch.equal(logits(loaded, **token_ids()), logits(trainer.model, **token_ids()))


def test_a_template_that_trl_gives_the_tokenizer_is_saved_with_the_adapter(trl, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    changes = {"chat_template_path": str(tmp_path / "template.jinja"), "save_strategy": "no"}
    trainer = make_sft_trainer(trl, tmp_path / "run", form="conversation", **changes)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEMPLATE


def test_the_card_says_what_trl_knows(trl, tmp_path):
    trainer = make_sft_trainer(trl, tmp_path, save_strategy="no", eos_token="<|endoftext|>")
    trainer.train()
    trainer.save_model()
    # As TRL's own scripts name it: trainer.push_to_hub(dataset_name=...).
    trainer.create_model_card(dataset_name="someone/sentences")
    card = (tmp_path / CARD_FILE).read_text()
    metadata = card.split("---")[1]
    assert all(line in metadata for line in ("- hf_sara\n", "- trl\n", "- sft\n", "- someone/sentences\n"))
    settings = card.split("| setting | value |")[1].split("\n\n")[0]
    assert "| learning\\_rate | 0.05 |" in settings
    assert "token" not in settings


def test_dpo_trains_the_adapter_against_its_base(trl, base_folder, tokenizer, tmp_path):
    class SaraDPOTrainer(SaraTrainerMixin, trl.DPOTrainer):
        pass

    trainer = SaraDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder),
        args=trl.DPOConfig(**trl_settings(tmp_path, logging_steps=1, save_strategy="no")),
        sara_args=sara_arguments("mo_sara", dropout=0.5),
        train_dataset=Dataset.from_dict(DATA["preference"]),
        processing_class=tokenizer,
    )
    assert SaraAdapter.of(trainer.ref_model) is None
    # DPOConfig turns dropout off, ours with it.
    assert {delta.dropout.p for _, delta in SaraAdapter.of(trainer.model).deltas()} == {0}
    trainer.train()
    first, *_, last = (row for row in trainer.state.log_history if "loss" in row)
    # Mo-SARA starts at its base, which is the reference.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["loss"] < first["loss"] - 0.01
    assert last["rewards/margins"] > 0.01
    trainer.save_model()
    fresh = make_base()
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, **token_ids()), logits(trainer.model, **token_ids()))


# ---- pipelines ----


def generated(model, tokenizer, prompt: str, **options) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_a_pipeline_generates_with_the_adapter(method, base_folder, tokenizer, tmp_path):
    model = make_base()
    adapter = train(attach_trained(model, method, threshold=0.9), steps=20)
    adapter.save_pretrained(tmp_path)
    prompt = "The quick brown"
    expected = generated(model, tokenizer, prompt)
    with adapter.disabled():
        assert generated(model, tokenizer, prompt) != expected
    for adapted in (model, from_hub(tmp_path, base_model=base_folder)):
        generator = pipeline("text-generation", model=adapted, tokenizer=tokenizer)
        assert generator(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"] == expected


# ---- lm_eval ----


def test_lm_eval_scores_and_generates_with_the_adapter(method, tokenizer):
    reason = "needs lm_eval: pip install -e '.[interop]'"
    lm = pytest.importorskip("lm_eval.models.huggingface", reason=reason)
    instance = pytest.importorskip("lm_eval.api.instance", reason=reason)
    pairs = [("The quick brown", " fox"), ("The lazy", " dog jumps over"), ("fox :", " |")]
    model = make_base()
    adapter = attach_trained(model, method, threshold=0.9)
    harness = lm.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)

    def scored() -> list[float]:
        requests = [instance.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    def expected(context: str, continuation: str) -> float:
        start, ids = len(tokenizer.encode(context)), torch.tensor([tokenizer.encode(context + continuation)])
        scores = logits(model, input_ids=ids)[0, start - 1 : -1].log_softmax(-1)
        return float(scores.gather(1, ids[0, start:, None]).sum())

    found = scored()
    assert found == pytest.approx([expected(*pair) for pair in pairs], abs=1e-4)
    with adapter.disabled():
        base = scored()
    assert all(abs(score - other) > 1e-2 for score, other in zip(found, base, strict=True))

    options = {"until": ["\n\n"], "max_gen_toks": 8}
    request = instance.Instance("generate_until", {}, ("The quick brown", options), 0)
    (text,) = harness.generate_until([request], disable_tqdm=True)
    assert "The quick brown" + text == generated(model, tokenizer, "The quick brown")


# ---- callbacks ----


def test_tensorboard_has_the_losses(method, tmp_path):
    reason = "needs TensorBoard: pip install -e '.[test]'"
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    trainer = make_trainer(tmp_path, method, report_to="tensorboard", logging_steps=1, save_strategy="no")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = events.EventAccumulator(str(file.parent)).Reload()
    written = {event.step: event.value for event in accumulator.Scalars("train/loss")}
    logged = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert list(written) == list(range(1, STEPS + 1))
    assert written == pytest.approx(logged)


def test_a_callback_sees_the_adapter(method, tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.sizes = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.sizes.append(sum(float(tensor.detach().norm()) for tensor in model.sara_adapter.trained().values()))

    watch = Watch()
    trainer = make_trainer(tmp_path, method, save_strategy="no")
    trainer.add_callback(watch)
    trainer.train()
    assert len(set(watch.sizes)) == STEPS


def test_early_stopping_ends_the_training_with_the_best_adapter(method, tmp_path):
    class Scripted(SaraTrainer):
        scores = iter([3.0, 1.0, 2.0, 0.5])

        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = next(self.scores)
            return output

    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = make_trainer(
        tmp_path, method, Scripted, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=2, **settings
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert trainer.state.global_step == 3
    best, last = (SaraAdapter.load(make_model(), tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 3))
    assert same_bits(trainer.sara_adapter.state_dict(), best)
    assert not same_bits(best, last)
