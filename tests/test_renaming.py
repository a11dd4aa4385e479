"""An adapter that was saved before transformers renamed the modules of its base."""

import json
import re

import pytest
import torch
from conftest import attach_trained, base_state, logits, make_model, same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sara import AdapterError, SaraAdapter, from_hub, merge, merge_shards, storage
from hf_sara.renaming import rename
from hf_sara.tensor_files import tensors_digest

# The names that transformers 5.8 gave to the query, the value and a norm of a ViT.
OLDER = (
    (r"vit\.layers\.(\d+)\.attention\.q_proj", r"vit.encoder.layer.\1.attention.attention.query"),
    (r"vit\.layers\.(\d+)\.attention\.v_proj", r"vit.encoder.layer.\1.attention.attention.value"),
    (r"vit\.layers\.(\d+)\.layernorm_before", r"vit.encoder.layer.\1.layernorm_before"),
)


def with_older_names(folder, text=OLDER):
    """Let an adapter be one that an older transformers made."""

    def older(name: str) -> str:
        for new, old in text:
            name = re.sub(new, old, name)
        return name

    path = folder / storage.TENSORS_FILE
    tensors = {older(name): tensor for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()[storage.CONFIG_KEY])
    for record in [*config["sites"], *config.get("modules", ())]:
        record["name"] = older(record["name"])
    config["versions"]["transformers"] = "5.8.0"
    config["tensors_sha256"] = tensors_digest({k: v for k, v in tensors.items() if not k.endswith((".U", ".Vh"))})
    if config["method"] == "sara":
        config["tensors_sha256"] = tensors_digest(tensors)
    save_file(tensors, path, {storage.CONFIG_KEY: json.dumps(config)})
    return config


@pytest.fixture
def saved(method, tmp_path):
    model = make_model("vit")
    adapter = attach_trained(model, method, modules_to_save=["classifier", "layernorm_before"])
    adapter.save_pretrained(tmp_path / "adapter")
    config = with_older_names(tmp_path / "adapter")
    assert any("encoder.layer.0.attention.attention.query" in site["name"] for site in config["sites"])
    return tmp_path / "adapter", adapter


def test_it_loads_under_the_names_of_today(saved):
    folder, trained = saved
    model = make_model("vit")
    adapter = SaraAdapter.load(model, folder)
    assert same_bits(adapter.state_dict(), trained.state_dict())
    assert torch.equal(logits(model), logits(trained.model))
    # And it is saved again with them.
    adapter.save_pretrained(folder)
    assert [site.name for site in storage.read(folder).sites] == [site.name for site in trained.sites]


def test_from_hub_and_merging_files_find_the_modules_too(tmp_path):
    model = make_model("vit")
    adapter = attach_trained(model, "sara", modules_to_save=["classifier", "layernorm_before"])
    adapter.save_pretrained(tmp_path / "adapter")
    with_older_names(tmp_path / "adapter")
    base = make_model("vit")
    base.save_pretrained(tmp_path / "base")
    found = from_hub(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert torch.equal(logits(found), logits(model))
    merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert same_bits(base_state(merged), base_state(merge(model)))


def test_a_name_that_nothing_maps_is_refused_with_both_versions(tmp_path):
    model = make_model("llama")
    attach_trained(model).save_pretrained(tmp_path)
    with_older_names(tmp_path, ((r"self_attn\.q_proj", "attention.wq"),))
    with pytest.raises(AdapterError, match=r"attention\.wq.* It was made with transformers 5\.8\.0, and this is "):
        SaraAdapter.load(make_model("llama"), tmp_path)


def test_what_lies_in_a_module_is_renamed_with_it():
    renames = {"a.b": "x", "a.b.c": "y.z"}
    assert rename("a.b.q.U", renames) == "x.q.U"
    assert rename("a.b.c", renames) == "y.z"
    assert rename("a.bc.U", renames) == "a.bc.U"
    assert rename("a", renames) == "a"
