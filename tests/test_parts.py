"""What is trained beside the updates: heads, other modules, and rows of embeddings. It is saved and comes back."""

import copy
import logging
import pickle

import pytest
import torch
import transformers
from conftest import COMMON, WIDE, attach_trained, base_state, make_inputs, make_model, same_bits, sara_arguments
from safetensors.torch import load_file, save_file
from torch import nn

from hf_sara import AdapterError, SaraAdapter, SaraArguments, export_lora, from_hub, merge, merge_shards, plan
from hf_sara.parts import ModulePart, TokenPart

LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
IMAGES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 16,
}
IMAGES |= {"patch_size": 8, "initializer_range": 0.2}
AUDIO = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
AUDIO |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 8}
T5 = {**COMMON, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {**COMMON, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}
WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "max_source_positions": 20}
WHISPER |= {"num_mel_bins": 8, "classifier_proj_size": 8}
ROWS = ["token_adapter.trainable_tokens_delta"]
VIDEO = {**IMAGES, "num_frames": 4}

# class: (configuration class, its values, targets, modules of the head)
HEADS = {
    "BertForSequenceClassification": ("BertConfig", WIDE, ["query", "value"], ["classifier"]),
    "BertForTokenClassification": ("BertConfig", WIDE, ["query", "value"], ["classifier"]),
    "BertForQuestionAnswering": ("BertConfig", WIDE, ["query", "value"], ["qa_outputs"]),
    "BertForMultipleChoice": ("BertConfig", WIDE, ["query", "value"], ["classifier"]),
    "RobertaForSequenceClassification": ("RobertaConfig", WIDE, ["query", "value"], ["classifier"]),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        WIDE,
        ["query_proj", "value_proj"],
        ["pooler", "classifier"],
    ),
    "LlamaForSequenceClassification": ("LlamaConfig", WIDE, ["q_proj", "v_proj"], ["score"]),
    "Qwen2ForTokenClassification": (
        "Qwen2Config",
        {**WIDE, "num_key_value_heads": 2},
        ["q_proj", "v_proj"],
        ["score"],
    ),
    "GPT2ForSequenceClassification": (
        "GPT2Config",
        {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4},
        ["c_attn.q", "c_attn.v"],
        ["score"],
    ),
    "T5ForSequenceClassification": ("T5Config", T5, ["q", "v"], ["classification_head"]),
    "ViTForImageClassification": ("ViTConfig", IMAGES, ["q_proj", "v_proj"], ["classifier"]),
    "Dinov2ForImageClassification": ("Dinov2Config", IMAGES, ["q_proj", "v_proj"], ["classifier"]),
    "VideoMAEForVideoClassification": ("VideoMAEConfig", VIDEO, ["query", "value"], ["fc_norm", "classifier"]),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {**WIDE, **AUDIO},
        ["q_proj", "v_proj"],
        ["projector", "classifier"],
    ),
    "WhisperForAudioClassification": ("WhisperConfig", WHISPER, ["q_proj", "v_proj"], ["projector", "classifier"]),
}


def saved_base(name: str, folder) -> None:
    """A pretrained body without this head, as a checkpoint on the Hub is."""
    config_name, values, _, _ = HEADS[name]
    torch.manual_seed(3)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**values))
    body = getattr(model, model.base_model_prefix, None)
    (model if body is None else body).save_pretrained(folder)


def load_task(name: str, folder, dtype=torch.float32, **labels):
    torch.manual_seed(4)
    labels = labels or ({} if "Question" in name or "Choice" in name else LABELS)
    return getattr(transformers, name).from_pretrained(folder, ignore_mismatched_sizes=True, dtype=dtype, **labels)


def task_inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if "Image" in name:
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    if "Video" in name:
        return {"pixel_values": torch.randn(4, 4, 3, 16, 16, generator=generator)}
    if "Wav2Vec2" in name:
        return {"input_values": torch.randn(4, 800, generator=generator)}
    if "Whisper" in name:
        return {"input_features": torch.randn(4, 8, 40, generator=generator)}
    ids = torch.randint(3, 40, (4, 3, 6) if "Choice" in name else (4, 6), generator=generator)
    ids[..., -1] = COMMON["eos_token_id"]
    return {"input_ids": ids}


def task_labels(name: str) -> dict[str, torch.Tensor]:
    if "Question" in name:
        return {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([1, 2, 3, 4])}
    return {"labels": torch.arange(24).view(4, 6) % 3 if "Token" in name else torch.tensor([0, 1, 2, 1])}


