import base64
import contextlib
import errno
import gc
import itertools
import json
import logging
import shutil
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import (
    attach_trained,
    logits,
    make_inputs,
    make_model,
    rotated_lapack,
    same_bits,
    sara_arguments,
    train,
)
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from hf_sara import AdapterError, SaraAdapter, factors, files, storage
from hf_sara.base_model import BaseRecord
from hf_sara.storage import (
    CONFIG_FILE,
    CONFIG_KEY,
    FACTORS_FILE,
    PENDING_CONFIG_FILE,
    PENDING_FACTORS_FILE,
    TENSORS_FILE,
)
from hf_sara.tensor_files import TensorFile

FORMAT1 = Path(__file__).parent / "data" / "format1"


@pytest.fixture
def other_cache(monkeypatch, tmp_path):
    """The machine that loads has not made the adapter: nothing is in its cache."""
    return lambda: monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "other cache"))


def saved(folder, method="sara", family="llama", seed=0, **changes):
    """A trained adapter in a folder, and its logits."""
    model = make_model(family, seed=seed)
    adapter = attach_trained(model, method, **changes)
    adapter.save_pretrained(folder)
    return adapter, logits(model)


def refused(folder, message, model=None, error=AdapterError):
    """Loading fails with the message, and the model is what it was."""
    model = make_model() if model is None else model
    state, attributes, output = dict(model.state_dict()), dict(vars(model)), logits(model)
    with pytest.raises(error, match=message):
        SaraAdapter.load(model, folder)
    assert same_bits(dict(model.state_dict()), state)
    assert vars(model) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), output)


def header_text(folder) -> str:
    """The config's text in the header of the tensors."""
    with safe_open(folder / TENSORS_FILE, "pt") as file:
        return file.metadata()[CONFIG_KEY]


def edit(folder, change) -> None:
    """Change the config in the header, and nothing else."""
    path, config = folder / TENSORS_FILE, json.loads(header_text(folder))
    change(config)
    path.write_bytes(save(load(path.read_bytes()), {CONFIG_KEY: json.dumps(config)}))


# ---- round trips ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("factors", ["recompute", "save"])
def test_a_trained_adapter_does_on_a_fresh_base_what_it_did(family, method, factors, tmp_path, other_cache):
    adapter, live = saved(tmp_path / "a", method, family, factors=factors)
    with adapter.disabled():
        effect = float((live - logits(adapter.model)).abs().max())
    other_cache()
    torch.manual_seed(99)  # what is random at load must not matter
    fresh = make_model(family)
    again = SaraAdapter.load(fresh, tmp_path / "a")
    assert effect > 1e-3
    assert float((logits(fresh) - live).abs().max()) <= 1e-6 * effect
    assert (again.args, again.sites, again.threshold) == (adapter.args, adapter.sites, adapter.threshold)
    assert same_bits(again.state_dict(), adapter.state_dict())
    # It can be trained on, and saved again to the same bytes before that.
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / TENSORS_FILE).read_bytes() == (tmp_path / "b" / TENSORS_FILE).read_bytes()
    assert (tmp_path / "a" / CONFIG_FILE).read_text() == (tmp_path / "b" / CONFIG_FILE).read_text()
    train(again)
    assert not torch.equal(logits(fresh), live)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sara", "singular_values": False},
        {"method": "sara", "zero_init_vh": True},
        {"method": "mo_sara", "v_position": "front"},
        {"method": "mo_sara", "v_position": "none"},
        {"method": "mo_sara", "num_heads": 1},
    ],
)
def test_ablations_travel_too(changes, tmp_path):
    _, live = saved(tmp_path, **changes)
    fresh = make_model()
    SaraAdapter.load(fresh, tmp_path)
    assert torch.allclose(logits(fresh), live, atol=1e-6)


def test_a_folder_holds_json_and_safetensors_only(method, tmp_path):
    saved(tmp_path, method)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS_FILE, CONFIG_FILE]
    assert header_text(tmp_path) == (tmp_path / CONFIG_FILE).read_text()
    tensors = load_file(tmp_path / TENSORS_FILE)
    # Frozen factors do not travel; SARA's are trained, and do.
    ends = {name.rsplit(".", 1)[-1] for name in tensors}
    assert ends == {"sara": {"U", "S", "Vh"}, "mo_sara": {"S", "gate_down", "gate_up", "v"}}[method]


