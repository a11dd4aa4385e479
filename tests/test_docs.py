"""The pages say what is true: their code runs, their commands have the options that they use, their links lead to
files.

Hub ids are answered by a Hub on loopback, with tiny random models in the place of real ones. A block that cannot run
here has the comment `<!-- not run: reason -->` in the line before it.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import METHODS, attach_trained, make_model, make_tokenizer
from hub_server import HubServer, online
from huggingface_hub import HfFileSystem, constants
from safetensors import safe_open

import hf_sara
from harness.options import given_options
from hf_sara import SaraAdapter, SaraArguments
from hf_sara.cli import app
from hf_sara.manifest import MODULE_FIELDS, TOKEN_FIELDS

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run:(.*?)-->\n\Z", re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
# Their options are their own business.
OTHER_PROGRAMS = ("python", "ruff", "mypy", "mkdocs", "pre-commit", "torchrun", "accelerate")
TOKEN = "hf_mememememememe"
BASE = "HuggingFaceTB/SmolLM2-135M"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the reason why it is not run where the page gives one."""

    language: str
    code: str
    line: int
    reason: str | None

    @property
    def lines(self) -> list[str]:
        """The commands of a shell block, without comments; lines that end with a backslash go on in the next."""
        whole = self.code.replace("\\\n", " ").splitlines()
        return [line for line in whole if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = NOT_RUN.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], match[2], line, before[1].strip() if before else None))
    return found


def with_code(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if any(b.language == language for b in blocks(page))]


# ---- Python ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with the pages' base model, that this process takes for the real one; and an empty folder to work in."""
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with online(), HubServer(tokens={TOKEN: "me", "hf_team": "HuggingFaceTB"}) as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.add_repo(BASE, files={path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
        # Its instances are kept, and with them the Hub that they were made for.
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("page", with_code("python"))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, hub):
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            # The line numbers of the page, for tracebacks.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_is_left_out_for_a_reason_only(page):
    left_out = [block for block in blocks(page) if block.reason is not None]
    for block in left_out:
        assert len(block.reason.split()) >= 3, f"{page.name}:{block.line}: say why the block is not run"
        ast.parse(block.code)
    # Every such comment belongs to a block, or it would say nothing.
    assert page.read_text(encoding="utf-8").count("<!-- not run:") == len(left_out)
    assert {block.language for block in left_out} <= {"python"}


def test_few_blocks_are_left_out():
    left_out = [block for page in PAGES for block in blocks(page) if block.reason is not None]
    assert len(left_out) <= 3


# ---- commands ----


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, as words; `a && b` are two."""
    found: list[list[str]] = []
    for block in blocks(page):
        for line in block.lines if block.language == "bash" else []:
            found.append([])
            for word in shlex.split(line, comments=True):
                if word == "&&":
                    found.append([])
                else:
                    found[-1].append(word)
    return found


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_recipe(script: str, words: list[str]) -> None:
    recipe = load(Path(script).stem)
    if recipe.__name__ == "run_paper":
        options, words = recipe.make_parser().parse_known_args(words)
        if options.table is not None:
            assert (RECIPES / "paper" / f"{options.table}.yaml").is_file(), f"there is no table {options.table}"
        # What is left are options of the rows' recipe.
        recipe = load("run_e2e")
    if "--help" not in words:
        given, unknown = given_options(recipe.arguments()[0], words)
        assert not unknown, f"{script} has no {unknown}"
        assert "config" not in given or (ROOT / given["config"]).is_file()


def check_pip(words: list[str]) -> None:
    """The extras that are asked for exist."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) =$", text[text.index("[options.extras_require]") :], re.MULTILINE)
    for word in words:
        asked = re.fullmatch(r"(?:\.|hf_sara)\[([\w,]+)\]", word)
        assert asked is None or set(asked[1].split(",")) <= set(extras), f"there is no extra {word}"


def check(words: list[str]) -> None:
    """Raise an `AssertionError` unless a command has the options that it is given."""
    try:
        parse(words)
    except (Exception, SystemExit) as error:
        # Parsers have errors of their own, or exit.
        raise AssertionError(f"{shlex.join(words)}: {error!r}") from error


def parse(words: list[str]) -> None:
    """Parse a command as its program does; nothing is run."""
    if words[0] == "hf-sara":
        command = typer.main.get_command(app).commands[words[1]]
        command.make_context(words[1], words[2:])
    elif words[0] == "python" and words[1].startswith("recipes/"):
        check_recipe(words[1], words[2:])
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(word in text for word in words[2:] if word.startswith("--"))
    elif words[0] == "pip":
        check_pip(words)
    else:
        assert words[0] in OTHER_PROGRAMS, f"{words[0]} is not checked"


@pytest.mark.parametrize("page", with_code("bash"))
def test_the_commands_of_a_page_have_their_options(page):
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "command",
    [
        "hf-sara plan model --nonsense",
        "hf-sara pull",
        "python recipes/run_e2e.py --nonsense 1",
        "python recipes/run_math.py --preset llama-1b",
        "python recipes/run_paper.py table3 --nonsense 1",
        "python recipes/run_paper.py table99",
        "python benchmarks/plan.py --nonsense",
        "pip install -e .[nonsense]",
        "nonsense",
    ],
)
def test_the_check_of_commands_finds_what_is_wrong(command):
    with pytest.raises(AssertionError):
        check(shlex.split(command))


