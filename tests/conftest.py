"""Tiny random models of every family, and what the tests share. Nothing here touches a network."""

import gc
import itertools
import json
import os
from collections import defaultdict
from pathlib import Path

# huggingface_hub reads this when it is imported, so it is set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from faults.counting import pytest_terminal_summary, tried  # noqa: F401
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import logging as transformers_logging

from hf_sara import SaraAdapter, SaraArguments, factors

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    variants = defaultdict(itertools.count)
    for item in items:
        if mark := item.get_closest_marker("one_in"):
            (every,) = mark.args
            index = next(variants[item.module, item.originalname])
            # This goes through a table of two parameters diagonally, so that each value of both has its turn.
            if (index + index // every) % every:
                item.add_marker("slow")
                item.add_marker("long")


def pytest_collection_finish():
    _forget_what_stays()


FINISHED = itertools.count(1)


def pytest_runtest_logfinish():
    if next(FINISHED) % 50 == 0:
        _forget_what_stays()


def _forget_what_stays():
    """
    Trainer collects garbage at the start of every training, which takes half a second where everything that was
    imported is looked at again and again. So what is alive after collecting is hidden from the collector.
    """
    gc.collect()
    gc.freeze()


# transformers calls it so since 5.23.
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
VOCABULARY = 40
# Weights as large as these let every layer matter to the output, unlike the 0.02 of real initialisations.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**COMMON, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
GPT = {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
FALCON = {**WIDE, "ffn_hidden_size": 32}

# family: (configuration class, its values, model class)
FAMILIES = {
    "llama": ("LlamaConfig", {**WIDE, "num_key_value_heads": 2}, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", {**WIDE, "num_key_value_heads": 2}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", {**WIDE, "num_key_value_heads": 2}, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**WIDE, "num_key_value_heads": 2, "head_dim": 8}, "Qwen3ForCausalLM"),
    "gemma": ("GemmaConfig", {**WIDE, "num_key_value_heads": 1, "head_dim": 8}, "GemmaForCausalLM"),
    "phi3": ("Phi3Config", {**WIDE, "num_key_value_heads": 2}, "Phi3ForCausalLM"),
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJForCausalLM"),
    "gpt_neox": ("GPTNeoXConfig", WIDE, "GPTNeoXForCausalLM"),
    "bloom": ("BloomConfig", {**COMMON, "hidden_size": 24, "n_layer": 2, "n_head": 4}, "BloomForCausalLM"),
    "falcon_new": (
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "FalconForCausalLM",
    ),
    "falcon_multi_query": (
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": False, "multi_query": True},
        "FalconForCausalLM",
    ),
    "falcon_old": (
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": False, "multi_query": False, "alibi": True},
        "FalconForCausalLM",
    ),
    "opt": ("OPTConfig", {**WIDE, "init_std": 0.2, "ffn_dim": 32, "word_embed_proj_dim": 24}, "OPTForCausalLM"),
    "bert": ("BertConfig", {**WIDE, "num_labels": 3}, "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", {**WIDE, "num_labels": 3}, "RobertaForSequenceClassification"),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "initializer_factor": 1.0,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration",
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 8,
            "patch_size": 4,
            "initializer_range": 0.2,
            "num_labels": 3,
        },
        "ViTForImageClassification",
    ),
}
METHODS = {
    "sara": {"method": "sara", "threshold": 0.3},
    "mo_sara": {"method": "mo_sara", "threshold": 0.5, "num_heads": 3},
}


@pytest.fixture(scope="session", autouse=True)
def _sealed(tmp_path_factory):
    """The tests have a cache of their own, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SARA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(params=list(METHODS))
def method(request) -> str:
    return request.param


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A tiny random model of a family, in evaluation mode; the same bits for the same seed."""
    config_class, values, model_class = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**values, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            # Biases start at zero, so a test would not notice an update that forgot or doubled one.
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def make_inputs(model, batch: int = 2, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs with labels that the model accepts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    classes = torch.randint(0, 3, (batch,), generator=generator)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels.to(model.dtype), "labels": classes}
    if "Classification" in type(model).__name__:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": classes}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    """The model's logits on fixed inputs (or the given ones), in evaluation mode."""
    return model.eval()(**(inputs or make_inputs(model))).logits


def sara_arguments(method: str = "sara", **changes) -> SaraArguments:
    return SaraArguments(**{**METHODS[method], **changes})


def train(adapter: SaraAdapter, steps: int = 3, lr: float = 0.05, inputs=None) -> SaraAdapter:
    """Train a few steps, which are so large that no trained tensor is near its start any more."""
    model = adapter.model
    inputs = make_inputs(model) if inputs is None else inputs
    optimizer = torch.optim.AdamW(adapter.trained().values(), lr=lr)
    model.train()
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return adapter


def attach_trained(
    model, method: str = "sara", name: str = "default", seed: int = 3, inputs=None, **changes
) -> SaraAdapter:
    """A trained adapter on a model."""
    torch.manual_seed(seed)
    return train(SaraAdapter.attach(model, sara_arguments(method, **changes), name), inputs=inputs)


def base_state(model) -> dict[str, torch.Tensor]:
    """Copies of the base's own tensors, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".sara." not in name}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes and bits."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def edit_config(folder, change) -> None:
    """Change the config of a saved adapter, which is in the header of its file and in the copy beside it."""
    path = Path(folder, "sara_adapter.safetensors")
    with safe_open(path, framework="pt") as file:
        config, tensors = (
            json.loads(file.metadata()["sara_config"]),
            {key: file.get_tensor(key) for key in list(file.keys())},
        )
    change(config)
    save_file(tensors, path, metadata={"sara_config": json.dumps(config)})
    Path(folder, "sara_config.json").write_text(json.dumps(config))


def make_tokenizer(texts=("The quick brown fox : jumps | over the lazy dog .",), size: int = 400):
    """A byte-level BPE tokenizer like GPT-2's, with <|endoftext|> as its only special token."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def make_base():
    """A base whose vocabulary is that of the tokenizer."""
    return make_model("llama", vocab_size=len(make_tokenizer()), bos_token_id=None, eos_token_id=0)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """The base model and its tokenizer, for tools that load them by name."""
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """
    The folder with public data and reference outputs that `HF_SARA_TEST_DATA` names: e2e/, e2e_metrics/, golden/,
    gpt2_tokenizer/. Tests that need it are extra, and are skipped without it.
    """
    folder = os.environ.get("HF_SARA_TEST_DATA")
    if not folder:
        pytest.skip("extra: compares with reference data; set HF_SARA_TEST_DATA to their folder")
    return Path(folder)


@pytest.fixture
def image(tmp_path):
    """A path for an image. After the test, the image has to be there, and must not be blank."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    yield tmp_path / "figure.png"
    pixels = imread(tmp_path / "figure.png")
    assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.01


def rotated_lapack(clusters, seed=0):
    """LAPACK's step with another result that is just as right: other signs, and another basis inside a cluster."""
    step = factors.leading_eigenpairs

    def call(matrix, choose):
        values, vectors = step(matrix, choose)
        generator = np.random.default_rng(seed)
        vectors = vectors * generator.choice([-1.0, 1.0], size=(len(vectors), 1))
        for start, stop in clusters:
            stop = min(stop, len(vectors))
            rotation = np.linalg.qr(generator.normal(size=(stop - start, stop - start)))[0]
            vectors[start:stop] = rotation @ vectors[start:stop]
        return values, vectors

    return call