def test_saved_factors_lie_beside_the_trained_tensors_in_one_file(tmp_path):
    adapter, live = saved(tmp_path, "mo_sara", factors="save")
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS_FILE, CONFIG_FILE]
    tensors = load_file(tmp_path / TENSORS_FILE)
    assert same_bits({name: tensors[name] for name in adapter.frozen_factors()}, adapter.frozen_factors())
    assert set(tensors) == {*adapter.frozen_factors(), *adapter.state_dict()}
    assert same_bits(storage.read(tmp_path).tensors, adapter.state_dict())
    size = storage.size_on_disk(tmp_path)
    saved(tmp_path, "mo_sara")
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS_FILE, CONFIG_FILE]
    assert storage.size_on_disk(tmp_path) < size
    fresh = make_model()
    SaraAdapter.load(fresh, tmp_path)
    assert torch.allclose(logits(fresh), live, atol=1e-6)


def test_a_head_and_rows_of_embeddings_travel_too(tmp_path):
    _, live = saved(tmp_path / "head", family="bert")
    fresh = make_model("bert")
    fresh.classifier.reset_parameters()
    SaraAdapter.load(fresh, tmp_path / "head")
    assert torch.equal(logits(fresh), live)

    adapter, live = saved(tmp_path / "rows", trainable_token_indices=[3, 20])
    assert {"model.embed_tokens.trainable_tokens", "lm_head.trainable_tokens"} <= set(adapter.state_dict())
    fresh = make_model()
    with torch.no_grad():
        for weight in (fresh.model.embed_tokens.weight, fresh.lm_head.weight):
            weight[[3, 20]] += 1
    SaraAdapter.load(fresh, tmp_path / "rows")
    assert torch.equal(logits(fresh), live)


@pytest.mark.parametrize("seed", range(3))
def test_another_lapack_at_load_arrives_at_the_same_factors(seed, tmp_path, other_cache, monkeypatch):
    # Signs flipped everywhere, and inside of clusters of equal singular values another basis altogether.
    hadamard = torch.tensor([[1.0]])
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    clustered = torch.block_diag(3 * hadamard, 2 * hadamard, hadamard) / 10  # exactly 8 + 8 + 8 equal values

    def base():
        model = make_model()
        for number, layer in enumerate(model.model.layers, start=1):
            layer.self_attn.q_proj.weight.data.copy_(clustered * number)
        return model

    model = base()
    adapter = attach_trained(model, "mo_sara", threshold=0.6)
    assert adapter.sites[0].k == 11
    assert adapter.seeds[adapter.sites[0].name].clusters == ((0, 8), (8, 16))  # the second one is cut by k
    live = logits(model)
    with adapter.disabled():
        effect = float((live - logits(model)).abs().max())
    adapter.save_pretrained(tmp_path / "a")

    other_cache()
    called = []
    turned, plain = rotated_lapack([(0, 8), (8, 16)], seed), rotated_lapack([], seed)

    def lapack(matrix, choose):
        called.append(len(matrix))
        return (turned if len(matrix) == 24 else plain)(matrix, choose)

    monkeypatch.setattr(factors, "leading_eigenpairs", lapack)
    fresh = base()
    SaraAdapter.load(fresh, tmp_path / "a")
    assert sorted(called) == [12, 12, 24, 24]
    assert float((logits(fresh) - live).abs().max()) <= 1e-6 * max(effect, 1.0)


def test_seeds_and_sketches_add_a_tenth_to_the_trained_bytes_at_most(tmp_path):
    # The shapes of SmolLM-135M's attention.
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    adapter = SaraAdapter.attach(make_model(**sizes), sara_arguments("mo_sara", num_heads=5))
    assert [site.shape for site in adapter.sites] == [(576, 576), (576, 192)]
    adapter.save_pretrained(tmp_path)
    whole = len((tmp_path / CONFIG_FILE).read_bytes())
    config = (tmp_path / CONFIG_FILE).read_text()
    for site in json.loads(config)["sites"]:
        for name in ("dtype", "sha256", "sketch"):
            config = config.replace(f',"{name}":"{site[name]}"', "")
    assert 0 < whole - len(config) <= 0.1 * 4 * adapter.num_parameters()


