"""
What several processes check together, as a script:

torchrun --nproc_per_node 2 parallel.py FOLDER CASE ...

A case is the name of a function, and its arguments, with colons between them.
"""

import contextlib
import functools
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import VOCABULARY, make_model, sara_arguments
from torch.distributed.tensor import DTensor
from training import make_classifier
from transformers.distributed import DistributedConfig
from transformers.integrations import HfDeepSpeedConfig

from hf_sara import AdapterBank, AdapterError, SaraAdapter, SaraArguments, export_lora, from_hub, plan, routing

LIMITS = {"rtol": 1e-9, "atol": 1e-9}


# ---- what is compared ----


def close(one, other, **limits) -> None:
    """Both have the same tensors, to the bit if there are no limits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        text = functools.partial("{0}: {1}".format, name)
        torch.testing.assert_close(tensor, other[name], msg=text, **(limits or {"rtol": 0, "atol": 0}))


def alike(tensors) -> None:
    """Every process has the same tensors, to the bit."""
    for name, tensor in tensors.items():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor), name


def same_start(one: SaraAdapter, two: SaraAdapter) -> None:
    """Two new adapters have the same ranks, initial values, frozen factors and seeds, in every process."""
    assert one.spec.threshold == two.spec.threshold
    assert (one.sites, one.parts) == (two.sites, two.parts)
    close(one.state_dict(), two.state_dict())
    close(one.frozen_factors(), two.frozen_factors())
    seeds = [json.dumps({name: seed.to_json() for name, seed in adapter.seeds.items()}) for adapter in (one, two)]
    assert seeds[0] == seeds[1]
    alike(two.state_dict())


def move(adapter: SaraAdapter) -> None:
    """Give the trained tensors other values, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs()["input_ids"]).logits


def gradients(model) -> dict[str, torch.Tensor]:
    """The loss, and the gradients of what trains."""
    loss = model(**inputs()).loss
    loss.backward()
    found = {name: tensor.grad.clone() for name, tensor in model.sara_adapter.trained().items()}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


# ---- bases that are loaded in parts ----


def saved(place: Path, model) -> str:
    """The folder of a base, which the first process writes."""
    if dist.get_rank() == 0:
        model.save_pretrained(place)
    dist.barrier()
    return str(place)


@contextlib.contextmanager
def loading(how: str):
    """Let each model be loaded in parts. What it gives are arguments of `from_pretrained`."""
    if how == "tp":
        yield {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")}
    elif how == "fsdp":
        yield {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
    elif how == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo")
        sizes = {"train_batch_size": dist.get_world_size(), "train_micro_batch_size_per_gpu": 1}
        # It holds as long as somebody has it.
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, **sizes})
        yield {}
        del config
    else:
        yield {}


def load(kind, folder: str, how: str, parts):
    """A base in parts. By `meta`, only the first process has its values."""
    if how == "meta" and dist.get_rank() > 0:
        with torch.device("meta"):
            return kind(transformers.AutoConfig.from_pretrained(folder)).eval()
    model = kind.from_pretrained(folder, dtype=torch.float32, **parts).eval()
    check_is_in_parts(model, how)
    return model


def check_is_in_parts(model, how: str) -> None:
    weight = next(parameter for name, parameter in model.named_parameters() if "q_proj.weight" in name)
    seen = {
        "zero3": not weight.numel(),
        "tp": isinstance(weight, DTensor),
        "fsdp": isinstance(weight, DTensor),
        "meta": not weight.is_meta,
    }
    assert seen[how], weight


ARGUMENTS = {
    "sara": {"method": "sara", "threshold": 0.3},
    "mo_sara": {"method": "mo_sara", "threshold": 0.5, "num_heads": 3},
    "budget": {"method": "sara", "parameter_budget": 6000},
    "all": {"method": "mo_sara", "threshold": 0.3, "target_modules": "all-linear"},
}


