"""The structure of the package: imports point down, rooms stay small, and what is heavy loads late."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import hf_sara

PACKAGE = Path(hf_sara.__file__).parent
# From the bottom to the top. A module may import what stands before it, wherever the import is written.
FLOORS = (
    *(
        "_lapack",
        "errors",
        "spread",
        "versions",
        "files",
        "figures",
        "records",
        "publishing",
        "repos",
        "base_files",
        "tensor_files",
        "cache",
        "devices",
        "parallel",
        "spectrum",
        "factors",
    ),
    *(
        "patterns",
        "layouts",
        "dequantizing",
        "linears",
        "sites",
        "weights",
        "seeds",
        "methods.shards",
        "methods.products",
        "methods.base",
        "methods.sara",
        "methods.mo_sara",
        "methods",
    ),
    *(
        "arguments",
        "heads",
        "default_targets",
        "targets",
        "parts",
        "base_model",
        "budget",
        "planning",
        "manifest",
        "plan_file",
        "renaming",
        "format1",
        "storage",
        "checkpoints",
    ),
    *(
        "own_tokenizer",
        "card_metadata",
        "card_text",
        "model_card",
        "hub",
        "carrier",
        "freezing",
        "token_rows",
        "copies",
        "frozen_buffers",
        "input_gradients",
        "merging",
        "contents",
        "attached",
        "adapter_files",
        "adapter",
        "export",
        "rows",
        "row_names",
        "kinds",
        "bank_table",
        "bank_training",
        "bank",
    ),
    *(
        "plain_model",
        "merge_files",
        "sharing",
        "analysis",
        "trainer.hooks",
        "trainer.streaming",
        "trainer.interrupts",
        "trainer.resuming",
    ),
    *(
        "trainer.frozen_base",
        "trainer.searching",
        "trainer.reference",
        "trainer.adapter_trainer",
        "trainer.row_weights",
        "trainer.bank_trainer",
        "trainer.cards",
        "trainer",
    ),
    *(
        "cli_options",
        "cli",
        "tasks.data",
        "tasks.instruct",
        "tasks.math",
        "tasks.commonsense",
        "tasks.e2e",
        "tasks.e2e_metrics",
    ),
)
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_CLASS, LARGEST_SHARE = 450, 250, 0.15


def module_files() -> dict[str, Path]:
    """The modules by name, without the package's own `__init__.py`, which names everything, and empty ones."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and path.read_text(encoding="utf-8").count("\n") > 1:
            found[name] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The package's modules that a module imports, on any line: also inside of functions and for type checkers."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("hf_sara.") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                stem = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            else:
                stem = re.sub(r"^hf_sara\.?", "", node.module or "").split(".")
            stem = ".".join(part for part in stem if part)
            names = [f"{stem}.{alias.name}".strip(".") for alias in node.names] + [stem]
        else:
            continue
        found |= {other for other in names if other in known and other != name}
    return found


def test_every_import_points_down():
    files = module_files()
    assert set(files) == set(FLOORS)
    height = {name: index for index, name in enumerate(FLOORS)}
    arrows = {name: imported(name, path, set(files)) for name, path in files.items()}
    assert sum(map(len, arrows.values())) > 100
    up = [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in others
        if height[other] > height[name]
    ]
    assert not up


def test_rooms_stay_small():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in module_files().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}
    classes = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in module_files().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in classes.items() if count > MOST_LINES_OF_A_CLASS} == {}
    rooms: dict[str, int] = {}
    for name, count in lines.items():
        room = name.split(".")[0]
        rooms[room] = rooms.get(room, 0) + count
    total = sum(lines.values())
    assert {room: count / total for room, count in rooms.items() if count >= LARGEST_SHARE * total} == {}


def test_no_module_but_the_methods_own_compares_their_names():
    naming = [
        name
        for name, path in module_files().items()
        if re.search(r"""["']mo_sara["']""", path.read_text(encoding="utf-8"))
    ]
    assert [name for name in naming if not name.startswith("methods.") and name != "arguments"] == []


@pytest.mark.parametrize("heavy", ["evaluate", "sacrebleu", "typer", "rich", "datasets", "peft", "matplotlib"])
def test_training_imports_nothing_heavy_by_our_doing(heavy):
    # transformers loads some of these by itself where they are installed, so the package's own sources are read.
    light = [name for name in FLOORS if not name.startswith("tasks") and not name.startswith("cli")]
    files = module_files()
    for name in light:
        tree = ast.parse(files[name].read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [found for found in names if found.split(".")[0] == heavy], name


def test_the_public_names_are_the_same_in_all_three_places():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_checkers = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    homes = {name for names in hf_sara._HOMES.values() for name in names}
    assert set(hf_sara.__all__) == homes == for_checkers


# How many arguments without a name stand before the encoding.
BEFORE_ENCODING = {"open": 3, "fdopen": 3, "read_text": 0, "write_text": 1}


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines that read or write text, and leave its encoding to the system, which has a code page on Windows."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        named = {keyword.arg for keyword in call.keywords}
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        texts = [node.value for value in values for node in ast.walk(value) if isinstance(node, ast.Constant)]
        of_bytes = any(isinstance(text, str) and re.fullmatch("[rwax+]*b[rwax+]*", text) for text in texts)
        # os.open opens a file neither as text nor as bytes.
        is_text = name in BEFORE_ENCODING and not of_bytes and not ast.unparse(call.func).startswith("os.open")
        is_text = is_text and len(call.args) <= BEFORE_ENCODING[name]
        if "encoding" not in named and (is_text or {"text", "universal_newlines"} & named):
            found.append(call.lineno)
    return found


def test_no_text_file_has_the_encoding_of_the_system():
    root = PACKAGE.parent
    files = [path for folder in ("hf_sara", "recipes") for path in sorted((root / folder).rglob("*.py"))]
    assert len(files) > 80
    found = [
        f"{path.relative_to(root).as_posix()}:{line}"
        for path in files
        for line in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, 'rb')", False),
        ("open(p, mode='rb')", False),
        ("open(p, 'rb' if a else 'rb+')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('rb')", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(t)", True),
        ("p.write_text(t, encoding='utf-8')", False),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c)", False),
    ],
)
def test_what_the_rule_of_encodings_refuses(code, wrong):
    assert bool(without_encoding(ast.parse(code))) == wrong


def test_a_script_beside_a_clone_finds_the_package(tmp_path):
    """A folder hf_sara in the script's folder is a namespace package, which an install by a finder would not outdo."""
    installed = distribution("hf_sara").read_text("direct_url.json")
    if installed is None or not json.loads(installed).get("dir_info", {}).get("editable"):
        pytest.skip("hf_sara is not an editable install")
    (tmp_path / "hf_sara").mkdir()
    (tmp_path / "script.py").write_text("from hf_sara import __version__\n", encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "script.py")], check=True, cwd=tmp_path)