# ---- another base ----


def test_a_base_with_one_changed_weight_is_refused(tmp_path):
    saved(tmp_path, "mo_sara")
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 4] += 1e-6
    refused(tmp_path, r"layers\.1\.self_attn\.v_proj: this base's weight is not the one.*SHA-256", model)
    # SARA's update does not depend on the weights; a changed base is the user's affair there.
    saved(tmp_path, "sara")
    SaraAdapter.load(model, tmp_path)


def test_a_weight_that_is_not_adapted_may_change(tmp_path):
    saved(tmp_path, "mo_sara")
    model = make_model()
    model.lm_head.weight.data.mul_(2)
    SaraAdapter.load(model, tmp_path)


@pytest.mark.parametrize(
    ("method", "name", "commit", "said"),
    [
        ("sara", "someone/base", "1" * 40, False),
        ("sara", "someone/base", None, False),
        ("sara", "someone/other", "1" * 40, True),
        ("sara", "someone/base", "2" * 40, True),
        ("sara", "/a/folder", None, False),
        # Its weights are compared, and they are the same ones here.
        ("mo_sara", "someone/other", "1" * 40, False),
    ],
)
def test_a_base_of_another_name_or_commit_is_warned_of_where_weights_are_not_compared(
    method, name, commit, said, tmp_path, caplog
):
    model = make_model()
    model.config._name_or_path, model.config._commit_hash = "someone/base", "1" * 40
    attach_trained(model, method).save_pretrained(tmp_path)
    other = make_model()
    other.config._name_or_path, other.config._commit_hash = name, commit
    SaraAdapter.load(other, tmp_path)
    assert ("Their weights may differ" in caplog.text) == said


def test_a_base_in_another_dtype_is_refused_with_the_dtype_to_load(tmp_path):
    saved(tmp_path, "mo_sara")
    refused(
        tmp_path,
        r"trained on a float32 base, this one is bfloat16.*dtype=torch\.float32.*factors='save'",
        make_model(dtype=torch.bfloat16),
    )


def test_a_bfloat16_base_may_be_loaded_as_its_exact_upcast(tmp_path, other_cache):
    model = make_model(dtype=torch.bfloat16)
    adapter = attach_trained(model, "mo_sara")
    adapter.save_pretrained(tmp_path / "a")
    other_cache()
    upcast = make_model(dtype=torch.bfloat16).float()
    again = SaraAdapter.load(upcast, tmp_path / "a")
    assert same_bits(again.state_dict(), adapter.state_dict())
    for site, delta in again.deltas():
        assert torch.equal(delta.U.bfloat16(), adapter.delta(site).U)
    expected = logits(model).float()
    assert torch.allclose(logits(upcast), expected, atol=0.1 * float(expected.abs().max()))


def test_saved_factors_load_on_a_cast_base(tmp_path):
    adapter, live = saved(tmp_path, "mo_sara", factors="save")
    cast = make_model(dtype=torch.bfloat16)
    again = SaraAdapter.load(cast, tmp_path)
    assert same_bits(again.state_dict(), adapter.state_dict())
    for site, delta in again.deltas():
        assert torch.equal(delta.U, adapter.delta(site).U.bfloat16())
    assert torch.allclose(logits(cast).float(), live, atol=0.1 * float(live.abs().max()))


def test_a_model_without_a_site_and_a_site_of_another_shape_are_refused(method, tmp_path):
    saved(tmp_path, method)
    refused(
        tmp_path, r"adapts 'model\.layers\.0\.self_attn\.q_proj', which this GPT2LM.* not have", make_model("gpt2")
    )
    refused(tmp_path, r"layers\.1\.self_attn\.q_proj', which this", make_model(num_hidden_layers=1))
    refused(tmp_path, r"q_proj: .*shape \(24, 24\), this model's has \(48, 48\)", make_model(hidden_size=48))
    saved(tmp_path / "fused", method, "gpt_neox")
    # The same shape and the same name, but other columns.
    edit(tmp_path / "fused", lambda config: config["sites"][0].update(slice={"groups": 4, "start": 6, "stop": 12}))
    refused(tmp_path / "fused", r"query_key_value\.q: ", make_model("gpt_neox"))


