"""The text of a manifest gives the manifest back, and a field of a wrong type is a ValueError that says so."""

import copy
from contextlib import suppress
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sara.arguments import SaraArguments
from hf_sara.base_model import BaseRecord
from hf_sara.layouts import OutputSlice
from hf_sara.manifest import MAX_CONFIG_BYTES, Manifest, config_text, parse_config
from hf_sara.parts import ModulePart, TokenPart
from hf_sara.records import parse_json
from hf_sara.seeds import Seed
from hf_sara.sites import PlannedSite
from hf_sara.tensor_files import BUFFER_DTYPES

VERSION = 2
quick = settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.integers(1, 10**6)
optional_lists = st.none() | st.lists(names, min_size=1, max_size=3)


@st.composite
def arguments(draw):
    method = draw(st.sampled_from(["sara", "mo_sara"]))
    own = {
        "sara": {"singular_values": st.booleans()},
        "mo_sara": {
            "num_heads": st.integers(1, 9),
            "v_position": st.sampled_from(["back", "front", "none"]),
            "factors": st.sampled_from(["recompute", "save"]),
        },
    }[method]
    given = {
        "threshold": st.none() | st.floats(0, 1, exclude_min=True),
        "target_modules": optional_lists.filter(lambda found: not found or "all-linear" not in found),
        "exclude_modules": optional_lists,
        "layers": st.sampled_from([None, "0", "0-2, 5"]),
        "modules_to_save": (st.none() | st.lists(names, max_size=3)).filter(
            lambda found: not found or "none" not in found
        ),
        "trainable_token_indices": st.none() | st.lists(st.integers(0, 10**5), min_size=1, max_size=3, unique=True),
        "dropout": st.floats(0, 1, exclude_max=True),
    }
    return SaraArguments(method=method, **{name: draw(found) for name, found in {**given, **own}.items()})


@st.composite
def sites(draw, name):
    shape = (draw(sizes), draw(sizes))
    part = draw(st.none() | st.builds(OutputSlice, *[st.integers(0, 99)] * 3))
    module = name
    if part is not None:
        module, name = name, f"{name}.{draw(names.map(lambda label: label.replace('.', '')).filter(bool))}"
    return PlannedSite(name, module, shape, part, k=draw(st.integers(1, min(shape))))


def seeds(site):
    sketches = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8)
    clusters = st.lists(st.integers(0, min(site.shape)), max_size=4, unique=True).map(sorted)
    return st.builds(
        Seed,
        st.sampled_from(["float32", "bfloat16"]),
        digests,
        sketches.map(torch.tensor),
        clusters.map(
            lambda ends: tuple(pair for pair in zip(ends[::2], ends[1::2], strict=False) if pair[1] > pair[0] + 1)
        ),
    )


shapes = st.dictionaries(names, st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3)


@st.composite
def module_parts(draw, name):
    buffers = draw(shapes)
    dtypes = {key: draw(st.sampled_from(sorted(BUFFER_DTYPES))) for key in buffers}
    return ModulePart(name, draw(shapes), buffers, dtypes, draw(st.dictionaries(names, names, max_size=2)))


def token_parts(name):
    indices = st.sets(st.integers(0, 10**5), min_size=1, max_size=4).map(lambda found: tuple(sorted(found)))
    return st.builds(TokenPart, st.just(name), indices, sizes, st.booleans())


tokens = st.none() | st.integers(-9, 10**6)
bases = st.builds(
    BaseRecord,
    model_id=st.sampled_from([None, "a/b", "gpt2"]),
    revision=st.none() | st.text("0123456789abcdef", min_size=40, max_size=40),
    class_name=st.sampled_from(["LlamaForCausalLM", "Änderung", "_x"]),
    model_type=st.none() | names,
    dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    pad_token_id=tokens,
    eos_token_id=tokens | st.lists(st.integers(0, 99), max_size=2),
    id2label=st.none() | st.dictionaries(st.integers(0, 99).map(str), names, max_size=3),
    problem_type=st.none() | names,
    vocab_size=st.none() | sizes,
    generation_eos_token_id=tokens,
)