def start(folder: Path, how: str, arguments: str) -> None:
    """An adapter, with a head and rows of tokens, starts on a base in parts as on a whole one, and from a plan too."""
    kind = transformers.LlamaForSequenceClassification
    base = saved(folder / "base", make_classifier())
    args = SaraArguments(**ARGUMENTS[arguments], dropout=0.0, trainable_token_indices=[4, 9, 21])
    torch.manual_seed(5)
    whole = SaraAdapter.attach(kind.from_pretrained(base, dtype=torch.float32), args)
    found = plan(base, args)
    with loading(how) as parts:
        for planned in (None, found):
            model = load(kind, base, how, parts)
            torch.manual_seed(5)
            same_start(whole, SaraAdapter.attach(model, args, plan=planned))
        assert plan(model, args) == found
        assert plan(model, args).digests == found.digests


def loaded(folder: Path, how: str, arguments: str) -> None:
    """A trained adapter comes back onto a base in parts."""
    # FSDP that transformers brings about spreads heads too, which then cannot be trained in full.
    kind, beside = transformers.LlamaForSequenceClassification, {"trainable_token_indices": [4, 9, 21]}
    if how == "fsdp":
        kind, beside = transformers.LlamaForCausalLM, {}
    base = saved(folder / "base", make_model() if how == "fsdp" else make_classifier())
    args = SaraArguments(**ARGUMENTS[arguments], **beside, dropout=0.0)
    torch.manual_seed(5)
    whole = SaraAdapter.attach(kind.from_pretrained(base, dtype=torch.float32), args)
    move(whole)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "adapter")
    dist.barrier()
    with loading(how) as parts:
        if how == "meta":
            model = from_hub(folder / "adapter", base_model=load(kind, base, how, parts))
        else:
            model = from_hub(folder / "adapter", base_model=base, **parts)
            check_is_in_parts(model, how)
        close(whole.state_dict(), model.sara_adapter.state_dict())
        close(whole.frozen_factors(), model.sara_adapter.frozen_factors())
        if how in ("tp", "fsdp"):
            torch.testing.assert_close(outputs(model), outputs(whole.model), rtol=1e-5, atol=1e-5)
        if how == "zero3":
            import deepspeed

            engine = deepspeed.initialize(
                model=model, config={"zero_optimization": {"stage": 3}, "train_batch_size": dist.get_world_size()}
            )[0]
            torch.testing.assert_close(outputs(engine), outputs(whole.model), rtol=1e-5, atol=1e-5)
            close(whole.state_dict(), model.sara_adapter.state_dict())


def seeds(folder: Path, how: str) -> None:
    """Processes that draw different random numbers start with the same values all the same."""
    base = saved(folder / "base", make_model())
    with loading(how) as parts:
        torch.manual_seed(100 + dist.get_rank())
        adapter = SaraAdapter.attach(load(transformers.LlamaForCausalLM, base, how, parts))
    alike(adapter.state_dict())


def failures(folder: Path) -> None:
    """An error in one process is one in all of them, and what they do later works."""
    kind = transformers.LlamaForCausalLM
    base, own = saved(folder / "base", make_model()), dist.get_rank() == 1
    torch.manual_seed(5)
    whole = SaraAdapter.attach(kind.from_pretrained(base))
    for rank in range(2):
        if dist.get_rank() == 0:
            whole.save_pretrained(folder / f"adapter{rank}")
    dist.barrier()
    if own:
        (folder / "adapter1" / "sara_adapter.safetensors").write_bytes(b"nothing")
    for how in ("tp", "meta"):
        with loading(how) as parts:
            model = load(kind, base, how, parts)
            said = (AdapterError, "damaged|header") if own else (RuntimeError, "Process 1 has failed.*AdapterError")
            with pytest.raises(said[0], match=said[1]):
                SaraAdapter.load(model, folder / f"adapter{dist.get_rank()}")
            targets = ["nothing"] if own else None
            if how == "tp":
                said = (ValueError, "matches no linear") if own else (RuntimeError, "Process 1 has failed.*ValueError")
            else:
                said = (ValueError, "does something else")
            with pytest.raises(said[0], match=said[1]):
                SaraAdapter.attach(model, SaraArguments(target_modules=targets))
            close(SaraAdapter.load(model, folder / "adapter0").state_dict(), whole.state_dict())


def dropout(folder: Path, method: str) -> None:
    """Dropout under tensor parallelism has the mask of one process, for parts of the inputs too."""
    base = saved(folder / "base", make_model(intermediate_size=33))
    models = [transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)]
    with loading("tp") as parts:
        models.append(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **parts))
    found = []
    for model in models:
        torch.manual_seed(5)
        move(SaraAdapter.attach(model, sara_arguments(method, dropout=0.3, target_modules="all-linear")))
        model.train()
        torch.manual_seed(7)
        found.append(gradients(model))
    close(*found, **LIMITS)
    alike(found[1])


