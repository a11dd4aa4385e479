"""Adapters that hf_sara 0.1.0 wrote still load: the folders in data/format1, and the logits that they gave there."""

from pathlib import Path

import pytest
import torch
from conftest import logits, make_inputs, make_model
from safetensors.torch import load_file

from hf_sara import SaraAdapter

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
