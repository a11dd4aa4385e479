"""Data and settings for the tests with TRL's trainers. As a script, it trains DPO on several processes.

python with_trl.py OUTPUT_DIR [DPOConfig as a JSON object]
"""

import json
import sys
from pathlib import Path

from conftest import attach_trained, make_base, make_tokenizer
from datasets import Dataset
from training import shard_on_cpu

from hf_sara import SaraTrainerMixin

WORDS = ["quick", "brown", "fox", "lazy"] * 6
DATA = {
    "text": {"text": [f"The {word} dog jumps over the {word} ." for word in WORDS]},
    "prompt and completion": {
        "prompt": [f"The {word} :" for word in WORDS],
        "completion": [f" {word} ." for word in WORDS],
    },
    "conversation": {
        "messages": [
            [{"role": "user", "content": f"The {word} ?"}, {"role": "assistant", "content": f"{word} ."}]
            for word in WORDS
        ]
    },
    "preference": {
        "prompt": [f"The {word} :" for word in WORDS],
        "chosen": [f" {word} ." for word in WORDS],
        "rejected": [" the | dog" for _ in WORDS],
    },
}


def trl_settings(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 3,
        "save_steps": 8,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return {**values, **changes}


if __name__ == "__main__":
    import trl

    class SaraDPOTrainer(SaraTrainerMixin, trl.DPOTrainer):
        pass

    shard_on_cpu()
    folder, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    trainer = SaraDPOTrainer(
        model=attach_trained(make_base()).model,
        args=trl.DPOConfig(**trl_settings(folder, max_steps=3, logging_steps=1, save_strategy="no", **arguments)),
        train_dataset=Dataset.from_dict(DATA["preference"]),
        processing_class=make_tokenizer(),
    )
    assert trainer.is_fsdp_enabled
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (folder / f"losses{trainer.args.process_index}.json").write_text(json.dumps(losses))
