import json

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer, sara_arguments
from datasets import Dataset, DatasetDict
from training import training_arguments

from harness import e2e_task
from hf_sara import SaraTrainer
from hf_sara.tasks import e2e


class E2ETrainer(e2e_task.E2ETrainerMixin, SaraTrainer):
    pass


def rows(mrs=("name : A", "name : B | area : C"), texts=("A .", "B is in C .")):
    return DatasetDict({"train": Dataset.from_dict({"mr": list(mrs), "text": list(texts)})})


def test_the_evaluation_loss_is_not_smoothed(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model("gpt2", vocab_size=len(tokenizer), n_positions=64)
    encoded = e2e.encode_dataset(rows(), tokenizer)["train"]
    trainer = E2ETrainer(
        model=model,
        args=training_arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1),
        sara_args=sara_arguments(),
        train_dataset=encoded,
        eval_dataset=encoded,
        processing_class=tokenizer,
        data_collator=e2e.make_collator(tokenizer),
    )
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "length"} for row in encoded])
    with torch.no_grad():
        scores = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-5)
    smoothed = trainer.compute_loss(trainer.model, dict(batch))
    assert smoothed.item() == pytest.approx(float(F.cross_entropy(scores, labels, label_smoothing=0.1)), rel=1e-5)
    trainer.train()


def test_an_interrupted_decoding_goes_on_and_ends_with_the_same_file(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    model = make_model("gpt2", vocab_size=len(tokenizer), n_positions=64)
    mrs = [f"name : {'A' * (i % 3 + 1)}{i}" for i in range(7)]
    settings = {"num_beams": 2, "max_new_tokens": 4, "batch_size": 2}
    expected = e2e_task.generate_predictions(model, tokenizer, mrs, tmp_path / "whole.jsonl", **settings)

    search, calls = e2e_task.beam_search, []

    def broken(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*args, **kwargs)

    monkeypatch.setattr(e2e_task, "beam_search", broken)
    path = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        e2e_task.generate_predictions(model, tokenizer, mrs, path, **settings)
    assert len(path.read_text().splitlines()) == 4
    # A crash may cut a line in two.
    path.write_text(path.read_text()[:-9])
    assert e2e_task.generate_predictions(model, tokenizer, mrs, path, **settings) == expected
    assert calls[3:] == [2, 2, 1]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["mr"] for line in path.read_text().splitlines()] == mrs
    assert e2e_task.generate_predictions(model, tokenizer, mrs, path, **settings) == expected
    assert len(calls) == 6