def outputs(model, name: str, **inputs) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**(inputs or task_inputs(name)))
    return torch.stack([found.start_logits, found.end_logits]) if "Question" in name else found.logits


def train_task(adapter: SaraAdapter, name: str, steps: int = 3) -> None:
    model = adapter.model.train()
    optimizer = torch.optim.AdamW(adapter.trained().values(), lr=0.05)
    for _ in range(steps):
        model(**task_inputs(name), **task_labels(name)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ---- heads ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_task_trains_and_comes_back(name, method, tmp_path):
    saved_base(name, tmp_path / "base")
    model = load_task(name, tmp_path / "base")
    _, _, targets, heads = HEADS[name]
    state, before = base_state(model), outputs(model, name)
    trainable = {key: p.requires_grad for key, p in model.named_parameters()}
    torch.manual_seed(6)
    adapter = SaraAdapter.attach(model, sara_arguments(method, target_modules=targets))
    assert [part.name for part in adapter.parts] == heads
    start = adapter.state_dict()
    train_task(adapter, name)
    # Every tensor of the head has moved, and the base has its bits.
    moved = [key for key in start if any(key.startswith(f"{head}.") for head in heads)]
    assert moved
    assert all(not torch.equal(start[key], adapter.trained()[key]) for key in moved)
    assert same_bits(base_state(model), state)
    live = outputs(model, name)
    assert not torch.allclose(live, before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(outputs(model, name), before)
    assert torch.equal(outputs(model, name), live)

    adapter.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert type(again) is type(model)
    assert again.config.id2label == model.config.id2label
    assert torch.equal(outputs(again, name), live)
    assert same_bits(again.sara_adapter.state_dict(), adapter.state_dict())

    if method == "sara":
        adapter.merge()
        assert torch.allclose(outputs(model, name), live, atol=1e-4)
        assert not same_bits(base_state(model), state)
        adapter.unmerge()
        assert torch.equal(outputs(model, name), live)
        assert same_bits(base_state(model), state)
    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == trainable
    assert torch.equal(outputs(model, name), before)


def test_a_reward_model_has_a_head_of_one_output(tmp_path):
    name = "LlamaForSequenceClassification"
    saved_base(name, tmp_path / "base")
    model = load_task(name, tmp_path / "base", num_labels=1)
    adapter = attach_trained(model, inputs={**task_inputs(name), "labels": torch.tensor([0.1, 0.5, 1.0, 2.0])})
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert again.config.num_labels == 1
    assert torch.equal(outputs(again, name), outputs(model, name))


def test_twelve_classes_in_bfloat16_train_in_float32(tmp_path):
    name = "LlamaForSequenceClassification"
    saved_base(name, tmp_path / "base")
    labels = {"id2label": {i: f"class {i}" for i in range(12)}, "label2id": {f"class {i}": i for i in range(12)}}
    model = load_task(name, tmp_path / "base", torch.bfloat16, **labels)
    adapter = SaraAdapter.attach(model, sara_arguments())
    train_task(adapter, name)
    assert adapter.trained()["score.weight"].dtype == torch.float32
    assert adapter.manifest().base.dtype == "bfloat16"
    live = outputs(model, name)
    assert live.dtype == torch.bfloat16
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert again.config.label2id == labels["label2id"]
    assert torch.equal(outputs(again, name), live)
    adapter.merge()
    assert model.score.weight.dtype == torch.bfloat16


def test_another_head_of_the_base_gives_way(tmp_path):
    # The base is a classifier itself, of two labels, and the adapter was trained with three.
    name = "BertForSequenceClassification"
    make_model("bert", num_labels=2).save_pretrained(tmp_path / "base")
    model = load_task(name, tmp_path / "base")
    adapter = SaraAdapter.attach(model, sara_arguments())
    train_task(adapter, name)
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert torch.equal(outputs(again, name), outputs(model, name))
    with pytest.raises(AdapterError, match=r"classifier: .* weight \(3, 24\).*weight \(2, 24\).* same configuration"):
        SaraAdapter.load(make_model("bert", num_labels=2), tmp_path / "adapter")


def test_a_head_that_nobody_brings_is_refused(tmp_path, caplog):
    name = "BertForSequenceClassification"
    saved_base(name, tmp_path / "base")
    model = load_task(name, tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        adapter = SaraAdapter.attach(model, sara_arguments(modules_to_save=[]))
    assert adapter.parts == []
    assert "attaching the adapter freezes them: classifier.weight, classifier.bias. Name" in caplog.text
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"has no classifier.bias, classifier.weight .* would be random"):
        from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"have no tensor for classifier\.bias"):
        merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_module_like_nn_sequential_can_be_a_head(tmp_path):
    def make():
        model = make_model("bert")
        torch.manual_seed(8)
        model.classifier = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        return model

    model, name = make(), "BertForSequenceClassification"
    before = outputs(model, name)
    state = base_state(model)
    adapter = SaraAdapter.attach(model, sara_arguments())
    train_task(adapter, name)
    live = outputs(model, name)
    assert same_bits(base_state(model), state)
    # The statistics of the BatchNorm moved in the copy alone.
    assert "classifier.1.running_mean" in adapter.state_dict()
    assert adapter.state_dict()["classifier.1.num_batches_tracked"] == 3
    adapter.save_pretrained(tmp_path)
    again = make()
    SaraAdapter.load(again, tmp_path)
    assert torch.equal(outputs(again, name), live)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(one, name), live)
        with one.sara_adapter.disabled():
            assert torch.equal(outputs(one, name), before)
    adapter.detach()
    assert same_bits(base_state(model), state)
    assert torch.equal(outputs(model, name), before)


