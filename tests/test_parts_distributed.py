"""Trainings of an adapter with parts on two processes: DDP, FSDP2 and DeepSpeed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ACTIVATION_CHECKPOINTING, same_bits, sara_arguments
from training import MODELS, TWO_PROCESSES, make_trainer, run_script

from hf_sara import SaraAdapter

pytestmark = pytest.mark.slow
TOKENS = [4, 9, 21]
CASES = {
    "head": ("bert", {}),
    "bf16 head and rows": ("bf16 classifier", {"trainable_token_indices": TOKENS}),
    "rows and norm": ("llama", {"trainable_token_indices": TOKENS, "modules_to_save": ["norm"]}),
    "tied rows": ("tied", {"trainable_token_indices": TOKENS}),
    "embedding and output": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}


def fsdp(case: str, **config) -> dict:
    layer = "BertLayer" if CASES[case][0] == "bert" else "LlamaDecoderLayer"
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": [layer], **config}}


def zero(stage: int) -> dict:
    sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **sizes}}


def run(folder: Path, case: str, method: str = "sara", **arguments):
    """Train on two processes with one example each."""
    model, parts = CASES[case]
    values = {"model": model, "per_device_train_batch_size": 1, "predicts": True, **arguments}
    values["sara_args"] = {"dropout": 0.0, **parts}
    return run_script(str(folder), method, "0", json.dumps(values), launcher=TWO_PROCESSES, DS_ACCELERATOR="cpu")


def trained(folder: Path, case: str, method: str = "sara", **arguments) -> dict[str, torch.Tensor]:
    """
    The tensors that two processes have in the end. What they save is the same, and gives the outputs that they have.
    """
    done = run(folder, case, method, **arguments)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert same_bits(*ranks)
    model = MODELS[CASES[case][0]]()
    assert same_bits(SaraAdapter.load(model, folder).state_dict(), ranks[0])
    for name in model.sara_adapter.trained():
        # The values are not those of a narrower dtype.
        assert not torch.equal(ranks[0][name], ranks[0][name].bfloat16().float()), name
    outputs = make_trainer(folder, model=model, sara_args=model.sara_adapter.args)
    expected = torch.load(folder / "out0.pt")
    found = torch.tensor(outputs.predict(outputs.eval_dataset).predictions)
    loose = {"rtol": 0.02, "atol": 0.02} if model.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **loose)
    return ranks[0]


def check_is_what_one_process_trains(found, folder: Path, case: str, method: str = "sara") -> None:
    model, parts = CASES[case]
    single = make_trainer(folder, model=MODELS[model](), sara_args=sara_arguments(method, dropout=0.0, **parts))
    start = single.sara_adapter.state_dict()
    single.train()
    for name, tensor in single.sara_adapter.state_dict().items():
        if model.startswith("bf16"):
            # The two batches are rounded one by one.
            moved = torch.cosine_similarity((tensor - start[name]).flatten(), (found[name] - start[name]).flatten(), 0)
            assert moved > 0.8, name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def check_best(folder: Path, whole, case: str) -> None:
    best = json.loads((folder / "checkpoint-7" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert same_bits(SaraAdapter.load(MODELS[CASES[case][0]](), best).state_dict(), whole)


def check_resuming(tmp_path: Path, whole, case: str, method: str = "sara", **arguments) -> None:
    """Go on from step 4 of the run in the folder `whole`: the bits and the log are the same in the end."""
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", parts / "checkpoint-4")
    assert same_bits(trained(parts, case, method, **arguments, resume_from_checkpoint=True), whole)
    log = [json.loads((tmp_path / part / "log0.json").read_text()) for part in ("whole", "parts")]
    assert log[0] == log[1]


# The workflow runs the first and the third of them.
SOME = [
    pytest.param(case, marks=[pytest.mark.long] if index not in (0, 2) else []) for index, case in enumerate(CASES)
]


@pytest.mark.parametrize("case", SOME)
def test_two_processes_end_with_the_parts_of_one_and_resume_exactly(case, tmp_path):
    whole = trained(tmp_path / "whole", case)
    check_is_what_one_process_trains(whole, tmp_path / "single", case)
    check_resuming(tmp_path, whole, case)


@pytest.mark.parametrize("case", SOME)
def test_fsdp_ends_with_the_parts_of_one_process_and_resumes_exactly(case, tmp_path):
    whole = trained(tmp_path / "whole", case, **fsdp(case))
    check_is_what_one_process_trains(whole, tmp_path / "single", case)
    check_resuming(tmp_path, whole, case, **fsdp(case))


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("bf16 head and rows", {"bf16": True}),
        ("bf16 head and rows", fsdp("bf16 head and rows", cpu_ram_efficient_loading=True)),
        ("rows and norm", {ACTIVATION_CHECKPOINTING: True}),
        ("head", {"fsdp": "shard_grad_op auto_wrap"}),
    ],
    ids=str,
)
def test_fsdp_loads_the_best_parts(case, changes, tmp_path):
    changes = {**fsdp(case), **changes, **BEST}
    whole = trained(tmp_path / "whole", case, "mo_sara", **changes)
    check_best(tmp_path / "whole", whole, case)
    check_resuming(tmp_path, whole, case, "mo_sara", **changes)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_ends_with_the_parts_of_one_process_and_resumes_exactly(case, stage, tmp_path):
    pytest.importorskip("deepspeed", reason="needs: pip install -e '.[deepspeed]'")
    changes = {**zero(stage), **(BEST if case == "rows and norm" else {})}
    whole = trained(tmp_path / "whole", case, **changes)
    if case == "rows and norm":
        check_best(tmp_path / "whole", whole, case)
    else:
        check_is_what_one_process_trains(whole, tmp_path / "single", case)
    check_resuming(tmp_path, whole, case, **changes)
