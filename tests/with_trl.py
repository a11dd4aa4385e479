"""Data and settings for the tests with TRL's trainers."""

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