def test_the_page_of_the_command_line_has_every_option():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parts = {part.split()[0]: part for part in text.split("## `hf-sara ")[1:]}
    parts = {name.rstrip("`"): part for name, part in parts.items()}
    found = typer.main.get_command(app).commands
    assert set(parts) == set(found)
    for name, command in found.items():
        options = {option for entry in command.params for option in entry.opts if option.startswith("--")}
        assert {option for option in options if f"`{option}`" not in parts[name]} == set(), name


# ---- what else the pages claim ----


def test_the_page_of_the_api_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: hf_sara\.(\w+)$", text, re.MULTILINE)
    assert sorted(described) == sorted(hf_sara.__all__)


@pytest.mark.parametrize("method", [*METHODS, "saved"])
def test_the_page_of_the_format_has_every_field(method, tmp_path):
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    changes = {"factors": "save"} if method == "saved" else {}
    adapter = attach_trained(make_model("gpt2"), "mo_sara" if method == "saved" else method, **changes)
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "sara_config.json").read_text())

    def names(value) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(names, value))
        return set(value).union(*map(names, value.values())) if isinstance(value, dict) else set()

    assert {name for name in names(config) if f"`{name}`" not in text} == set()
    assert {path.name for path in tmp_path.iterdir() if f"`{path.name}`" not in text} == set()
    assert {name.rsplit(".", 1)[-1] for name in adapter.state_dict()} <= set(re.findall(r"`(\w+)` \(", text))


def test_the_page_of_the_format_has_every_field_of_parts(tmp_path):
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    model = make_model("gpt2", tie_word_embeddings=False)
    SaraAdapter.attach(model, SaraArguments(threshold=0.3, trainable_token_indices=[3], modules_to_save=["ln_f"]))
    records = [model.sara_adapter.parts[0].to_json(), *(part.to_json() for part in model.sara_adapter.parts[1:])]
    assert [record["name"] for record in records] == ["transformer.ln_f", "transformer.wte", "lm_head"]
    fields = {*MODULE_FIELDS, *TOKEN_FIELDS}
    assert {field for record in records for field in record} <= fields
    assert {field for field in fields if f"| `{field}` |" not in text} == set()


def test_the_page_of_the_format_is_enough_to_verify_an_adapter(tmp_path):
    """Digest, vectors and sketch of every site, computed as the page says, without hf_sara."""

    def probe(rows, columns, salt):
        x = np.arange(rows * columns, dtype=np.uint64) + np.uint64(salt << 40)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return 1.0 - 2.0 * ((x >> np.uint64(62)) & np.uint64(1)).astype(float).reshape(rows, columns)

    model = make_model()
    with torch.no_grad():
        # Equal singular values: the vectors of the first site are one cluster.
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.eye(24))
    attach_trained(model, "mo_sara").save_pretrained(tmp_path)
    with safe_open(tmp_path / "sara_adapter.safetensors", framework="np") as file:
        config = json.loads(file.metadata()["sara_config"])
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} torch.float32 {tensor.shape}\n".encode() + tensor.astype("<f4").tobytes())
    assert config["tensors_sha256"] == digest.hexdigest()
    assert config["sites"][0]["clusters"] == [[0, 24]]
    for site in config["sites"]:
        (d_in, d_out), k = site["shape"], site["k"]
        stored = model.get_submodule(site["name"]).weight.detach().numpy()
        assert stored.shape == (d_out, d_in)
        text = f"torch.float32({d_out}, {d_in})".encode()
        assert site["sha256"] == hashlib.sha256(text + stored.astype("<f4").tobytes()).hexdigest()

        weight = stored.T.astype(np.float64)
        tall = weight if d_in >= d_out else weight.T
        left, _, right = np.linalg.svd(tall, full_matrices=False)
        signs = np.where(right @ probe(len(right), 1, 0) < 0, -1, 1)
        left, right = left.T * signs, right * signs
        for start, stop in site.get("clusters", []):
            L, _, R = np.linalg.svd(right[start:stop] @ probe(len(right), stop - start, 1))
            left[start:stop], right[start:stop] = (L @ R).T @ left[start:stop], (L @ R).T @ right[start:stop]
        left, right = left[:k].astype(np.float32), right[:k].astype(np.float32)
        U, Vh = (left.T, right) if d_in >= d_out else (right.T, left)

        R = probe(k, 4, 2)
        first = ((probe(d_in, 4, 3).T @ U) * R.T).sum(1)
        second = ((Vh @ probe(d_out, 4, 4)) * R).sum(0)
        sketch = np.frombuffer(base64.b64decode(site["sketch"]), "<f4")
        assert np.abs(np.concatenate([first, second]) - sketch).max() <= 1e-5 * max(1, k**0.5)


def test_the_readme_and_the_site_list_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS:
        assert f"](docs/{page.name})" in readme
        assert re.search(rf": {re.escape(page.name)}$", navigation, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"
