"""A small training for the tests of the trainer. As a script, it can be killed, or run on several processes.

python training.py OUTPUT_DIR METHOD [--kill_at STEP] [TrainingArguments as a JSON object]
"""

import functools
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import DistributedType, PartialState
from conftest import VOCABULARY, WIDE, make_model, sara_arguments
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_sara import SaraTrainer

STEPS = 7
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_script(*arguments, launcher=(sys.executable,), script=__file__, **environment) -> subprocess.CompletedProcess:
    """Run this file, or another one, as a script."""
    return subprocess.run(
        [*launcher, str(Path(script)), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_classifier(dtype: torch.dtype = torch.float32) -> LlamaForSequenceClassification:
    """A tiny decoder with a head for three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**WIDE, num_labels=3)).to(dtype).eval()


def make_deep_head():
    """A classifier whose head is a sequence of modules, which has buffers too."""
    model = make_model("bert")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.classifier = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    return model.eval()


def make_idle():
    """A model with a linear that it never calls."""
    model = make_model()
    model.model.extra = nn.Linear(24, 24, bias=False)
    return model.eval()


# Models by a name that the script's arguments can have.
MODELS = {
    "llama": make_model,
    "tied": functools.partial(make_model, tie_word_embeddings=True),
    "bf16 tied": functools.partial(make_model, tie_word_embeddings=True, dtype=torch.bfloat16),
    "bert": functools.partial(make_model, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "classifier": make_classifier,
    "bf16 classifier": functools.partial(make_classifier, torch.bfloat16),
    "deep head": make_deep_head,
    "idle": make_idle,
}


def dataset(size: int = 24, seed: int = 0, classes: int = 0) -> Dataset:
    """
    Random sequences with labels, of tokens or of classes, and with a column that the model does not take, so that
    Trainer removes it.
    """
    ids = torch.randint(3, VOCABULARY, (size, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [sum(row) % classes for row in ids] if classes else ids
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [8] * size})


def training_arguments(folder, **changes) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 3,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(**{**values, **changes})


def make_trainer(
    folder, method: str = "sara", trainer_class=SaraTrainer, model=None, sara_args=None, dropout=0.1, **changes
):
    args = training_arguments(folder, **changes)
    # Some models can be loaded only after the arguments say how they are spread over processes.
    model = make_model() if model is None else model() if inspect.isfunction(model) else model
    classes = 3 if "Classification" in type(model).__name__ else 0
    return trainer_class(
        model=model,
        args=args,
        sara_args=sara_arguments(method, dropout=dropout) if sara_args is None else sara_args,
        train_dataset=dataset(classes=classes),
        eval_dataset=dataset(8, seed=1, classes=classes),
    )


def shard_on_cpu() -> None:
    """
    Let FSDP and tensor parallelism run on the CPU. accelerate offers them on accelerators only, but torch can do both
    on the CPU with gloo.
    """
    start = PartialState.__init__

    def pose(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pose


def load(how: dict):
    """
    A function that loads a base from its folder, where `how` may have sizes of [`DistributedConfig`], or say that only
    the first process has values.
    """

    def loaded():
        if is_deepspeed_zero3_enabled():
            import deepspeed

            # On GPUs, TrainingArguments have done this.
            deepspeed.init_distributed("gloo")
        config = json.loads(Path(how["folder"], "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0])
        if "sizes" in how:
            from transformers.distributed import DistributedConfig

            # The plan is only one of tensor parallelism.
            plan = {"tp_plan": "auto"} if "tp_size" in how["sizes"] else {}
            return kind.from_pretrained(
                how["folder"], distributed_config=DistributedConfig(**how["sizes"], **plan), dtype=how.get("dtype")
            )
        if how.get("meta") and int(os.environ["RANK"]) > 0:
            with torch.device("meta"):
                model = kind(transformers.AutoConfig.from_pretrained(how["folder"]))
                return model if how.get("dtype") is None else model.to(getattr(torch, how["dtype"]))
        return kind.from_pretrained(how["folder"], dtype=how.get("dtype"))

    return loaded


class At(TrainerCallback):
    """A callback that does something at the end of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def log_of(trainer) -> list[dict[str, float]]:
    """The log of a run, without its times."""
    timed = ("runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in trainer.state.log_history]


if __name__ == "__main__":
    folder, method, kill_at, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    resume = arguments.pop("resume_from_checkpoint", False)
    if "fsdp" in arguments or "sizes" in arguments.get("load", {}):
        shard_on_cpu()
    sara_args = sara_arguments(method, **arguments.pop("sara_args", {"dropout": 0.1}))
    streamed, predicts = arguments.pop("streamed", False), arguments.pop("predicts", False)
    name = arguments.pop("model", "llama")
    model = load(arguments.pop("load")) if "load" in arguments else MODELS[name]()
    trainer = make_trainer(folder, sara_args=sara_args, model=model, **arguments)
    if streamed:
        trainer.train_dataset = dataset(16).to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=5)
    assert trainer.is_fsdp_enabled == ("fsdp" in arguments)
    assert trainer.is_deepspeed_enabled == ("deepspeed" in arguments)
    if kill_at:
        trainer.add_callback(At(kill_at, lambda control: os.kill(os.getpid(), signal.SIGKILL)))
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    trainer.save_model()
    torch.save(trainer._gather()[0], os.path.join(folder, f"rank{rank}.pt"))
    if predicts:
        torch.save(
            torch.tensor(trainer.predict(trainer.eval_dataset).predictions), os.path.join(folder, f"out{rank}.pt")
        )
    with open(os.path.join(folder, f"log{rank}.json"), "w") as file:
        json.dump(log_of(trainer), file)
    if torch.distributed.is_initialized():
        # The threads of a group that is left to the end of a process can abort it.
        torch.distributed.destroy_process_group()