# ---- any module ----


def test_modules_are_matched_as_targets_are():
    model = make_model("llama")
    for names, found in (
        (["norm"], ["model.norm"]),
        (["layers.1.input_layernorm"], ["model.layers.1.input_layernorm"]),
        ([r".*\.post_attention_layernorm"], [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]),
        # A module inside of another one trains with it.
        (
            ["norm", "model.layers.0.mlp", "gate_proj"],
            ["model.layers.0.mlp", "model.layers.1.mlp.gate_proj", "model.norm"],
        ),
        ("none", []),
    ):
        assert [part.name for part in plan(model, SaraArguments(threshold=0.3, modules_to_save=names)).parts] == found
    for name in ("nothing", "dropout"):
        with pytest.raises(
            ValueError, match=f"modules_to_save='{name}' matches no module with parameters. The model has: .*norm"
        ):
            plan(model, SaraArguments(modules_to_save=[name]))


def test_what_cannot_train_in_full_is_refused_before_anything_changes():
    model = make_model("llama")
    names = set(vars(model))
    with pytest.raises(
        ValueError, match=r"q_proj cannot have a low-rank update, because .*self_attn is trained beside"
    ):
        SaraAdapter.attach(model, SaraArguments(threshold=0.3, modules_to_save=["layers.0.self_attn"]))
    quantized = make_model("llama")
    quantized.lm_head.weight = nn.Parameter(quantized.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head.weight: the weight is quantized \(torch.int8\)"):
        SaraAdapter.attach(quantized, SaraArguments(threshold=0.3, modules_to_save=["lm_head"]))
    assert set(vars(model)) == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_weight_trains_in_all_of_its_modules_or_not_at_all(tmp_path):
    def make():
        return make_model("llama", tie_word_embeddings=True)

    for name, other in (("lm_head", "model.embed_tokens.weight"), ("embed_tokens", "lm_head.weight")):
        with pytest.raises(ValueError, match=rf"{name}.weight is tied to {other}, so all of them would change. Name"):
            SaraAdapter.attach(make(), SaraArguments(threshold=0.3, modules_to_save=[name]))
    model = make()
    adapter = attach_trained(model, modules_to_save=["embed_tokens", "lm_head"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert [name for name in adapter.trained() if "self_attn" not in name] == ["model.embed_tokens.weight"]
    adapter.save_pretrained(tmp_path)
    again = make()
    SaraAdapter.load(again, tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(outputs(again, "", **make_inputs(model)), outputs(model, "", **make_inputs(model)))
    with pytest.raises(AdapterError, match=r"lm_head: .*weight tied to model.embed_tokens.weight, and this"):
        SaraAdapter.load(make_model("llama", tie_word_embeddings=False), tmp_path)


def test_two_adapters_have_one_copy_of_a_module_at_a_time():
    model, name = make_model("bert"), "BertForSequenceClassification"
    one = attach_trained(model, name="one")
    first = outputs(model, name)
    with pytest.raises(
        ValueError, match=r"classifier can have one trained copy at a time, and that of the adapter 'one'"
    ):
        SaraAdapter.attach(model, sara_arguments(), name="two")
    one.disable()
    two = SaraAdapter.attach(model, sara_arguments(), name="two")
    train_task(two, name)
    second = outputs(model, name)
    with pytest.raises(ValueError, match="that of the adapter 'two' is in use"):
        one.enable()
    assert torch.equal(outputs(model, name), second)
    two.disable()
    one.enable()
    assert torch.equal(outputs(model, name), first)
    two.detach()
    assert torch.equal(outputs(model, name), first)


def test_parts_count_in_plans_and_budgets():
    model = make_model("bert")
    found = plan(model, SaraArguments(threshold=0.3))
    updates = sum(found.count(site) for site in found.sites)
    assert found.trained_parameters == updates + 24 * 3 + 3
    assert "classifier" in found.table()
    assert "75" in found.table().splitlines()[-1]
    assert "classifier (trained in full)" in str(found)
    budget = plan(model, SaraArguments(parameter_budget="400"))
    assert 300 < budget.trained_parameters <= 400
    with pytest.raises(ValueError, match=r"allows 75 trained parameters, and classifier alone has 75"):
        plan(model, SaraArguments(parameter_budget="75"))


# ---- rows of embeddings ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_tokens_train_and_come_back(tied, dtype, tmp_path):
    make_model("llama", dtype=dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(7)
    model.resize_token_embeddings(42)
    ids = torch.randint(3, 40, (2, 6))
    ids[0, 1], ids[1, 2], ids[1, 4] = 40, 41, 5
    state, before = base_state(model), outputs(model, "", input_ids=ids)
    adapter = attach_trained(
        model, inputs={"input_ids": ids, "labels": ids}, trainable_token_indices=[41, 5, 40], dropout=0.0
    )
    assert adapter.parts[0] == TokenPart("model.embed_tokens", (5, 40, 41), 24)
    live = outputs(model, "", input_ids=ids)
    # The weight has the trained rows, and exactly these are new.
    adapter.state_dict()
    rows = model.get_input_embeddings().weight
    changed = (rows != state["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == [5, 40, 41]
    assert same_bits(base_state(model), state)
    with adapter.disabled():
        assert torch.equal(outputs(model, "", input_ids=ids), before)
        assert torch.equal(rows, state["model.embed_tokens.weight"])
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert again.config.vocab_size == 42
    assert torch.equal(outputs(again, "", input_ids=ids), live)
    merge(model, tmp_path / "merged")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(plain, "", input_ids=ids), live, atol=1e-4 if dtype == torch.float32 else 0.1)
    merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "shards")
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "shards")
    assert same_bits(dict(other.state_dict()), dict(plain.state_dict()))
    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)


def test_the_gradient_of_rows_is_that_of_the_whole_weight():
    # Input and tied output: the rows' gradient is exactly what these rows of the weight would have.
    model = make_model("llama", dtype=torch.float64, tie_word_embeddings=True)
    whole = copy.deepcopy(model)
    ids = torch.tensor([[3, 9, 4, 9], [9, 7, 5, 3]])
    adapter = SaraAdapter.attach(
        model, SaraArguments(threshold=0.3, zero_init_vh=True, dropout=0.0, trainable_token_indices=[3, 9, 11])
    )
    model(input_ids=ids, labels=ids).loss.backward()
    whole(input_ids=ids, labels=ids).loss.backward()
    found = adapter.trained()["model.embed_tokens.trainable_tokens"].grad
    assert torch.allclose(found, whole.get_input_embeddings().weight.grad[[3, 9, 11]], atol=1e-12)


def test_an_embedding_that_scales_its_rows_has_them_scaled():
    model = make_model("gemma")
    ids = torch.tensor([[3, 9, 4, 9]])
    before = outputs(model, "", input_ids=ids)
    args = SaraArguments(method="mo_sara", threshold=0.3, trainable_token_indices=[9])
    adapter = SaraAdapter.attach(model, args)
    # Nothing is trained yet, so the rows are those of the base, computed in another way.
    assert torch.allclose(outputs(model, "", input_ids=ids), before, atol=1e-5)
    with torch.no_grad():
        adapter.trained()["model.embed_tokens.trainable_tokens"].mul_(0.5)
    live = outputs(model, "", input_ids=ids)
    adapter.merge() if adapter.args.num_heads == 1 else adapter.mirror_rows()
    adapter.disable()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] *= 0.5
    assert torch.allclose(outputs(model, "", input_ids=ids), live, atol=1e-5)


def test_rows_that_cannot_train_are_refused():
    model = make_model("llama")
    for args, message in (
        (
            {"trainable_token_indices": [40]},
            r"names the token 40, and the input embedding has 40 rows. Call model.resize",
        ),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "embed_tokens is in modules_to_save"),
    ):
        with pytest.raises(ValueError, match=message):
            SaraAdapter.attach(model, SaraArguments(threshold=0.3, **args))
    with pytest.raises(ValueError, match="has no input embedding of tokens"):
        SaraAdapter.attach(make_model("vit"), SaraArguments(threshold=0.3, trainable_token_indices=[1]))
    for wrong in ([1, 1], [-1], [True], [1.5]):
        with pytest.raises(ValueError, match="has to be a list of different token ids"):
            SaraArguments(trainable_token_indices=wrong)


def test_a_vocabulary_whose_rows_the_adapter_lacks_is_refused(tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    for name, args in (("none", {}), ("some", {"trainable_token_indices": [41, 42]})):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(43)
        SaraAdapter.attach(model, SaraArguments(threshold=0.3, **args)).save_pretrained(tmp_path / name)
        with pytest.raises(
            AdapterError, match=r"43 tokens, and the base .* has 40. The rows 40 to 42 of model.embed_"
        ):
            from_hub(tmp_path / name, base_model=str(tmp_path / "base"))
        with pytest.raises(AdapterError, match=r"has 40 rows. Call model.resize_token_embeddings\(43\) first"):
            SaraAdapter.load(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name)
    # Fewer tokens than the base has are restored too.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(38)
    ids = torch.randint(3, 38, (2, 5))
    attach_trained(model, inputs={"input_ids": ids, "labels": ids}).save_pretrained(tmp_path / "fewer")
    again = from_hub(tmp_path / "fewer", base_model=str(tmp_path / "base"))
    assert torch.equal(outputs(again, "", input_ids=ids), outputs(model, "", input_ids=ids))


# ---- other programs ----


@pytest.mark.parametrize("what", ["head", "rows", "untied rows", "tied modules"])
def test_peft_loads_the_export_with_equal_outputs(what, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra peft")

    def make():
        if what == "head":
            return make_model("bert")
        model = make_model("llama", tie_word_embeddings=what != "untied rows")
        torch.manual_seed(7)
        model.resize_token_embeddings(42)
        return model

    changes = {
        "head": {},
        "tied modules": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    }.get(what, {"trainable_token_indices": [5, 40, 41]})
    ids = torch.tensor([[5, 40, 7, 41], [3, 5, 40, 8]]) % (40 if what == "head" else 42)
    labels = torch.tensor([0, 2]) if what == "head" else ids
    model = make()
    adapter = attach_trained(model, inputs={"input_ids": ids, "labels": labels}, **changes)
    live = outputs(model, "", input_ids=ids)
    export_lora(adapter, tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(outputs(again, "", input_ids=ids), live, atol=1e-5)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    kept = {
        f"base_model.model.{part.name}.{key}"
        for part in adapter.parts
        for key in (ROWS if isinstance(part, TokenPart) else [*part.parameters, *part.ties])
    }
    assert {name for name in names if ".lora_" not in name} == kept
    if what == "head":
        merged = again.merge_and_unload()
        assert torch.allclose(outputs(merged, "", input_ids=ids), live, atol=1e-4)


@pytest.mark.parametrize("size", ["5KB", "50GB"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_merging_gives_a_plain_classifier(name, size, tmp_path):
    saved_base(name, tmp_path / "whole")
    if name.startswith("Llama"):
        # The base is a language model, whose own head does not belong to a classifier.
        torch.manual_seed(3)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    else:
        base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    model = load_task(name, tmp_path / "base")
    adapter = attach_trained(model, inputs={**task_inputs(name), **task_labels(name)})
    adapter.save_pretrained(tmp_path / "adapter")
    live = outputs(model, name)
    merge(model, tmp_path / "merged")
    merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "shards")
    states = []
    for folder in ("merged", "shards"):
        plain, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert plain.config.id2label == LABELS["id2label"]
        assert torch.allclose(outputs(plain, name), live, atol=1e-4)
        states.append(dict(plain.state_dict()))
    assert same_bits(*states)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "shards").architectures == [name]
    merge(model)
    assert same_bits(dict(model.state_dict()), states[0])
    assert not any(isinstance(part, ModulePart) for part in vars(model).values())
    model.save_pretrained(tmp_path / "plain")
    assert not [key for key in load_file(tmp_path / "plain" / "model.safetensors") if "sara" in key]


# ---- merging file by file, after the vocabulary, the labels or the tokens changed ----

BART = {**COMMON, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.2}
BART |= {"max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}
ROTARY = {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
# class: (configuration class, its values, targets, names of what follows the vocabulary besides the weights)
WITH_BIASES = {
    "BartForConditionalGeneration": ("BartConfig", BART, ["q_proj", "v_proj"], ["final_logits_bias"]),
    "GPTJForCausalLM": ("GPTJConfig", ROTARY, ["q_proj", "v_proj"], ["lm_head.bias"]),
    "PhiForCausalLM": ("PhiConfig", {**WIDE, "num_attention_heads": 2}, ["q_proj", "v_proj"], ["lm_head.bias"]),
    "BertForMaskedLM": ("BertConfig", WIDE, ["query", "value"], ["cls.predictions.bias"]),
    "LlamaForCausalLM": ("LlamaConfig", WIDE, ["q_proj", "v_proj"], []),
}


def merge_in_two_ways(tmp_path):
    """Merge a saved adapter in memory and file by file. Both have to be the same model."""
    model = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    merge(model, tmp_path / "merged")
    merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "shards")
    found = []
    for folder in (tmp_path / "merged", tmp_path / "shards"):
        plain, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        configs = [{key: value for key, value in plain.config.to_dict().items() if key != "_name_or_path"}]
        if plain.can_generate():
            configs.append(plain.generation_config.to_dict())
        assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))
        found.append((dict(plain.state_dict()), configs))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    return found[1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [36, 42])
@pytest.mark.parametrize("name", WITH_BIASES)
def test_all_that_follows_the_vocabulary_follows_it_in_merged_files(name, size, tmp_path):
    config_name, values, targets, biases = WITH_BIASES[name]
    torch.manual_seed(3)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**values)).eval()
    for bias in biases:
        model.state_dict()[bias].normal_()
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    model.resize_token_embeddings(size)
    model.config.eos_token_id = model.config.pad_token_id = 4
    if model.can_generate():
        model.generation_config.eos_token_id = [4, 2]
    ids = torch.tensor([[3, 9, 4, size - 1], [9, 7, 5, 3]])
    tokens = list(range(40, size)) or None
    adapter = attach_trained(
        model, inputs={"input_ids": ids, "labels": ids}, target_modules=targets, trainable_token_indices=tokens
    )
    adapter.save_pretrained(tmp_path / "adapter")
    state, configs = merge_in_two_ways(tmp_path)
    assert [configs[0][key] for key in ("vocab_size", "eos_token_id", "pad_token_id")] == [size, 4, 4]
    assert all(config["eos_token_id"] == [4, 2] for config in configs[1:])
    assert all(state[bias].shape[-1] == size and state[bias].any() for bias in biases)


def test_a_trained_head_brings_its_own_bias_to_merged_files(tmp_path):
    torch.manual_seed(3)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**ROTARY)).eval()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(42)
    attach_trained(model, modules_to_save=["wte", "lm_head"]).save_pretrained(tmp_path / "adapter")
    state, _ = merge_in_two_ways(tmp_path)
    assert state["lm_head.bias"][40:].all()


def test_a_tied_weight_that_a_file_has_twice_stays_tied(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    model.resize_token_embeddings(42)
    attach_trained(model, trainable_token_indices=[5, 40, 41]).save_pretrained(tmp_path / "adapter")
    state, _ = merge_in_two_ways(tmp_path)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_a_merged_classifier_keeps_its_labels_where_its_head_did_not_train(tmp_path):
    make_model("bert").save_pretrained(tmp_path / "base")
    model = load_task("BertForSequenceClassification", tmp_path / "base")
    attach_trained(model, modules_to_save=[]).save_pretrained(tmp_path / "adapter")
    _, (config,) = merge_in_two_ways(tmp_path)
    assert config["id2label"] == LABELS["id2label"]


def test_a_tensor_of_a_wrong_shape_is_refused_by_its_name(tmp_path):
    model = make_model("llama")
    attach_trained(model).save_pretrained(tmp_path / "adapter")
    make_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.ones(23)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight: the file has the shape \(23,\), .* asks for \(24,\)"):
        merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
