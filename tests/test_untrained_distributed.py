"""A site that no process uses, in trainings on two processes: it rests, and the training goes on."""

import json
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from safetensors.torch import load_file
from training import TWO_PROCESSES, run_script

pytestmark = pytest.mark.slow
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
SIZES = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
ZERO = {"deepspeed": {"zero_optimization": {"stage": 3}, **SIZES}}


@pytest.mark.parametrize(
    "how", [{}, pytest.param(FSDP, marks=pytest.mark.long), pytest.param(ZERO, marks=pytest.mark.long)]
)
def test_an_update_that_no_process_used_adds_nothing(how, tmp_path: Path):
    if "deepspeed" in how:
        pytest.importorskip("deepspeed")
    values = {"model": "idle", "per_device_train_batch_size": 1, **how}
    values["sara_args"] = {"dropout": 0.0, "target_modules": ["q_proj", "extra"]}
    done = run_script(str(tmp_path), "sara", "0", json.dumps(values), launcher=TWO_PROCESSES, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    assert "model.extra" in done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same_bits(*ranks)
    assert ranks[0]["model.extra.S"].abs().max() == 0
    assert ranks[0]["model.extra.U"].abs().max() > 0
    assert ranks[0]["model.layers.0.self_attn.q_proj.S"].abs().max() > 0
    assert torch.equal(load_file(tmp_path / "sara_adapter.safetensors")["model.extra.S"], ranks[0]["model.extra.S"])
