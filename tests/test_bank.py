"""Batches whose rows have different adapters: each row is what the adapter alone computes."""

import copy
import logging
import pickle
import threading
import time

import hub_client
import pytest
import torch
import transformers
from conftest import VOCABULARY, attach_trained, make_inputs, make_model, same_bits, sara_arguments, train
from training import make_idle

from hf_sara import AdapterBank, AdapterError, SaraAdapter, adapter_rows, storage
from hf_sara.row_names import BASE

server = hub_client.server
NAMES = ("one", "two", "three")
ROWS = ["two", BASE, "one", "three", "two"]
LIMITS = {"rtol": 1e-5, "atol": 1e-5}


def save_adapters(folder, family="llama", method="sara", names=NAMES, dtype=torch.float32, base=None, **changes):
    """The folders of trained adapters. Each goes on from the one before, with other data."""
    model = make_model(family, dtype=dtype, **(base or {}))
    torch.manual_seed(3)
    adapter = SaraAdapter.attach(model, sara_arguments(method, **{"modules_to_save": [], **changes}))
    for seed, name in enumerate(names):
        train(adapter, steps=2, inputs=make_inputs(model, seed=10 + seed)).save_pretrained(folder / name)
    return {name: folder / name for name in names}


def alone(folders, rows, inputs, family="llama", dtype=torch.float32, base=None):
    """The outputs of each row with its adapter alone."""
    found = {}
    for name in dict.fromkeys(rows):
        model = make_model(family, dtype=dtype, **(base or {}))
        if name != BASE:
            SaraAdapter.load(model, folders[name])
        with torch.no_grad():
            found[name] = model(**inputs).logits
    return torch.stack([found[name][index] for index, name in enumerate(rows)])


def inputs_for(model, rows=5):
    found = make_inputs(model, batch=rows)
    return {name: value for name, value in found.items() if name != "labels" or model.config.is_encoder_decoder}


def test_a_batch_in_inference_mode_leaves_the_next_one_free(method, tmp_path):
    model = make_model()
    bank = AdapterBank.load(model, save_adapters(tmp_path, method=method))
    inputs = inputs_for(model)
    with torch.inference_mode():
        before = model(**inputs, adapter_names=ROWS).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(**inputs, adapter_names=ROWS).logits, before)
    with torch.inference_mode():
        assert torch.equal(model(**inputs, adapter_names=ROWS).logits, before)
    assert bank.names == list(NAMES)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
def test_each_row_has_the_outputs_of_its_adapter(family, method, changes, tmp_path):
    folders = save_adapters(tmp_path, family, method, **changes)
    model = make_model(family)
    inputs = inputs_for(model)
    plain = model(**inputs).logits
    bank = AdapterBank.load(model, folders)
    assert bank.names == list(NAMES)
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
        assert torch.equal(model(**inputs).logits, plain)
    torch.testing.assert_close(found, alone(folders, ROWS, inputs, family), **LIMITS)
    assert not torch.allclose(found[0], plain[0], rtol=1e-3, atol=1e-3)
    for name in NAMES:
        assert same_bits(bank.state(name), SaraAdapter.load(make_model(family), folders[name]).state_dict())
    bank.detach()
    assert not any(".sara" in name for name, _ in model.named_modules())
    assert torch.equal(model(**inputs).logits, plain)
    assert "generate" not in vars(model)


