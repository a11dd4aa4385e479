"""
Bases that no single process holds whole: DeepSpeed partitions them while they are loaded, tensor parallelism or FSDP
shards them, or one process has the values for all. See parallel.py for what is checked in the processes.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, same_bits, sara_arguments
from training import make_trainer, run_script

from hf_sara import SaraAdapter, SaraArguments
from hf_sara.contents import make_contiguous

SCRIPT = Path(__file__).with_name("parallel.py")
BATCH = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
ZERO = {"deepspeed": {"zero_optimization": {"stage": 3}, **BATCH}, "per_device_train_batch_size": 1}
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": True},
    "per_device_train_batch_size": 1,
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
# How a base is loaded, on how many processes, and with which arguments of a training.
WAYS = {
    "zero3": (2, {}, ZERO),
    "meta": (2, {"meta": True}, FSDP),
    "tp": (2, {"sizes": {"tp_size": 2}}, {}),
    "fsdp": (2, {"sizes": {"fsdp_size": 2}}, {"per_device_train_batch_size": 1}),
    "tp and fsdp": (4, {"sizes": {"tp_size": 2, "fsdp_size": 2}}, {"per_device_train_batch_size": 1}),
    "best of tp": (2, {"sizes": {"tp_size": 2}}, BEST),
    "zero3 on four": (4, {}, ZERO),
    "meta on four": (4, {"meta": True}, FSDP),
}


def launcher(processes: int) -> tuple[str, ...]:
    return sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)


def check(tmp_path: Path, processes: int, *cases: str) -> None:
    """Let several processes check these cases."""
    if any("zero3" in case or case == "refusals" for case in cases):
        pytest.importorskip("deepspeed", reason="needs: pip install -e '.[deepspeed]'")
    done = run_script(str(tmp_path), *cases, launcher=launcher(processes), script=SCRIPT, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_processes_do_together(tmp_path):
    check(
        tmp_path,
        2,
        *(
            "tp:llama:sara:all",
            "tp:llama:mo_sara:all",
            "dropout:sara",
            "start:meta:sara",
            "tp:gpt_neox:mo_sara",
            "tp:phi3:sara",
            "merging:phi3:mo_sara",
        ),
        *("start:tp:budget", "start:meta:mo_sara", "loaded:tp:mo_sara", "loaded:meta:sara", "loaded:fsdp:mo_sara"),
        *("seeds:tp", "seeds:meta", "failures", "dropout:mo_sara", "bank:all", "bank:sara", "alone"),
    )


@pytest.mark.slow
def test_deepspeed_partitions_the_base_while_it_is_loaded(tmp_path):
    arguments = ("sara", "mo_sara", "budget", "all")
    check(tmp_path, 2, *(f"start:zero3:{one}" for one in arguments), "loaded:zero3:sara", "loaded:zero3:mo_sara")
    check(tmp_path / "refusals", 2, "refusals")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_tensor_parallelism_of_a_family(family, tmp_path):
    cases = [f"tp:{family}:{method}{targets}" for method in ("sara", "mo_sara") for targets in ("", ":all")]
    check(tmp_path, 2, *cases, f"merging:{family}:sara", f"merging:{family}:mo_sara")
    check(tmp_path / "four", 4, *cases)


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_start_as_one(tmp_path):
    cases = [f"start:{how}:{args}" for how in ("meta", "tp", "zero3") for args in ("sara", "mo_sara", "all")]
    check(tmp_path, 4, *cases, "loaded:meta:mo_sara", "loaded:tp:sara", "loaded:zero3:mo_sara")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's own")
@pytest.mark.parametrize("how", ["zero3", "tp"])
@pytest.mark.parametrize("method", ["sara", "mo_sara"])
def test_the_memory_of_a_process_stays_a_part(how, method, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "cache"))
    check(tmp_path, 4, f"memory:{how}:{method}")
    for rank in range(4):
        found = json.loads((tmp_path / f"memory_{how}_{method}" / f"rank{rank}.json").read_text())
        assert found["size"] > 900e6
        # About 100 MB of it are libraries that are loaded at their first use, and 90 MB Mo-SARA's frozen factors.
        assert found["peak"] < 0.4 * found["size"], found


def test_a_matrix_of_one_column_has_the_strides_that_deepspeed_asks_for():
    adapter = SaraAdapter.attach(make_model(), SaraArguments(threshold=1e-3))
    assert {site.k for site in adapter.sites} == {1}
    before = adapter.state_dict()
    make_contiguous(adapter.model)
    for site, delta in adapter.deltas():
        assert delta.U.stride() == (1, 1), site.name
    assert same_bits(adapter.state_dict(), before)


# ---- trainings ----


def base_of(tmp_path: Path, way: str, model) -> str:
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    return str(folder)


def run(folder: Path, way: str, base: str, method: str, dtype: str, kill_at: int = 0, **arguments):
    processes, how, changes = WAYS[way]
    values = {"load": {"folder": base, "dtype": dtype, **how}, **changes, **arguments}
    values["sara_args"] = {"dropout": 0.0, **arguments.get("sara_args", {})}
    return run_script(
        str(folder), method, str(kill_at), json.dumps(values), launcher=launcher(processes), DS_ACCELERATOR="cpu"
    )


def trained(folder: Path, way: str, *arguments, **changes) -> dict[str, torch.Tensor]:
    """The tensors that all processes have in the end, which are also those that are saved."""
    done = run(folder, way, *arguments, **changes)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(WAYS[way][0])]
    for other in ranks[1:]:
        assert same_bits(ranks[0], other)
    return ranks[0]


# The workflow runs these.
QUICKER = [("zero3", "mo_sara")]
SOME = [
    pytest.param(way, method, marks=[] if (way, method) in QUICKER else [pytest.mark.long])
    for way in WAYS
    for method in ("sara", "mo_sara")
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "method"), SOME)
def test_a_training_ends_with_the_adapter_of_one_process_and_goes_on_after_a_kill(way, method, tmp_path):
    if "zero3" in way:
        pytest.importorskip("deepspeed", reason="needs: pip install -e '.[deepspeed]'")
    # Heads that four processes can share.
    base = base_of(tmp_path, way, make_model(num_key_value_heads=4))
    # DeepSpeed trains in float32 whatever the base is.
    dtype = "float32" if "zero3" in way else "float64"
    whole = trained(tmp_path / "whole", way, base, method, dtype)
    kind = type(make_model())
    batch = 4 if way.endswith("on four") else 2
    single = make_trainer(
        tmp_path / "single",
        model=kind.from_pretrained(base, dtype=getattr(torch, dtype)),
        sara_args=sara_arguments(method, dropout=0.0),
        per_device_train_batch_size=batch,
        **(BEST if way.startswith("best") else {}),
    )
    single.train()
    limits = {"rtol": 1e-3, "atol": 2e-4} if dtype == "float32" else {"rtol": 1e-6, "atol": 1e-6}
    for name, tensor in single.sara_adapter.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, **limits, msg=name)
    killed = run(tmp_path / "parts", way, base, method, dtype, kill_at=5)
    assert killed.returncode != 0
    assert (tmp_path / "parts" / "checkpoint-4").is_dir()
    assert not (tmp_path / "parts" / "rank0.pt").exists()
    parts = trained(tmp_path / "parts", way, base, method, dtype, resume_from_checkpoint=True)
    assert same_bits(whole, parts)
    logs = [json.loads((tmp_path / part / "log0.json").read_text()) for part in ("whole", "parts")]
    assert logs[0] == logs[1]
    loaded = SaraAdapter.load(kind.from_pretrained(base, dtype=getattr(torch, dtype)), tmp_path / "whole")
    assert same_bits(loaded.state_dict(), whole)
