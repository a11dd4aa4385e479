import json
import logging
from dataclasses import dataclass

import pytest
from training import training_arguments

from harness import run_folder
from harness.options import RecipeError
from hf_sara import SaraArguments


@dataclass
class Options:
    size: int | None = None


def test_a_folder_takes_the_same_run_again_and_no_other(tmp_path):
    def run(learning_rate=0.1, size=1, **changes):
        args = training_arguments(tmp_path / "run", learning_rate=learning_rate, **changes)
        return run_folder.open_run(args, recipe=Options(size=size), sara=SaraArguments())

    folder = run()
    # So far there is nothing in it that could be lost.
    (folder / "data").mkdir()
    run(learning_rate=0.2, size=2)
    run()
    (folder / "checkpoint-3").mkdir()
    settings = (folder / run_folder.SETTINGS_FILE).read_text()
    # What does not change the result may change.
    assert run(logging_steps=1, save_steps=1) == folder
    with pytest.raises(RecipeError, match=r"learning_rate: 0.1 there, 0.2 now"):
        run(learning_rate=0.2)
    with pytest.raises(RecipeError, match=r"size: 1 there, 2 now"):
        run(size=2)
    assert (folder / run_folder.SETTINGS_FILE).read_text() == settings
    assert json.loads(settings)["recipe"]["size"] == 1


def test_what_is_logged_goes_to_the_file_of_the_run_that_is_open(tmp_path):
    log = logging.getLogger("hf_sara.test")
    folders = []
    for number in (1, 2):
        args = training_arguments(tmp_path / str(number))
        folders.append(run_folder.open_run(args))
        log.info("message %d", number)
    texts = [(folder / run_folder.LOG_FILE).read_text() for folder in folders]
    assert "message 1" in texts[0]
    assert "message 2" not in texts[0]
    assert "message 2" in texts[1]


def test_no_token_is_written_to_the_settings(tmp_path):
    run_folder.open_run(training_arguments(tmp_path, hub_token="hf_secretsecretsecret"))
    assert "secretsecret" not in (tmp_path / run_folder.SETTINGS_FILE).read_text()
