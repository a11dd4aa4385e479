import re
from unittest.mock import Mock

import pytest
import torch
from conftest import logits

from harness import base_models, card
from harness.options import RecipeError
from hf_sara import SaraAdapter, SaraArguments


def test_a_card_says_where_the_base_of_the_package_is(tmp_path):
    trainer, own = Mock(args=Mock(output_dir=tmp_path)), "# A card\n"
    path = tmp_path / "README.md"
    # As make_card, it keeps what stands there.
    trainer.create_model_card.side_effect = lambda **kwargs: path.exists() or path.write_text(own)
    values = {"dataset": "E2E", "dataset_id": None, "split": "test"}
    card.write_card(trainer, "someone/model", {"bleu": 0.5}, **values)
    assert path.read_text() == own
    for _ in range(2):
        card.write_card(trainer, base_models.SMOLLM2, {"bleu": 0.5}, **values)
        assert path.read_text() == f"{own}\n{card.SMOLLM2_TEXT}"
    assert trainer.create_model_card.call_args.kwargs["results"][0].metric_value == 0.5


@pytest.mark.slow
def test_the_text_of_the_card_loads_the_base(tmp_path):
    try:
        model, tokenizer = base_models.load_base(base_models.SMOLLM2)
    except RecipeError as error:
        pytest.skip(f"extra: {error}")
    adapter = SaraAdapter.attach(model, SaraArguments(method="mo_sara", num_heads=3))
    for parameter in adapter.trained().values():
        torch.nn.init.normal_(parameter.data, std=0.05)
    adapter.save_pretrained(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", card.SMOLLM2_TEXT, re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/adapter", str(tmp_path)), names)
    inputs = tokenizer("The Mill is a pub .", return_tensors="pt")
    assert torch.equal(logits(names["model"], **inputs), logits(model, **inputs))