def alone(folder: Path) -> None:
    """A process may attach an adapter alone to a model that is whole, and what they do together later works."""
    before = time.monotonic()
    if dist.get_rank() == 0:
        SaraAdapter.attach(make_model())
    assert time.monotonic() - before < 30
    dist.barrier()
    start(folder, "meta", "sara")
    # A new group of processes begins anew.
    if dist.get_rank() == 0:
        SaraAdapter.attach(make_model())
    dist.barrier()
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    start(folder / "again", "meta", "sara")


# ---- tensor parallelism ----


def tp(folder: Path, family: str, method: str, targets: str = "default") -> None:
    """An adapter on a base that is spread over processes is that on a whole base: ranks, start, outputs, gradients."""
    heads = {"num_key_value_heads": 4} if dist.get_world_size() > 2 and family != "gpt_neox" else {}
    base = saved(folder / "base", make_model(family, **heads))
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with loading("tp") as parts:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **parts).eval()
    args = sara_arguments(method, dropout=0.0, **({"target_modules": "all-linear"} if targets == "all" else {}))
    adapters = []
    for one in (whole, model):
        torch.manual_seed(5)
        adapters.append(SaraAdapter.attach(one, args))
    same_start(*adapters)
    for adapter in adapters:
        move(adapter)
    found = gradients(model)
    close(gradients(whole), found, **LIMITS)
    alike(found)
    torch.testing.assert_close(outputs(model), outputs(whole), **LIMITS)
    written = [one.generate(inputs()["input_ids"], max_new_tokens=5, do_sample=False) for one in (whole, model)]
    assert torch.equal(*written)
    with adapters[0].disabled(), adapters[1].disabled():
        torch.testing.assert_close(outputs(model), outputs(whole), **LIMITS)


def merging(folder: Path, family: str, method: str) -> None:
    """Merging writes the parts of the sums, unmerging restores the bits, and an export is that of one process."""
    base = saved(folder / "base", make_model(family))
    args = SaraArguments(**{**ARGUMENTS[method], "num_heads": 1}, dropout=0.0, target_modules="all-linear")
    models = [transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()]
    with loading("tp") as parts:
        models.append(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **parts).eval())
    for index, model in enumerate(models):
        torch.manual_seed(5)
        adapter = SaraAdapter.attach(model, args)
        move(adapter)
        if dist.get_rank() == 0:
            export_lora(model, folder / f"lora{index}")
            adapter.save_pretrained(folder / f"adapter{index}")
    if dist.get_rank() == 0:
        for kind in ("lora", "adapter"):
            for file in (folder / f"{kind}0").iterdir():
                assert file.read_bytes() == (folder / f"{kind}1" / file.name).read_bytes(), file
    before = {
        name: tensor.to_local().clone()
        for name, tensor in models[1].state_dict().items()
        if isinstance(tensor, DTensor)
    }
    for model in models:
        model.sara_adapter.merge()
    whole = models[0].state_dict()
    weights = {name: tensor for name, tensor in models[1].state_dict().items() if isinstance(tensor, DTensor)}
    assert len(weights) > 8
    close({name: tensor.full_tensor() for name, tensor in weights.items()}, {name: whole[name] for name in weights})
    assert not all(torch.equal(weights[name].to_local(), tensor) for name, tensor in before.items())
    models[1].sara_adapter.unmerge()
    close(before, {name: tensor.to_local() for name, tensor in weights.items()})


