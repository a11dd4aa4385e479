"""The commands of the page on large models run, with a tiny model on few processes in the place of a large one."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_tokenizer, same_bits
from test_docs import ROOT, blocks

from hf_sara import SaraAdapter, SaraArguments, plan, save_plan

PAGE = ROOT / "docs" / "large_models.md"
NAME = "meta-llama/Llama-3.1-70B"
TESTS = Path(__file__).parent
# accelerate lets FSDP and tensor parallelism run on accelerators only, so a process takes the CPU for one.
CUSTOMIZE = f"""
import sys

if "--deepspeed" not in sys.orig_argv:
    sys.path.insert(0, {str(TESTS)!r})
    import training

    training.shard_on_cpu()
"""


pytestmark = [pytest.mark.slow, pytest.mark.long]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def work(tmp_path):
    """A folder with the page's files, in which the sizes are those of this machine."""
    tokenizer = make_tokenizer()
    base = make_base().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"The fox {n} jumps over the lazy dog."}) + "\n" for n in range(8))
    )
    save_plan(plan(str(tmp_path / "base"), SaraArguments()), tmp_path / "plan.json")
    found = {block.language: block.code for block in blocks(PAGE) if block.language in ("python", "json", "yaml")}
    script = found["python"].replace(NAME, str(tmp_path / "base"))
    # On GPUs, TrainingArguments do this.
    started = "if args.deepspeed:\n    import deepspeed\n\n    deepspeed.init_distributed('gloo')\n\nsizes ="
    (tmp_path / "train.py").write_text(script.replace("sizes =", started))
    (tmp_path / "zero3.json").write_text(found["json"])
    config = re.sub(r"num_processes: \d+", "num_processes: 2", found["yaml"])
    (tmp_path / "fsdp.yaml").write_text(config)
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE)
    return tmp_path


def commands(word: str) -> list[str]:
    """The page's commands with this word in them."""
    lines = [line for block in blocks(PAGE) if block.language == "bash" for line in block.lines]
    return [line for line in lines if word in line]


def start(line: str, work: Path, **changes: str) -> subprocess.Popen:
    """Run a command of the page, with some of its words changed, for one step."""
    words = shlex.split(line)
    for index, word in enumerate(words):
        if word in changes:
            words[index + 1] = changes[word]
    words = [Path(sys.executable).parent / words[0], *words[1:], "--use_cpu", "--max_steps", "2", "--save_steps", "1"]
    environment = {
        **{**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(work)},
        **{"HF_SARA_CACHE": str(work / "cache")},
    }
    return subprocess.Popen(words, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(work: Path, *running: subprocess.Popen) -> dict[str, torch.Tensor]:
    """The trained tensors that the commands have saved."""
    for one in running:
        text = one.communicate(timeout=300)[0].decode()
        assert one.returncode == 0, text
    adapter = SaraAdapter.load(type(make_base()).from_pretrained(work / "base"), work / "out")
    assert json.loads((work / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    return adapter.state_dict()


def test_deepspeed_on_one_machine_and_on_two(work):
    pytest.importorskip("deepspeed", reason="needs: pip install -e '.[deepspeed]'")
    one, two = commands("zero3.json")
    here = finish(work, start(one, work, **{"--nproc_per_node": "2"}))
    shutil.rmtree(work / "out")
    sizes = {"--nproc_per_node": "1", "--rdzv_endpoint": f"localhost:{free_port()}"}
    assert same_bits(finish(work, start(two, work, **sizes), start(two, work, **sizes)), here)


def test_fsdp_on_one_machine_and_on_two(work):
    one, two = commands("fsdp.yaml")
    here = finish(work, start(one, work))
    shutil.rmtree(work / "out")
    config = work / "fsdp.yaml"
    config.write_text(config.read_text().replace("num_machines: 1", "num_machines: 2"))
    place = {"--main_process_ip": "localhost", "--main_process_port": str(free_port())}
    running = [start(two, work, **place, **{"--machine_rank": str(rank)}) for rank in range(2)]
    assert same_bits(finish(work, *running), here)


def test_tensor_parallelism_and_fsdp(work):
    one, two = commands("--tp_size")
    finish(work, start(one, work, **{"--nproc_per_node": "2", "--tp_size": "2"}))
    shutil.rmtree(work / "out")
    finish(work, start(two, work, **{"--nproc_per_node": "4", "--tp_size": "2", "--fsdp_size": "2"}))
