import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from conftest import make_model, sara_arguments
from hub_server import HubServer

from hf_sara import plan
from hf_sara.base_model import BaseWeights
from hf_sara.targets import find_sites


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shard", ["50GB", "10KB"])
def test_a_plan_from_the_files_is_that_of_the_loaded_model(family, method, shard, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    found, expected = plan(str(tmp_path), sara_arguments(method)), plan(model, sara_arguments(method))
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_read_bit_by_bit(dtype, tmp_path):
    model = make_model("gpt_neox", dtype=dtype)
    model.save_pretrained(tmp_path)
    checkpoint = BaseWeights(str(tmp_path))
    for site in find_sites(model, sara_arguments()):
        read = checkpoint.weight(site)
        assert read.dtype == dtype
        assert torch.equal(read, site.weight(model))


def test_a_checkpoint_of_the_base_model_alone_has_no_prefix(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model.model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(str(tmp_path), sara_arguments()).sites == plan(model, sara_arguments()).sites


def test_a_budget_is_solved_too(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    args = sara_arguments(threshold=None, parameter_budget="400")
    assert plan(str(tmp_path), args).threshold == plan(model, args).threshold


def test_what_cannot_be_read_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be a Hub id"):
        BaseWeights(str(tmp_path / "no" / "where"))
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        BaseWeights(str(tmp_path))
    for damaged in (b"", whole[:4], struct.pack("<Q", 2**60), whole[:8] + b"x" * 20):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError):  # noqa: PT011
            BaseWeights(str(tmp_path))
    weights.write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        plan(str(tmp_path), sara_arguments())
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["os.system"]}))
    with pytest.raises(ValueError, match="not one of transformers"):
        BaseWeights(str(tmp_path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "model.safetensors is damaged: it is not a JSON object"),
        ("[" * 10**5, "model.safetensors is damaged: it is not JSON"),
        ('{"a": 1}', "model.safetensors is damaged: the record of 'a' is not a JSON object"),
        ('{"a": {"dtype": "F32", "shape": [1]}}', "'data_offsets' is missing in the record of 'a'"),
        ('{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', r"shape=\['1'\] .* list\[int\]"),
        ('{"a": {"dtype": 32, "shape": [1], "data_offsets": [0, 4]}}', "dtype=32 .* type str"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "damaged"),
        (
            '{"a": {"dtype": "F32", "shape": [1000000000, 1000000000], "data_offsets": [0, 4]}}',
            "a has 4 bytes, which its shape",
        ),
    ],
)
def test_a_damaged_header_is_a_clear_error(header, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(ValueError, match=message):
        BaseWeights(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("[1]", ValueError, "not a JSON object"),
        ("{}", ValueError, "no map of weights files"),
        ('{"weight_map": ["a"]}', ValueError, "no map of weights files"),
        ('{"weight_map": {"a": 1}}', ValueError, "no map of weights files"),
        ('{"weight_map": {"a": "../x.safetensors"}}', ValueError, "files outside of the model"),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', ValueError, "files outside of the model"),
        ('{"weight_map": {"a": "D:x.safetensors"}}', ValueError, "files outside of the model"),
        ('{"weight_map": {"a": ".."}}', FileNotFoundError, r"it has no \.\."),
        ('{"weight_map": {"a": "pipe"}}', FileNotFoundError, "it has no pipe"),
    ],
)
def test_a_damaged_index_is_a_clear_error(index, error, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=message):
        BaseWeights(str(tmp_path))


@pytest.mark.slow
def test_from_the_hub_only_headers_and_the_chosen_matrices_are_transferred(tmp_path):
    model = make_model(vocab_size=20_000)
    model.save_pretrained(tmp_path / "base")
    expected = [site.k for site in plan(model, sara_arguments()).sites]
    code = (
        "from hf_sara import SaraArguments, plan\n"
        "sites = plan('someone/base', SaraArguments(threshold=0.3)).sites\n"
        "print('ranks', [site.k for site in sites])"
    )
    with HubServer(tokens={}) as server:
        server.add_repo("someone/base", files={p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()})
        environment = server.environment(tmp_path / "cache")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert f"ranks {expected}" in done.stdout, done.stderr
        reads = [r for r in server.requests if "range" in r.headers]
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    asked = 0
    for request in reads:
        first, last = request.headers["range"].removeprefix("bytes=").split("-")
        asked += int(last) - int(first) + 1
    assert 0 < asked < size / 20
