"""What could mix up, lose or spoil the parts of an adapter is refused, and leaves everything as it was."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import WIDE, attach_trained, base_state, logits, make_model, same_bits, sara_arguments, train
from torch import nn

from hf_sara import AdapterError, SaraAdapter, SaraArguments, from_hub
from hf_sara.parts import TokenPart


def two_heads():
    """A model with two trained adapters whose heads exclude each other; the first one is off."""
    model = make_model("bert")
    base = base_state(model)
    one = attach_trained(model, name="one")
    one.disable()
    two = attach_trained(model, name="two", seed=8)
    return model, base, one, two


def test_an_adapter_that_comes_back_does_not_push_another_head_out():
    model, base, one, two = two_heads()
    states = [adapter.state_dict() for adapter in (one, two)]
    two.disable()
    one.enable()
    with pytest.raises(ValueError, match="that of the adapter 'two' is in use"), one.disabled():
        two.enable()
    assert all(same_bits(a.state_dict(), state) for a, state in zip((one, two), states, strict=True))
    assert same_bits(base_state(model), base)
    two.disable()
    one.enable()
    assert all(same_bits(a.state_dict(), state) for a, state in zip((one, two), states, strict=True))
    one.detach()
    two.detach()
    assert same_bits(dict(model.state_dict()), base)


def test_a_merged_head_is_in_use():
    model, base, one, two = two_heads()
    states = [adapter.state_dict() for adapter in (one, two)]
    with pytest.raises(ValueError, match="that of the adapter 'two' is in use"):
        one.merge()
    two.merge()
    with pytest.raises(ValueError, match=r"'two' is merged. Call SaraAdapter.of\(model, 'two'\).unmerge\(\) first"):
        one.enable()
    with pytest.raises(ValueError, match="'two' is merged"):
        SaraAdapter.attach(model, sara_arguments(), name="three")
    two.unmerge()
    assert all(same_bits(a.state_dict(), state) for a, state in zip((one, two), states, strict=True))
    assert same_bits(base_state(model), base)


@pytest.mark.parametrize("where", ["delta", "copy", "load"])
def test_a_failed_attach_leaves_the_model_as_it_was(where, tmp_path, monkeypatch):
    from hf_sara import contents, copies

    saved, model = make_model("bert"), make_model("bert")
    attach_trained(saved, trainable_token_indices=[5]).save_pretrained(tmp_path)
    next(model.parameters()).requires_grad_(False)
    state, attributes = dict(model.state_dict()), set(vars(model))
    modules = {name for name, _ in model.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def fail(*args, **kwargs):
        raise MemoryError("no more memory")

    calls = []

    def fail_later(*args, **kwargs):
        calls.append(args)
        return fail() if len(calls) == 3 else insert(*args, **kwargs)

    insert = contents.insert_delta
    if where == "delta":
        monkeypatch.setattr(contents, "insert_delta", fail_later)
    elif where == "copy":
        switch = copies.TokenRows.switch
        monkeypatch.setattr(copies.TokenRows, "switch", lambda *args: fail() if args[-1] else switch(*args))
    else:
        monkeypatch.setattr(contents.AdapterContents, "load_state_dict", fail)
    with pytest.raises(MemoryError):
        SaraAdapter.load(model, tmp_path)
    monkeypatch.undo()
    assert same_bits(dict(model.state_dict()), state)
    assert set(vars(model)) == attributes
    assert {name for name, _ in model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    SaraAdapter.load(model, tmp_path)
    assert torch.equal(logits(model), logits(saved))


def test_an_offloaded_part_is_refused():
    model = make_model("bert")
    with torch.device("meta"):
        model.classifier = nn.Linear(24, 3)
    with pytest.raises(ValueError, match="classifier is offloaded to the CPU or the disk"):
        SaraAdapter.attach(model, sara_arguments())
    assert not hasattr(model, "sara_adapter")


def test_a_container_in_a_narrow_dtype_is_refused():
    model = make_model("llama", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model.layers is a ModuleList, which has no forward .* Name the modules in"):
        SaraAdapter.attach(model, sara_arguments(target_modules=["lm_head"], modules_to_save=["layers"]))
    # In float32 nothing has to be cast.
    wide = make_model("llama")
    SaraAdapter.attach(wide, sara_arguments(target_modules=["lm_head"], modules_to_save=["layers"]))


def test_a_weight_of_four_modules_trains_in_all_of_them():
    # T5 has one weight in three embeddings and the output layer.
    model = make_model("t5", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"shared.weight is tied to encoder.embed_tokens.weight, .* all of them"):
        SaraAdapter.attach(model, sara_arguments(modules_to_save=["shared"]))
    state = base_state(model)
    adapter = attach_trained(model, modules_to_save=["shared", "embed_tokens", "lm_head"])
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    assert same_bits(base_state(model), state)
    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)


def test_rows_inside_of_a_whole_part_are_refused_when_they_are_attached():
    model = make_model("bert")
    with pytest.raises(ValueError, match="word_embeddings is in modules_to_save, so all of its rows train"):
        SaraAdapter.attach(model, SaraArguments(modules_to_save=["embeddings"], trainable_token_indices=[5]))


def test_a_whole_part_holds_the_rows_of_an_embedding_inside_of_it(tmp_path):
    body = transformers.BertModel(make_model("bert").config)
    body.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model.resize_token_embeddings(44)
    adapter = attach_trained(model, modules_to_save=["embeddings", "classifier"])
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert torch.equal(logits(again), logits(model))


def test_arguments_take_what_is_a_list():
    for given in (range(3, 5), (3, 4), np.array([3, 4]), [np.int64(3), 4]):
        args = SaraArguments(trainable_token_indices=given)
        assert args.trainable_token_indices == [3, 4]
        assert all(type(token) is int for token in args.trainable_token_indices)
    assert SaraArguments(trainable_token_indices=5).trainable_token_indices == [5]
    assert SaraArguments(modules_to_save=("norm", "lm_head")).modules_to_save == ["norm", "lm_head"]
    assert SaraArguments(modules_to_save="none").modules_to_save == []
    for wrong in ([1], ["none", "norm"], [""]):
        with pytest.raises(ValueError, match="has to be a list of names, or 'none' alone"):
            SaraArguments(modules_to_save=wrong)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    model = make_model("bert")
    adapter = SaraAdapter.attach(model, sara_arguments())
    adapter.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.config.id2label = {-1: "bad", 0: "good", 1: "best"}
    with pytest.raises(AdapterError, match=r"cannot be saved, since its config is not readable: .* not numbered"):
        adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_embedding_that_is_resized_under_an_adapter_is_named(tmp_path):
    model = make_model("llama")
    adapter = attach_trained(model, trainable_token_indices=[5])
    model.resize_token_embeddings(50)
    if hasattr(model.get_input_embeddings(), "sara") and hasattr(model.lm_head, "sara"):
        pytest.skip("This version of transformers resizes the modules in place.")
    with pytest.raises(ValueError, match=r"is not the module any more whose rows .* Resize"):
        adapter.save_pretrained(tmp_path)


def test_a_new_bias_of_an_output_layer_needs_the_whole_layer(tmp_path):
    make_model("gptj").save_pretrained(tmp_path)
    model = transformers.GPTJForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(42)
    with pytest.raises(ValueError, match=r"lm_head has a bias, whose new entries would be lost. Name lm_head in"):
        SaraAdapter.attach(model, sara_arguments(trainable_token_indices=[40, 41]))
    adapter = SaraAdapter.attach(model, sara_arguments(trainable_token_indices=[40, 41], modules_to_save=["lm_head"]))
    ids = torch.tensor([[5, 40, 7, 41]])
    train(adapter, inputs={"input_ids": ids, "labels": ids})
    adapter.save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path))
    assert torch.equal(logits(again, input_ids=ids), logits(model, input_ids=ids))
    # Rows that the checkpoint has are no news, so their bias is the base's.
    old = transformers.GPTJForCausalLM.from_pretrained(tmp_path)
    parts = SaraAdapter.attach(old, sara_arguments(trainable_token_indices=[5])).parts
    assert parts[1] == TokenPart("lm_head", (5,), 24, trained=False)


def test_a_random_parameter_of_the_model_itself_is_refused(tmp_path):
    config = transformers.Wav2Vec2Config(
        **WIDE,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    kind = transformers.Wav2Vec2ForSequenceClassification
    model = kind.from_pretrained(tmp_path, use_weighted_layer_sum=True)
    with pytest.raises(ValueError, match="layer_weights is not in the checkpoint of the base, and belongs to no"):
        SaraAdapter.attach(model, sara_arguments(target_modules=["q_proj"]))


def test_the_tokens_that_end_a_text_come_back(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [7, 9]
    attach_trained(model).save_pretrained(tmp_path / "adapter")
    again = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert again.config.eos_token_id == 7
    assert again.generation_config.eos_token_id == [7, 9]
    own = from_hub(tmp_path / "adapter", base_model=copy.deepcopy(make_model("llama")))
    assert own.config.eos_token_id == 7


def test_a_loaded_base_gets_the_names_of_the_labels(tmp_path):
    model = make_model("bert")
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    attach_trained(model).save_pretrained(tmp_path)
    assert from_hub(tmp_path, base_model=make_model("bert")).config.label2id == {"bad": 0, "so-so": 1, "good": 2}


def test_loading_new_tokens_warns_of_nothing(tmp_path, caplog):
    make_model("llama").save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(41)
    SaraAdapter.attach(model, sara_arguments(trainable_token_indices=[40])).save_pretrained(tmp_path / "adapter")
    from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert "random" not in caplog.text