def test_a_factor_that_came_out_differently_is_refused(tmp_path):
    saved(tmp_path, "mo_sara")

    def turn_one_sign(config):
        sketch = bytearray(base64.b64decode(config["sites"][0]["sketch"]))
        sketch[0:4] = struct.pack("<f", struct.unpack("<f", sketch[0:4])[0] + 0.01)
        config["sites"][0]["sketch"] = base64.b64encode(bytes(sketch)).decode()

    edit(tmp_path, turn_one_sign)
    refused(tmp_path, r"layers\.0\.self_attn\.q_proj: the singular vectors computed here are not.*factors='save'")


# ---- missing files; for damaged ones see test_hostile.py ----


def test_a_missing_folder_or_file_is_named(tmp_path):
    refused(tmp_path / "nowhere", "no adapter folder .*nowhere", error=FileNotFoundError)
    refused(tmp_path, f"has no {TENSORS_FILE}", error=FileNotFoundError)
    saved(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    refused(tmp_path, f"has no {TENSORS_FILE}", error=FileNotFoundError)


def test_the_config_beside_the_tensors_is_a_copy_that_may_be_missing_or_wrong(tmp_path, caplog):
    adapter, live = saved(tmp_path)

    def loads() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_sara"):
            model = make_model()
            again = SaraAdapter.load(model, tmp_path)
        assert (again.args, again.sites) == (adapter.args, adapter.sites)
        assert torch.allclose(logits(model), live, atol=1e-6)
        return [record.getMessage() for record in caplog.records]

    assert not loads()
    config = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_bytes(config.replace("\n", "\r\n").encode())
    assert not loads()
    for wrong in (config.replace('"k":', '"k":1'), "not json", ""):
        (tmp_path / CONFIG_FILE).write_text(wrong)
        (warning,) = loads()
        assert f"{CONFIG_FILE} is not the config of the adapter beside it" in warning
    (tmp_path / CONFIG_FILE).unlink()
    assert not loads()
    # The next save makes both the same again.
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / CONFIG_FILE).read_text() == config == header_text(tmp_path)
    assert not loads()


# ---- writing ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("exists", [True, False])
def test_tensors_that_are_not_finite_are_refused_and_nothing_is_written(method, tmp_path, value, exists):
    folder = tmp_path / "adapter"
    adapter = attach_trained(make_model(), method)
    if exists:
        adapter.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None
    name, tensor = list(adapter.trained().items())[-1]
    tensor.data.view(-1)[-1] = value
    with pytest.raises(AdapterError, match=f"{name}: .*NaN or infinite"):
        adapter.save_pretrained(folder)
    assert folder.exists() == exists
    if exists:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Crash(BaseException):
    """The machine stops here; no handler of ordinary errors sees it."""


