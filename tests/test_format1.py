"""Adapters that hf_sara 0.1.0 wrote still load: the folders in data/format1, and the logits that they gave there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import logits, make_inputs, make_model, same_bits
from safetensors.torch import load_file

from hf_sara import SaraAdapter, storage
from hf_sara.storage import CONFIG_FILE, FACTORS_FILE, PENDING_CONFIG_FILE, PENDING_FACTORS_FILE, TENSORS_FILE

DATA = Path(__file__).parent / "data" / "format1"
FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def test_there_is_a_folder_of_each_kind():
    assert FOLDERS == [
        "mo_sara-llama",
        "mo_sara-one-head-bloom",
        "mo_sara-save-llama",
        "sara-gpt2",
        "sara-llama",
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_adapter_of_the_first_format_loads_and_computes_the_same(folder):
    # The random weights of `make_model` are those of the training, which the seeds of Mo-SARA check to the bit.
    model = make_model(folder.rsplit("-", 1)[-1])
    base = logits(model, **make_inputs(model))
    SaraAdapter.load(model, DATA / folder)
    found = logits(model, **make_inputs(model))
    assert torch.allclose(found, load_file(DATA / "logits.safetensors")[f"{folder}.logits"], atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-2)


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_saved_again_in_the_second_format(folder, tmp_path):
    shutil.copytree(DATA / folder, tmp_path / "adapter")
    model = make_model(folder.rsplit("-", 1)[-1])
    adapter = SaraAdapter.load(model, tmp_path / "adapter")
    assert adapter.parts == []
    adapter.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {TENSORS_FILE, CONFIG_FILE}
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["format_version"] == storage.FORMAT_VERSION
    fresh = make_model(folder.rsplit("-", 1)[-1])
    again = SaraAdapter.load(fresh, tmp_path / "adapter")
    assert same_bits(again.state_dict(), adapter.state_dict())
    assert torch.equal(logits(fresh), logits(model))


# What hf_sara 0.1.0 did when it saved, one after the other. A crash could come after each.
STEPS = {
    "the new factors": (FACTORS_FILE, PENDING_FACTORS_FILE),
    "the new config": (CONFIG_FILE, PENDING_CONFIG_FILE),
    "the tensors in their place": (TENSORS_FILE, TENSORS_FILE),
    "the factors in their place": (FACTORS_FILE, FACTORS_FILE),
    "the config in its place": (CONFIG_FILE, CONFIG_FILE),
}


@pytest.mark.parametrize("step", range(len(STEPS) + 1))
@pytest.mark.parametrize("old", ["mo_sara-llama", "sara-llama"])
def test_a_save_that_was_cut_off_left_the_old_adapter_or_the_new_one(old, step, tmp_path):
    new, folder = "mo_sara-save-llama", tmp_path / "adapter"
    shutil.copytree(DATA / old, folder)
    for source, target in list(STEPS.values())[:step]:
        shutil.copy(DATA / new / source, folder / target)
        if target in (FACTORS_FILE, CONFIG_FILE):
            # It was renamed.
            (folder / (PENDING_FACTORS_FILE if target == FACTORS_FILE else PENDING_CONFIG_FILE)).unlink()
    model = make_model()
    adapter = SaraAdapter.load(model, folder)
    expected = load_file(DATA / "logits.safetensors")[f"{new if step >= 3 else old}.logits"]
    assert torch.allclose(logits(model, **make_inputs(model)), expected, atol=1e-5)
    # The next save puts everything in order.
    adapter.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {TENSORS_FILE, CONFIG_FILE}
    assert same_bits(storage.read(folder).tensors, adapter.state_dict())