VARIANTS = {
    "one head": ("mo_sara", {"num_heads": 1}),
    "v in front": ("mo_sara", {"v_position": "front", "target_modules": "all-linear"}),
    "no v": ("mo_sara", {"v_position": "none"}),
    "no singular values": ("sara", {"singular_values": False}),
    "saved factors": ("mo_sara", {"factors": "save"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_methods(variant, tmp_path):
    method, changes = VARIANTS[variant]
    folders = save_adapters(tmp_path, method=method, **changes)
    model = make_model()
    inputs = inputs_for(model)
    AdapterBank.load(model, folders)
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
    torch.testing.assert_close(found, alone(folders, ROWS, inputs), **LIMITS)


GENERATIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_writes_for_each_row_what_its_adapter_writes(how, family, method, tmp_path):
    folders = save_adapters(tmp_path, family, method)
    values = {"max_new_tokens": 6, "min_new_tokens": 6, **GENERATIONS[how]}
    copies = values.get("num_return_sequences", 1)
    ids = torch.randint(3, VOCABULARY, (len(ROWS), 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    # The rows have different lengths, with padding on the left.
    for row in range(len(ROWS)):
        ids[row, :row], mask[row, :row] = 0, 0
    model = make_model(family)
    AdapterBank.load(model, folders)
    if how == "sampled":
        torch.manual_seed(4)
        found = model.generate(ids, attention_mask=mask, adapter_names=ROWS, **values)
        with adapter_rows(model, ROWS):
            torch.manual_seed(4)
            assert torch.equal(model.generate(ids, attention_mask=mask, **values), found)
        assert found.shape[0] == copies * len(ROWS)
        return
    found = model.generate(ids, attention_mask=mask, adapter_names=ROWS, **values)
    for row, name in enumerate(ROWS):
        one = make_model(family)
        if name != BASE:
            SaraAdapter.load(one, folders[name])
        expected = one.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **values)
        assert torch.equal(found[copies * row : copies * (row + 1)], expected), name
    # Without names, the model is the base.
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **values),
        make_model(family).generate(ids, attention_mask=mask, **values),
    )


def test_half_precision(method, tmp_path):
    folders = save_adapters(tmp_path, method=method, dtype=torch.bfloat16)
    model = make_model(dtype=torch.bfloat16)
    inputs = inputs_for(model)
    AdapterBank.load(model, folders)
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
    expected = alone(folders, ROWS, inputs, dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_autocast(method, tmp_path):
    folders = save_adapters(tmp_path, method=method)
    model = make_model()
    inputs = inputs_for(model)
    AdapterBank.load(model, folders)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**inputs, adapter_names=ROWS).logits
        expected = alone(folders, ROWS, inputs)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["mo_sara", "sara"])
def test_a_compiled_model_is_not_compiled_again_when_the_names_change(method, tmp_path):
    folders = save_adapters(tmp_path, method=method)
    model = make_model()
    inputs = inputs_for(model)
    AdapterBank.load(model, folders)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (ROWS, ROWS[::-1], ["three"] * len(ROWS), [BASE, "one", "one", "two", "two"]):
        with torch.no_grad(), adapter_rows(compiled, rows):
            found = compiled(**inputs).logits
        torch.testing.assert_close(found, alone(folders, rows, inputs), **LIMITS)
    assert len(graphs) == 1


# ---- adding and removing ----


def test_adapters_come_and_go(method, tmp_path):
    folders = save_adapters(tmp_path, method=method)
    model = make_model()
    inputs = inputs_for(model, 2)
    bank = AdapterBank.load(model, {"one": folders["one"]})
    bank.add("two", folders["two"])
    bank.add("three", folders["three"])
    with torch.no_grad():
        found = model(**inputs, adapter_names=["three", "one"]).logits
    torch.testing.assert_close(found, alone(folders, ["three", "one"], inputs), **LIMITS)
    size = bank.nbytes
    bank.remove("one")
    assert bank.names == ["two", "three"]
    with pytest.raises(ValueError, match=r"adapter_names names 'one', and the banks of the model have: three, two\."):
        model(**inputs, adapter_names=["three", "one"])
    bank.add("other", folders["one"])
    assert bank.nbytes == size
    with torch.no_grad():
        found = model(**inputs, adapter_names=["three", "other"]).logits
    torch.testing.assert_close(found, alone(folders, ["three", "one"], inputs), **LIMITS)


def test_a_batch_that_runs_keeps_its_adapters(tmp_path):
    folders = save_adapters(tmp_path, method="mo_sara")
    model = make_model()
    inputs = inputs_for(model, 2)
    bank = AdapterBank.load(model, {name: folders[name] for name in ("one", "two")})
    begun, changed = threading.Event(), threading.Event()
    found = {}

    def serve():
        with torch.no_grad(), adapter_rows(model, ["one", "two"]):
            begun.set()
            assert changed.wait(60)
            found["logits"] = model(**inputs).logits

    serving = threading.Thread(target=serve)
    serving.start()
    assert begun.wait(60)
    bank.remove("one")
    bank.add("three", folders["three"])
    changed.set()
    serving.join()
    torch.testing.assert_close(found["logits"], alone(folders, ["one", "two"], inputs), **LIMITS)


def test_several_banks_and_an_adapter_for_all_rows(tmp_path):
    sara = save_adapters(tmp_path / "sara", method="sara", names=("one", "two"))
    mo_sara = save_adapters(tmp_path / "mo_sara", method="mo_sara", names=("three",))
    model = make_model()
    inputs = inputs_for(model)
    banks = [AdapterBank.load(model, folders) for folders in (sara, mo_sara)]
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
    torch.testing.assert_close(found, alone({**sara, **mo_sara}, ROWS, inputs), **LIMITS)
    # What an adapter for all rows adds is added too.
    adapter = attach_trained(model, "sara", seed=9)
    with torch.no_grad():
        both = model(**inputs, adapter_names=ROWS).logits
        assert not torch.allclose(both, found, **LIMITS)
        assert torch.equal(both[1], model(**inputs).logits[1])
        adapter.detach()
        torch.testing.assert_close(model(**inputs, adapter_names=ROWS).logits, found, rtol=0, atol=0)
    banks[0].detach()
    with torch.no_grad():
        found = model(**inputs, adapter_names="three").logits
    torch.testing.assert_close(found, alone(mo_sara, ["three"] * len(ROWS), inputs), **LIMITS)
    with pytest.raises(ValueError, match="would lose them"):
        model.save_pretrained(tmp_path / "model")
    banks[1].detach()
    model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_bank_of_its_own(how, tmp_path):
    folders = save_adapters(tmp_path, method="mo_sara")
    model = make_model()
    inputs = inputs_for(model)
    bank = AdapterBank.load(model, folders)
    other = how(model)
    bank.detach()
    with torch.no_grad():
        found = other(**inputs, adapter_names=ROWS).logits
    torch.testing.assert_close(found, alone(folders, ROWS, inputs), **LIMITS)
    ids = inputs["input_ids"]
    assert other.generate(ids, adapter_names=ROWS, max_new_tokens=2).shape == (len(ROWS), ids.shape[1] + 2)
    with pytest.raises((TypeError, ValueError), match="adapter_names"):
        model.generate(ids, adapter_names=ROWS, max_new_tokens=2)


def test_pipelines_pass_names_on(tokenizer, tmp_path):
    base = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0}
    folders = save_adapters(tmp_path, method="mo_sara", base=base)
    model = make_model(**base)
    AdapterBank.load(model, folders)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = "The quick brown fox"
    values = {"max_new_tokens": 4, "do_sample": False}
    found = pipe(text, adapter_names="two", **values)[0]["generated_text"]
    one = make_model(**base)
    SaraAdapter.load(one, folders["two"])
    alone_pipe = transformers.pipeline("text-generation", model=one, tokenizer=tokenizer, device="cpu")
    assert found == alone_pipe(text, **values)[0]["generated_text"]