def save_until(adapter, folder, step: int, when: str) -> bool:
    """Save, with a crash at the step-th rename: before it, after it, or while its file is written."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        name = "fsync" if when == "writing" else "replace"
        original = getattr(files.os, name)

        def stop(*arguments):
            nonlocal count
            count += 1
            if count == step and when != "after":
                raise Crash
            result = original(*arguments)
            if count == step:
                raise Crash
            return result

        patch.setattr(files.os, name, stop)
        try:
            adapter.save_pretrained(folder)
        except Crash:
            return True
    return False


WRITES = {
    "sara over sara": ({"method": "sara"}, {"method": "sara", "threshold": 0.4}),
    "mo_sara over sara": ({"method": "sara"}, {"method": "mo_sara"}),
    "same shapes": ({"method": "sara"}, {"method": "sara"}),
    "factors over seeds": ({"method": "mo_sara"}, {"method": "mo_sara", "factors": "save"}),
    "seeds over factors": ({"method": "mo_sara", "factors": "save"}, {"method": "mo_sara"}),
    "sara over factors": ({"method": "mo_sara", "factors": "save"}, {"method": "sara"}),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("when", ["writing", "before", "after"])
@pytest.mark.parametrize("write", WRITES)
def test_after_a_crash_the_folder_has_the_old_adapter_or_the_new_one(write, when, tmp_path):
    old, new = WRITES[write]
    _, old_output = saved(tmp_path / "old", **old)
    adapter = train(attach_trained(make_model(), seed=17, **new))
    new_output = logits(adapter.model)
    assert not torch.allclose(old_output, new_output, atol=1e-3)
    check_crashes(tmp_path, adapter, when, old_output, new_output)


@pytest.mark.parametrize("when", ["writing", "before", "after"])
def test_after_a_crash_factors_are_those_of_their_tensors(when, tmp_path):
    # Two adapters with the same shapes, trained on two bases, each with its own factors, over one another.
    old, _ = saved(tmp_path / "old", "mo_sara", factors="save", layers="0")
    adapter, _ = saved(tmp_path / "new", "mo_sara", factors="save", layers="0", seed=5)
    assert [site.k for site in old.sites] == [site.k for site in adapter.sites]
    outputs = []
    for name in ("old", "new"):
        base = make_model()
        SaraAdapter.load(base, tmp_path / name)
        outputs.append(logits(base))
    assert not torch.allclose(*outputs, atol=1e-3)
    check_crashes(tmp_path, adapter, when, *outputs)


# Of each write, whether the new adapter is there after a crash at the first of the two files, at the second, and after
# no crash. When both are in their places, their names are written to the disk too.
IS_NEW = {"writing": [False, False, True, True], "before": [False, True, True], "after": [True, True, True]}


def check_crashes(tmp_path, adapter, when, old_output, new_output):
    seen = []
    for step in range(1, 10):
        folder = tmp_path / f"crashed at {step}"
        shutil.copytree(tmp_path / "old", folder)
        crashed = save_until(adapter, folder, step, when)
        model = make_model()
        SaraAdapter.load(model, folder)
        found = logits(model)
        is_new = torch.allclose(found, new_output, atol=1e-5)
        assert is_new or torch.allclose(found, old_output, atol=1e-5)
        seen.append(is_new)
        # Nothing temporary stays behind, and the next write puts everything in order.
        assert not list(folder.glob(".*")), list(folder.iterdir())
        adapter.save_pretrained(folder)
        model = make_model()
        SaraAdapter.load(model, folder)
        assert torch.allclose(logits(model), new_output, atol=1e-5)
        assert {path.name for path in folder.iterdir()} == {TENSORS_FILE, CONFIG_FILE}
        assert (folder / CONFIG_FILE).read_text() == header_text(folder)
        if not crashed:
            break
    assert seen == IS_NEW[when]


def test_a_first_write_that_is_cut_off_leaves_the_adapter_or_none(method, tmp_path):
    adapter = attach_trained(make_model(), method)
    live = logits(adapter.model)
    found = []
    for when, step in (("writing", 1), ("writing", 2), ("before", 1), ("before", 2), ("after", 1), ("after", 2)):
        folder = tmp_path / f"{when} {step}"
        assert save_until(adapter, folder, step, when)
        model = make_model()
        try:
            SaraAdapter.load(model, folder)
        except FileNotFoundError:
            found.append(False)
        else:
            found.append(True)
            assert torch.allclose(logits(model), live, atol=1e-6)
    assert found == [False, False, False, True, True, True]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("step", range(1, 6))
@pytest.mark.parametrize("when", ["writing", "before", "after"])
def test_after_a_crash_over_the_first_format_the_folder_has_the_old_adapter_or_the_new_one(when, step, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(FORMAT1 / "mo_sara-save-llama", folder)
    for file, pending in ((CONFIG_FILE, PENDING_CONFIG_FILE), (FACTORS_FILE, PENDING_FACTORS_FILE)):
        shutil.copy(folder / file, folder / pending)
    old = storage.read(folder).tensors
    adapter = attach_trained(make_model(), "mo_sara", seed=17)
    # The files of the first format are deleted after the second rename, one by one.
    with pytest.MonkeyPatch.context() as patch:
        left = max(0, step - 2)
        unlink = files.os.unlink

        def stop(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            unlink(*arguments, **options)

        if left:
            patch.setattr(files.os, "unlink", stop)
        crashed = save_until(adapter, folder, step, when)
    assert crashed
    found = storage.read(folder).tensors
    assert same_bits(found, adapter.state_dict() if step > 2 or IS_NEW[when][step - 1] else old)
    adapter.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {TENSORS_FILE, CONFIG_FILE}


def fill_disk(patch, number: int) -> None:
    """Let the disk be full in the middle of the number-th file that is written."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = []

    def open_file(path, mode="r"):
        opened.append(path)
        return (Full if len(opened) == number else contextlib.closing)(path.open(mode))

    patch.setattr(files, "open", open_file, raising=False)


