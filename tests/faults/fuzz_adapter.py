"""
What is fuzzed: an adapter of any bytes loads, or it is refused with an error that says what is wrong with it.

test_fuzz.py makes such bytes by chance. atheris makes them by what they reach in the code:

PYTHONPATH=tests python tests/faults/fuzz_adapter.py [options of libFuzzer]
"""

import contextlib
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from conftest import attach_trained, make_model, same_bits

from hf_sara import AdapterError, SaraAdapter, storage

# An adapter is one file. One of the first format is two or three, with this between them.
BETWEEN = b"\n<the next file>\n"
FILES = (storage.TENSORS_FILE, storage.CONFIG_FILE, storage.FACTORS_FILE)
FORMAT1 = Path(__file__).parents[1] / "data" / "format1"
REFUSALS = (AdapterError, FileNotFoundError)


def read_adapter(data: bytes, folder: Path) -> None:
    """
    Write bytes as the file of an adapter, read all of it that can be read without a base, and load it onto a model.

    Args:
        data (`bytes`): What the file holds; see `BETWEEN` for several files.
        folder (`Path`): The folder of the adapter. What it holds goes.

    Raises:
        [`AdapterError`] or `FileNotFoundError`: If the adapter is refused. Any other error is a fault of hf_sara.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in zip(FILES, data.split(BETWEEN, len(FILES) - 1), strict=False):
        (folder / name).write_bytes(content)
    refusals = []
    for read in (tensors_of, load, storage.settle):
        try:
            read(folder)
        except REFUSALS as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an adapter, with the factors that it has."""
    saved = storage.read(folder)
    return saved.tensors | (saved.files.read_factors(saved) if saved.factors_sha256 is not None else {})


def load(folder: Path) -> None:
    """Load an adapter onto a model and take it off again. The model has to be what it was, also after an error."""
    is_classifier = storage.read(folder).base.class_name == "BertForSequenceClassification"
    model, weights = base("bert" if is_classifier else "llama")
    try:
        SaraAdapter.load(model, folder).detach()
    finally:
        if hasattr(model, "sara_adapter") or not same_bits(dict(model.state_dict()), weights):
            base.cache_clear()
            raise AssertionError("The model is not what it was.")


@functools.cache
def base(family: str):
    """A model of a family, and copies of its weights."""
    model = make_model(family)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def corpus(folder: Path) -> dict[str, bytes]:
    """
    Adapters to start from: of both methods, with saved factors, with a head, with rows of tokens, and of the first
    format.

    Args:
        folder (`Path`): An empty folder to save them to.
    """
    kinds = {
        "sara": ("llama", "sara", {}),
        "mo_sara": ("llama", "mo_sara", {}),
        "factors": ("llama", "mo_sara", {"factors": "save"}),
        "head": ("bert", "sara", {}),
        "tokens": ("llama", "sara", {"trainable_token_indices": [3, 5]}),
    }
    found = {}
    for kind, (family, method, changes) in kinds.items():
        attach_trained(make_model(family), method, **changes).save_pretrained(folder / kind)
        found[kind] = (folder / kind / storage.TENSORS_FILE).read_bytes()
    for name in ("sara-llama", "mo_sara-save-llama"):
        paths = [FORMAT1 / name / file for file in FILES]
        found[f"format1-{name}"] = BETWEEN.join(path.read_bytes() for path in paths if path.is_file())
    return found


def main() -> None:
    try:
        import atheris
    except ImportError:
        raise SystemExit(
            "This needs atheris: pip install atheris. Without it, adapters are fuzzed by: "
            "python -m pytest -m slow tests/faults/test_fuzz.py"
        ) from None
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary, "corpus")
        start.mkdir()
        for name, data in corpus(Path(temporary, "made")).items():
            (start / name).write_bytes(data)

        def fuzz(data: bytes) -> None:
            with contextlib.suppress(*REFUSALS):
                read_adapter(data, Path(temporary, "adapter"))

        atheris.instrument_all()
        atheris.Setup([*sys.argv, str(start)], fuzz)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