def refusals(folder: Path) -> None:
    """What cannot be is an error in every process."""
    base = saved(folder / "base", make_model(tie_word_embeddings=True))
    broken = make_model()
    broken.model.layers[1].self_attn.v_proj.weight.data[3, 4] = torch.nan
    broken = saved(folder / "broken", broken)
    for how in ("zero3", "tp", "meta"):
        with loading(how) as parts:
            model = load(transformers.LlamaForCausalLM, broken, how, parts)
            with pytest.raises(
                ValueError, match=r"layers\.1\.self_attn\.v_proj: the weight has 1 values that are NaN"
            ):
                SaraAdapter.attach(model)
            assert not hasattr(model, "sara_adapter")
    dtype = torch.float32 if dist.get_rank() == 0 else torch.bfloat16
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base)).to(dtype)
    with pytest.raises(ValueError, match="names, shapes or dtypes"):
        SaraAdapter.attach(model)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base))
    with pytest.raises(ValueError, match="on the meta device, so it has no values now"):
        SaraAdapter.attach(model)
    with loading("zero3"):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        with pytest.raises(ValueError, match="spreads this weight"):
            SaraAdapter.attach(model).merge()
        some = SaraArguments(layers="0")
        wrong = replace(plan(base, some), digests=dict.fromkeys(plan(base, some).digests, 64 * "0"))
        with pytest.raises(ValueError, match="this model's weight is not the one that the plan was made of"):
            SaraAdapter.attach(transformers.LlamaForCausalLM.from_pretrained(base), plan=wrong)
    normed = saved(folder / "normed", make_model("qwen3"))
    with loading("tp") as parts:
        model = transformers.AutoModelForCausalLM.from_pretrained(normed, **parts)
        with pytest.raises(ValueError, match=r"q_norm computes with a part of its input"):
            SaraAdapter.attach(model, SaraArguments(modules_to_save=["q_norm"]))
        SaraAdapter.attach(model, SaraArguments(method="mo_sara", target_modules="all-linear"))
        with pytest.raises(ValueError, match=r"gets a part of its input"):
            routing(model, {"input_ids": inputs()["input_ids"]})
    with loading("tp") as parts:
        model = transformers.LlamaForCausalLM.from_pretrained(base, **parts)
        with pytest.raises(ValueError, match=r"embed_tokens is spread over processes"):
            SaraAdapter.attach(model, SaraArguments(modules_to_save=["embed_tokens", "lm_head"]))
        adapter = SaraAdapter.attach(model, SaraArguments(trainable_token_indices=[3]))
        before = outputs(model)
        move(adapter)
        assert not torch.equal(outputs(model), before)
        with pytest.raises(ValueError, match="the trained rows cannot be merged"):
            adapter.merge()
        adapter.detach()
        torch.testing.assert_close(outputs(model), outputs(transformers.LlamaForCausalLM.from_pretrained(base)))


def bank(folder: Path, method: str) -> None:
    """Rows with adapters of their own on a base that is spread over processes are those on a whole base."""
    base = saved(folder / "base", make_model("llama"))
    args = SaraArguments(**ARGUMENTS[method], dropout=0.0)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(5)
    adapter = SaraAdapter.attach(whole, args)
    for name in ("one", "two"):
        move(adapter)
        if dist.get_rank() == 0:
            adapter.save_pretrained(folder / name)
    dist.barrier()
    adapter.detach()
    with loading("tp") as parts:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **parts).eval()
    found = []
    for one in (whole, model):
        AdapterBank.load(one, {name: folder / name for name in ("one", "two")})
        with torch.no_grad():
            found.append(one(inputs()["input_ids"], adapter_names=["two", "one"]).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# ---- memory ----

LARGE = {
    **{"vocab_size": 8000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 9},
    **{"num_attention_heads": 16, "num_key_value_heads": 16},
}


def resident(kind: str) -> int:
    """The memory of this process in bytes: `VmRSS` is that of now, and `VmHWM` the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(kind)))


def memory(folder: Path, how: str, method: str) -> None:
    """Attaching takes much less memory than the rest of the model would, which is about 1 GB in bfloat16."""
    if dist.get_rank() == 0:
        with torch.no_grad():
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGE)).bfloat16()
        model.save_pretrained(folder / "base", max_shard_size="200MB")
        del model
    dist.barrier()
    with loading(how) as parts:
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, **parts)
        size = 2 * sum(getattr(tensor, "ds_numel", tensor.numel()) for tensor in model.parameters())
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        SaraAdapter.attach(model, SaraArguments(method=method))
        peak = resident("VmHWM") - before
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps({"size": size, "before": before, "peak": peak}))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        name, *arguments = case.split(":")
        try:
            globals()[name](Path(sys.argv[1], case.replace(":", "_")), *arguments)
        except BaseException as error:
            raise AssertionError(case) from error
        dist.barrier()
    dist.destroy_process_group()