@pytest.fixture(scope="module")
def three():
    """Three adapters with their tensors: two with the same shapes, and one with others and with saved factors."""
    adapters = [
        attach_trained(make_model(), "mo_sara", seed=1),
        attach_trained(make_model(), "mo_sara", seed=2),
        attach_trained(make_model(), "mo_sara", seed=3, threshold=0.7, factors="save"),
    ]
    return [(adapter, adapter.state_dict()) for adapter in adapters]


CRASHES = [(when, step) for when in IS_NEW for step in (1, 2)]


@pytest.mark.parametrize("full", [None, pytest.param(1, marks=pytest.mark.slow), 2])
def test_after_two_crashes_in_a_row_and_a_full_disk_the_folder_has_the_last_adapter_that_was_put_in_place(
    full, three, tmp_path
):
    (first, old), *news = three
    first.save_pretrained(tmp_path / "old")
    for number, crashes in enumerate(itertools.product(CRASHES, CRASHES)):
        folder, expected = tmp_path / str(number), old
        shutil.copytree(tmp_path / "old", folder)
        for (when, step), (adapter, tensors) in zip(crashes, news, strict=True):
            assert save_until(adapter, folder, step, when)
            if IS_NEW[when][step - 1]:
                expected = tensors
            assert same_bits(storage.read(folder).tensors, expected)
            if full is not None:
                before = {path.name: path.read_bytes() for path in folder.iterdir()}
                with pytest.MonkeyPatch.context() as patch:
                    fill_disk(patch, full)
                    with pytest.raises(OSError, match="No space left"):
                        first.save_pretrained(folder)
                assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        # The whole adapter came, with its factors.
        again = SaraAdapter.load(make_model(), folder)
        assert same_bits(again.state_dict(), expected)
        assert {path.name for path in folder.iterdir()} == {TENSORS_FILE, CONFIG_FILE}


@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_leaves_the_old_adapter_and_no_temporary_file(number, tmp_path, monkeypatch):
    adapter, _ = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(adapter)
    fill_disk(monkeypatch, number)
    with pytest.raises(OSError, match="No space left"):
        adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_is_not_read(tmp_path):
    adapter, _ = saved(tmp_path)
    for name in (TENSORS_FILE, CONFIG_FILE):
        (tmp_path / f".{name}.1-2.tmp").write_bytes(b"half")
    assert same_bits(storage.read(tmp_path).tensors, adapter.state_dict())
    train(adapter).save_pretrained(tmp_path)
    assert same_bits(storage.read(tmp_path).tensors, adapter.state_dict())


def test_writers_with_the_same_ids_on_two_machines_have_different_temporary_files(tmp_path, monkeypatch):
    renamed = []
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    monkeypatch.setattr(files.os, "replace", lambda source, target: renamed.append(source))
    for _ in range(2):
        files.write_file(tmp_path / "a", b"1")
    assert len(set(renamed)) == 2


def test_a_rename_is_written_to_the_disk_where_the_system_can(tmp_path, monkeypatch):
    opened, open_file = [], files.os.open
    monkeypatch.setattr(files.os, "open", lambda *arguments: opened.append(arguments[0]) or open_file(*arguments))
    files.write_file(tmp_path / "a", b"1")
    assert opened == [tmp_path]

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    files.write_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"