def test_updates_that_did_not_train_add_nothing(tmp_path):
    model = make_idle()
    attach_trained(model, "sara", target_modules=["q_proj", "extra"]).save_pretrained(tmp_path / "one")
    assert storage.read(tmp_path / "one").untrained == {"model.extra"}
    model = make_idle()
    bank = AdapterBank.load(model, {"one": tmp_path / "one"})
    state = bank.state("one")
    assert not any(tensor.any() for name, tensor in state.items() if name.startswith("model.extra"))
    assert all(tensor.any() for name, tensor in state.items() if not name.startswith("model.extra"))


# ---- refusals ----


def test_wrong_names_are_errors_before_anything_runs(tmp_path):
    folders = save_adapters(tmp_path, method="mo_sara")
    model = make_model()
    inputs = inputs_for(model)
    with pytest.raises(ValueError, match="has no AdapterBank"), adapter_rows(model, ROWS):
        pass
    bank = AdapterBank.load(model, folders)
    for call in (model, lambda **values: model.generate(**values, max_new_tokens=1)):
        with pytest.raises(ValueError, match="adapter_names has 2 names, and the batch has 5 rows"):
            call(**inputs, adapter_names=["one", "two"])
        with pytest.raises(
            ValueError, match="adapter_names names 'four', 'five', and the banks of the model have: one"
        ):
            call(**inputs, adapter_names=["one", "four", "five", "four", BASE])
    with pytest.raises(ValueError, match="needs the number of rows"), adapter_rows(model, "one"):
        pass
    with pytest.raises(ValueError, match="already has an adapter 'one'"):
        bank.add("one", folders["two"])
    with pytest.raises(ValueError, match="not one that an adapter can have"):
        bank.add(BASE, folders["two"])
    with pytest.raises(ValueError, match=r"The bank has no adapter 'four'\. It has: one, two, three"):
        bank.remove("four")
    with pytest.raises(ValueError, match="at least one adapter"):
        AdapterBank.load(make_model(), {})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bank.add("four", tmp_path / "nowhere")
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
    torch.testing.assert_close(found, alone(folders, ROWS, inputs), **LIMITS)


def test_continuous_batching_cannot_follow_names(tmp_path):
    folders = save_adapters(tmp_path, method="mo_sara")
    model = make_model()
    bank = AdapterBank.load(model, folders)
    with pytest.raises(ValueError, match="generate_batch puts the tokens of all requests into one row"):
        model.generate_batch([[3, 4, 5], [6, 7]], adapter_names=["one", "two"])
    bank.detach()
    assert not {"generate", "generate_batch"} & vars(model).keys()