@st.composite
def manifests(draw):
    args = draw(arguments())
    found = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    # A number at the start keeps the names of the tensors different.
    planned = [draw(sites(f"{number}{name}")) for number, name in enumerate(found)]
    kinds = draw(st.lists(st.sampled_from([token_parts, module_parts]), max_size=3))
    kinds.sort(key=lambda kind: kind is token_parts)
    parts = [draw(kind(f"part {number}{draw(names)}")) for number, kind in enumerate(kinds)]
    for part in parts:
        if isinstance(part, ModulePart) and set(part.parameters) & set(part.buffers):
            parts = []
            break
    method = args.resolved_method()
    manifest = Manifest(
        args=args,
        threshold=draw(st.floats(0, 1, exclude_min=True)),
        sites=planned,
        parts=parts,
        seeds={site.name: draw(seeds(site)) for site in planned} if method.has_factors else {},
        base=draw(bases),
        versions=draw(st.dictionaries(names, names, max_size=3)),
        untrained=frozenset(draw(st.sets(st.sampled_from([site.name for site in planned])))),
    )
    kept = {"tensors_sha256": draw(digests), **({"factors_sha256": draw(digests)} if method.saves_factors else {})}
    return manifest, draw(st.sampled_from(["float32", "float64"])), kept


def parsed(manifest, dtype, kept):
    return parse_json(config_text(manifest, VERSION, dtype, kept).encode(), MAX_CONFIG_BYTES)


def comparable(manifest):
    """The fields of a manifest, with its tensors as lists."""
    values = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
    values["seeds"] = {
        name: (seed.dtype, seed.sha256, seed.sketch.tolist(), seed.clusters) for name, seed in manifest.seeds.items()
    }
    return values


@quick
@given(manifests())
def test_a_text_gives_the_manifest_back(made):
    manifest, dtype, kept = made
    config = parse_config(parsed(*made), VERSION)
    assert comparable(config) == comparable(manifest)
    assert (config.dtype, config.tensors_sha256, config.factors_sha256) == (
        dtype,
        kept["tensors_sha256"],
        kept.get("factors_sha256"),
    )
    assert config_text(config, VERSION, dtype, kept) == config_text(*made[:1], VERSION, *made[1:])


def places(value, path=()):
    """The paths to every value inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(config, path, value):
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


WRONG = (None, True, -1, 0, 1.5, 10**400, "", "x", "\ud800", [], [[]], {}, {"": None}, [None], {"a": {}})


@quick
@given(manifests(), st.data())
def test_one_change_is_read_or_is_a_value_error(made, data):
    config = parsed(*made)
    path = data.draw(st.sampled_from(list(places(config))))
    value = data.draw(st.sampled_from(WRONG))
    with suppress(ValueError):
        parse_config(changed(config, path, value), VERSION)


@quick
@given(manifests(), st.data())
def test_a_field_of_a_wrong_type_is_an_error(made, data):
    config = parsed(*made)
    # Each of these is of no type that a field of its place can have.
    path = data.draw(st.sampled_from([path for path in places(config) if len(path) < 3 or path[0] == "sites"]))
    with pytest.raises(ValueError):  # noqa: PT011
        parse_config(changed(config, path, [{"a": [1.5]}]), VERSION)


@quick
@given(manifests(), st.data())
def test_a_field_too_many_or_too_few_is_an_error(made, data):
    config = parsed(*made)
    with pytest.raises(ValueError, match="is unknown"):
        parse_config({**config, data.draw(names.filter(lambda name: name not in config)): 1}, VERSION)
    name = data.draw(st.sampled_from(sorted(set(config) - {"modules", "tokens", "factors_sha256"})))
    with pytest.raises(ValueError, match="is missing"):
        parse_config({key: value for key, value in config.items() if key != name}, VERSION)
