"""A recipe of no time, for the tests of sweeps: its evaluation loss is least at a learning rate of 0.01."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass
class Options:
    model_name_or_path: str = "none"
    gguf_file: str | None = None
    data_dir: str | None = None
    learning_rate: float = 0.01
    seed: int = 0
    size: int = 1
    layers: str | None = None
    max_test: int = 5
    breaks: str | None = None
    output_dir: str = "none"
    hub_model_id: str | None = None

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size} has to be at least 1.")


def arguments():
    return [Options], lambda given: {}


def main() -> None:
    options = Options(**yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text()))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent.parent / "calls.txt", "a") as file:
        file.write(f"{folder.parent.name}/{folder.name} {options.max_test}\n")
    # A file lets a test decide what happens to the rows that name it.
    if options.breaks and Path(options.breaks).is_file():
        if Path(options.breaks).read_text() == "wait":
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        if Path(options.breaks).read_text() == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("it is broken")
    loss = abs(math.log10(options.learning_rate) + 2) + options.seed / 100 + options.size
    metrics = {
        "eval_loss": loss if options.learning_rate < 1 else math.nan,
        "trained_parameters": 1000 * options.size,
        "peak_memory_bytes": 3 * 10**9 if options.max_test == 0 else 2 * 10**9,
        "hardware": "a machine",
        "versions": {"torch": "1.0"},
    }
    if options.max_test:
        metrics["score"] = 0.5 + options.seed / 10 + options.size / 100
    (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