UNLIKE = {
    "method": ("sara", {}, "method='sara' and not 'mo_sara'"),
    "heads": ("mo_sara", {"num_heads": 2}, "num_heads=2 and not 3"),
    "ranks": ("mo_sara", {"threshold": 0.2}, r"at model\.layers\.0\.self_attn\.q_proj the rank \d+ and not \d+"),
    "sites": ("mo_sara", {"layers": "1"}, r"at model\.layers\.0\.self_attn\.q_proj the rank None and not \d+"),
    "v": ("mo_sara", {"v_position": "none"}, "v_position='none' and not 'back'"),
    "rows of tokens": (
        "mo_sara",
        {"trainable_token_indices": [3]},
        r"trains model\.embed_tokens, lm_head in addition",
    ),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_an_adapter_that_is_not_alike_is_refused_by_name(kind, tmp_path):
    method, changes, reason = UNLIKE[kind]
    folders = save_adapters(tmp_path, method="mo_sara")
    other = save_adapters(tmp_path, method=method, names=("other",), **changes)
    model = make_model()
    with pytest.raises(AdapterError, match=rf"'other'.*{reason}"):
        AdapterBank.load(model, {**folders, **other})
    assert not any(".sara" in name for name, _ in model.named_modules())
    bank = AdapterBank.load(model, folders)
    with pytest.raises(AdapterError, match=rf"'other'.*{reason}"):
        bank.add("other", other["other"])
    assert bank.names == list(NAMES)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    folders = save_adapters(tmp_path, method="mo_sara")
    with pytest.raises(AdapterError, match="this base's weight is not the one that the adapter was trained on"):
        AdapterBank.load(make_model(seed=8), folders)
    model = make_model(seed=8)
    attach_trained(model, "mo_sara", threshold=1.0).save_pretrained(tmp_path / "other")
    attach_trained(make_model(), "mo_sara", threshold=1.0).save_pretrained(tmp_path / "one")
    with pytest.raises(AdapterError, match=r"'other'.*the frozen factors of another weight"):
        AdapterBank.load(make_model(), {"one": tmp_path / "one", "other": tmp_path / "other"})


def test_linears_without_the_rows_of_the_batch_are_refused(tmp_path):
    model = make_model()
    folders = save_adapters(tmp_path, method="mo_sara")
    AdapterBank.load(model, folders)
    linear = model.model.layers[0].self_attn.q_proj
    with adapter_rows(model, ["one", "two"]):
        for shape in ((3, 4, 24), (1, 8, 24), (5, 24)):
            with pytest.raises(RuntimeError, match="does not have the 2 rows of the batch one after the other"):
                linear(torch.randn(shape))
        # The second dimension is that of the rows.
        with pytest.raises(RuntimeError, match="one after the other"):
            linear(torch.randn(4, 2, 24))
        linear(torch.randn(2, 24)), linear(torch.randn(6, 24)), linear(torch.randn(2, 5, 24))


# ---- the Hub ----


def hub_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adapters_from_the_hub(server, method, tmp_path):
    folders = save_adapters(tmp_path, method=method)
    for name in ("one", "two"):
        server.add_repo(f"alice/{name}", files=hub_files(folders[name]))
    model = make_model()
    bank = AdapterBank.load(model, {"first": "alice/one", "second": "alice/two", "third": folders["three"]})
    bank["second"].push_to_hub("alice/again")
    bank.add("fourth", "alice/again")
    for name, folder in {"first": "one", "second": "two", "third": "three", "fourth": "two"}.items():
        assert same_bits(bank.state(name), SaraAdapter.load(make_model(), folders[folder]).state_dict())
    with pytest.raises(FileNotFoundError, match="alice/none"):
        bank.add("fifth", "alice/none")
    assert bank.names == ["first", "second", "third", "fourth"]


@pytest.mark.slow
@pytest.mark.long
def test_a_thousand_adapters_from_the_hub(server, method, tmp_path):
    names = [f"adapter-{index}" for index in range(1000)]
    bank = AdapterBank.attach(make_model(), sara_arguments(method, modules_to_save=[]), names)
    folder = tmp_path / "adapter"
    for name in names:
        bank[name].save_pretrained(folder)
        server.add_repo(f"alice/{name}", files=hub_files(folder))
    start = time.perf_counter()
    loaded = AdapterBank.load(make_model(), {name: f"alice/{name}" for name in names})
    logging.getLogger(__name__).warning("1,000 adapters over HTTP: %.1f s", time.perf_counter() - start)
    assert loaded.names == names
    assert all(same_bits(loaded.state(name), bank.state(name)) for name in names)


def test_a_model_that_puts_places_before_rows_is_refused(tmp_path):
    def make():
        torch.manual_seed(0)
        values = {"vocab_size": VOCABULARY, "d_model": 24, "n_layer": 1, "n_head": 4, "d_inner": 32}
        return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**values)).eval()

    adapter = SaraAdapter.attach(make(), sara_arguments(target_modules=r"transformer\.layer\.0\.ff\.layer_1"))
    adapter.save_pretrained(tmp_path)
    model = make()
    with pytest.raises(ValueError, match="because XLNetLMHeadModel puts the places of a text before the rows"):
        AdapterBank.load(model, {"one": tmp_path})
    assert not any(".sara" in name for name, _ in model.named_modules())