def test_a_file_that_cannot_be_opened_is_one_error_and_no_noise(tmp_path, monkeypatch):
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path / "nothing")
    gc.collect()
    assert not noise


# ---- readers beside writers ----


@pytest.mark.parametrize("order", [(0, 1), (0, 2), (2, 0)])
def test_an_adapter_that_was_read_stays_what_it_was_while_another_takes_its_place(order, three, tmp_path):
    (old, tensors), (new, _) = (three[number] for number in order)
    old.save_pretrained(tmp_path / "a")
    reader = storage.read(tmp_path / "a")
    new.save_pretrained(tmp_path / "a")
    model = make_model()
    again = SaraAdapter.from_saved(model, reader)
    assert same_bits(again.state_dict(), tensors)
    assert (again.args, again.sites) == (old.args, old.sites)
    assert torch.allclose(logits(model), logits(old.model), atol=1e-5)
    # The folder may also go.
    shutil.rmtree(tmp_path / "a")
    assert same_bits(reader.tensors, tensors)


@pytest.mark.parametrize("number", [1, 2])
def test_a_writer_may_put_a_file_in_place_while_a_reader_opens_it(number, three, tmp_path, monkeypatch):
    # safetensors opens a file twice by its name: to map its header, and to make torch map its tensors.
    three[0][0].save_pretrained(tmp_path)
    opening = torch.UntypedStorage.from_file

    def replaced_meanwhile(*arguments, **options):
        monkeypatch.setattr(torch.UntypedStorage, "from_file", opening)
        three[number][0].save_pretrained(tmp_path)
        return opening(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced_meanwhile)
    found = storage.read(tmp_path).tensors
    assert any(same_bits(found, three[which][1]) for which in (0, number))


def test_a_reader_beside_several_writers_sees_whole_adapters_only(three, tmp_path):
    three[0][0].save_pretrained(tmp_path)
    failures = []

    def write(adapter):
        try:
            for _ in range(25):
                adapter.save_pretrained(tmp_path)
        except BaseException as error:
            failures.append(error)

    # Two writers have the same adapter, as the processes of a training may.
    writers = [threading.Thread(target=write, args=(three[number][0],)) for number in (0, 1, 2, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        reader = storage.read(tmp_path)
        tensors = reader.tensors
        (which,) = [number for number, (_, known) in enumerate(three) if same_bits(tensors, known)]
        assert (reader.args, reader.sites) == (three[which][0].args, three[which][0].sites)
        if reader.factors_sha256 is not None:
            assert set(reader.files.read_factors(reader)) == set(three[which][0].frozen_factors())
        reads += 1
    for writer in writers:
        writer.join()
    assert not failures
    assert reads > 3
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS_FILE, CONFIG_FILE}


# ---- what the config says ----


def test_the_config_can_be_read_by_people(method, tmp_path):
    adapter, _ = saved(tmp_path, method)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["format_version"] == 2
    assert config["method"] == method
    assert config["arguments"] == adapter.args.to_dict()
    assert [(s["name"], tuple(s["shape"]), s["k"]) for s in config["sites"]] == [
        (site.name, site.shape, site.k) for site in adapter.sites
    ]
    assert config["base"]["class"] == "LlamaForCausalLM"
    assert config["base"]["dtype"] == "float32"
    assert set(config["versions"]) == {"hf_sara", "transformers", "torch", "python"}


def test_the_base_is_named_by_its_hub_id_but_never_by_a_path_of_this_machine(tmp_path):
    model = make_model()
    for name, expected in (("someone/model", "someone/model"), (str(tmp_path), None), ("/home/me/model", None)):
        model.config._name_or_path = name
        assert BaseRecord.of(model).model_id == expected
    labels = BaseRecord.of(make_model("bert")).id2label
    assert labels == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_a_compiled_model_takes_a_saved_adapter(tmp_path):
    _, live = saved(tmp_path)
    model = make_model()
    adapter = SaraAdapter.load(torch.compile(model, backend="eager"), tmp_path)
    assert adapter.model is model
    assert torch.allclose(model(**make_inputs(model)).logits, live, atol=1e-6)
