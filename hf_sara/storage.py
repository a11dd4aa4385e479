"""An adapter's files: write, read, verify. The file format has its home here alone.

    sara_config.json          arguments, sites, ranks, the base; for Mo-SARA the seeds of its frozen factors
    sara_adapter.safetensors  the trained tensors
    sara_factors.safetensors  Mo-SARA with factors="save" only: U and Vh of every site

Loading is strict and pickle-free. A config has exactly the known fields, shapes come from it only after they were
checked against the base, and every tensor's name, shape and dtype is compared before its bytes are read.
"""

import base64
import hashlib
import inspect
import json
import math
import os
import platform
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .arguments import SaraArguments, check_threshold
from .deltas import count_trained, frozen_shapes, trained_shapes
from .sites import OutputSlice, Site, all_sites
from .spectrum import Factors, find_factors, for_each, sketch, sketches_agree, weight_digest

if TYPE_CHECKING:
    from .adapter import SaraAdapter

# Trained tensors and frozen factors by name.
Contents = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]

CONFIG_FILE = "sara_config.json"
TENSORS_FILE = "sara_adapter.safetensors"
FACTORS_FILE = "sara_factors.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE, FACTORS_FILE)
# Files of a write that is under way; they count as soon as the tensors that this config describes are in place.
PENDING_CONFIG_FILE = "sara_config.json.new"
PENDING_FACTORS_FILE = "sara_factors.safetensors.new"

FORMAT_VERSION = 1
# A config has about 200 bytes per site; this is room for forty thousand of them. Parsed, it may take 20 times as much.
MAX_CONFIG_BYTES = 8 * 2**20
# A tensor takes about 150 bytes in the header of its file.
MAX_HEADER_BYTES_PER_TENSOR = 1024
SAFETENSORS_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}

# The fields of a config and the types of their values.
CONFIG_FIELDS = {
    "format_version": int,
    "method": str,
    "threshold": float,
    "arguments": dict,
    "dtype": str,
    "tensors_sha256": str,
    "factors_sha256": str,
    "base": dict,
    "versions": dict[str, str],
    "sites": list,
}
BASE_FIELDS = {
    "model_id": str | None,
    "revision": str | None,
    "class": str,
    "model_type": str | None,
    "dtype": str,
    "pad_token_id": int | None,
    "eos_token_id": int | list[int] | None,
    "id2label": dict[str, str] | None,
}
SITE_FIELDS = {"name": str, "shape": list[int], "k": int, "slice": dict}
SEED_FIELDS = {"dtype": str, "sha256": str, "sketch": str, "clusters": list[list[int]]}

COMMIT = r"[0-9a-f]{40}"

# OSError, and the errors of the HTTP library below huggingface_hub, which differs between its versions.
NETWORK_ERRORS = HfHubHTTPError.__bases__


class AdapterError(ValueError):
    """An adapter's files are damaged, or do not belong to this base model."""

    def __init__(self, message: str):
        # It may quote what the files say, which a terminal must not obey, nor drown in.
        shown = message if len(message) <= 2000 else f"{message[:1000]} [...] {message[-1000:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown))


@dataclass(frozen=True)
class Seed:
    """
    What identifies the frozen factors of a Mo-SARA site: they are computed again from the base weight at load.

    Args:
        dtype (`str`): Dtype of the weight they were computed from.
        sha256 (`str`): Digest of the weight's values, see [`~hf_sara.spectrum.weight_digest`].
        sketch (`torch.Tensor` of shape `(8,)`, *optional*): Summary of U and Vh.
        clusters (`list[tuple[int, int]]`, *optional*): Ranges of vectors that share one singular value.
    """

    dtype: str
    sha256: str
    sketch: torch.Tensor | None = None
    clusters: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_weight(cls, weight: torch.Tensor) -> "Seed":
        return cls(str(weight.dtype).removeprefix("torch."), weight_digest(weight))

    def with_factors(self, factors: Factors) -> "Seed":
        return replace(self, sketch=sketch(factors), clusters=tuple(factors.clusters))

    def to_json(self) -> dict[str, Any]:
        packed = base64.b64encode(self.sketch.numpy().astype("<f4").tobytes()).decode()
        record = {"dtype": self.dtype, "sha256": self.sha256, "sketch": packed}
        return {**record, "clusters": self.clusters} if self.clusters else record

    @classmethod
    def from_json(cls, record: Mapping[str, Any], site: Site) -> "Seed":
        """The seed in a site's record, whose fields have been checked."""
        if record["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{site.name}: a weight cannot have the dtype {record['dtype']!r}")
        _check_digest(f"{site.name}: its sha256", record["sha256"])
        packed = record["sketch"]
        if not re.fullmatch(r"[A-Za-z0-9+/]{43}=", packed):
            raise ValueError(f"{site.name}: its sketch {packed!r} is not 32 bytes in base64")
        numbers = np.frombuffer(base64.b64decode(packed), dtype="<f4")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{site.name}: its sketch has NaN or infinite values")
        clusters, end = [], 0
        for cluster in record.get("clusters", []):
            if len(cluster) != 2 or not end <= cluster[0] < cluster[1] - 1 < min(site.shape):
                raise ValueError(f"{site.name}: its clusters {record['clusters']} are not ranges of its vectors")
            clusters.append(tuple(cluster))
            end = cluster[1]
        return cls(record["dtype"], record["sha256"], torch.from_numpy(numbers.copy()), tuple(clusters))


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its files, checked in itself but not yet against a base."""

    folder: Path
    args: SaraArguments
    threshold: float
    sites: list[Site]
    seeds: dict[str, Seed]
    base: dict[str, Any]
    config: dict[str, Any]
    factors_file: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors, named `"<site>.<tensor>"`."""
        file = self.folder / TENSORS_FILE
        shapes = shapes_at(trained_shapes, self.args, self.sites)
        return _read_tensors(file, shapes, {self.config["dtype"]}, self.config["tensors_sha256"])

    def owns_tensors(self) -> bool:
        """Whether the tensors in the folder are those of this config, by their digest."""
        file = self.folder / TENSORS_FILE
        limit = _most_bytes(shapes_at(trained_shapes, self.args, self.sites), {self.config["dtype"]})
        return file.stat().st_size <= limit and _sha256(file) == self.config["tensors_sha256"]

    def sites_on(self, model: nn.Module) -> list[Site]:
        """The sites, after checking that the model has each of them with the same shape and columns."""
        offered = {site.name: site for site in all_sites(model)}
        for site in self.sites:
            there = offered.get(site.name)
            if there is None:
                raise AdapterError(
                    f"The adapter in {self.folder} adapts {site.name!r}, which this {type(model).__name__} does not "
                    f"have. It was trained on {self._base_text()}."
                )
            if (there.shape, there.slice, there.module) != (site.shape, site.slice, site.module):
                raise AdapterError(
                    f"{site.name}: the adapter in {self.folder} is for a weight of shape {_shape_text(site)}, this "
                    f"model's has {_shape_text(there)}. It was trained on {self._base_text()}."
                )
        trained = sum(count_trained(self.args, site.shape, site.k) for site in self.sites)
        weights = sum(math.prod(site.shape) for site in self.sites)
        # SARA never has more; with Mo-SARA, the number of heads is the one size that the base does not bound.
        if trained > 3 * weights:
            raise AdapterError(
                f"The adapter in {self.folder} claims num_heads={self.args.num_heads} and {trained:,} trained numbers "
                f"beside weights of {weights:,}: it is damaged."
            )
        return self.sites

    def factors_on(self, model: nn.Module, sites: list[Site]) -> dict[str, Factors]:
        """Mo-SARA's frozen factors: read from their file, or computed again from the base and verified."""
        if self.args.method != "mo_sara":
            return {}
        if self.args.factors == "save":
            shapes, digest = shapes_at(frozen_shapes, self.args, self.sites), self.config["factors_sha256"]
            tensors = _read_tensors(self.factors_file, shapes, set(SAFETENSORS_DTYPES), digest)
            return {s.name: Factors(tensors[f"{s.name}.U"], tensors[f"{s.name}.Vh"], []) for s in sites}
        found = for_each(lambda site: self._recompute(model, site), sites, "Singular vectors")
        return {site.name: factors for site, factors in zip(sites, found, strict=True)}

    def _recompute(self, model: nn.Module, site: Site) -> Factors:
        weight = site.weight(model)
        seed, here = self.seeds[site.name], Seed.of_weight(weight)
        remedy = "or save the adapter again, where it was trained, with factors='save'"
        if here.sha256 != seed.sha256:
            if here.dtype != seed.dtype:
                raise AdapterError(
                    f"{site.name}: the adapter was trained on a {seed.dtype} base, this one is {here.dtype}, and its "
                    f"rounded weights have other singular vectors. Load the base with "
                    f"dtype=torch.{seed.dtype}, {remedy}."
                )
            raise AdapterError(
                f"{site.name}: this base's weight is not the one that the adapter was trained on (its SHA-256 "
                f"differs). Load {self._base_text()}, without merging or changing its weights, {remedy}."
            )
        factors = find_factors(weight, k=site.k, clusters=seed.clusters, site=site.name, digest=here.sha256)
        if not sketches_agree(sketch(factors), seed.sketch, site.k):
            raise AdapterError(
                f"{site.name}: the singular vectors computed here are not those of the training, although the weight "
                f"is the same: they are too close to one another to be told apart. Save the adapter again, where it "
                "was trained, with factors='save'."
            )
        return factors

    def _base_text(self) -> str:
        name = self.base.get("model_id") or f"a {self.base.get('class')} without a Hub id"
        revision = self.base.get("revision")
        return f"{name} at revision {revision}" if revision else name


# ---- writing ----


def contents(adapter: "SaraAdapter") -> Contents:
    """
    What an adapter's files hold: copies of its trained tensors, and of its frozen factors if these are saved too.
    Where tensors are sharded, every process has to call this.
    """
    return adapter.state_dict(), adapter.frozen_factors() if _saves_factors(adapter.args) else {}


def write(adapter: "SaraAdapter", folder: str | PathLike, held: Contents | None = None) -> None:
    """
    Write an adapter's files.

    Args:
        adapter ([`SaraAdapter`]): The adapter.
        folder (`str` or `os.PathLike`): Made if it does not exist.
        held (`tuple`, *optional*): Its [`contents`], where every process had to take part in getting them.

    Raises:
        [`AdapterError`]: If a tensor is missing, empty or not finite. Nothing is written then.
    """
    tensors, frozen = contents(adapter) if held is None else held
    check_tensors(tensors, shapes_at(trained_shapes, adapter.args, adapter.sites))
    saved = _saves_factors(adapter.args)
    check_tensors(frozen, shapes_at(frozen_shapes, adapter.args, adapter.sites) if saved else {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    payload = safetensors_bytes(tensors, metadata={"format": "pt"})
    factors = safetensors_bytes(frozen, metadata={"format": "pt"}) if frozen else None
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    digests = {"tensors_sha256": hashlib.sha256(payload).hexdigest()}
    if factors is not None:
        digests["factors_sha256"] = hashlib.sha256(factors).hexdigest()
    config = _config_text(adapter, dtype, digests)
    # Putting the tensors in place is the moment of change: everything else is ready before, and the old files stay
    # until then. See `read`.
    if factors is not None:
        write_file(folder / PENDING_FACTORS_FILE, factors)
    write_file(folder / PENDING_CONFIG_FILE, config.encode())
    write_file(folder / TENSORS_FILE, payload)
    if factors is not None:
        os.replace(folder / PENDING_FACTORS_FILE, folder / FACTORS_FILE)
    os.replace(folder / PENDING_CONFIG_FILE, folder / CONFIG_FILE)
    if factors is None:
        for left_over in (FACTORS_FILE, PENDING_FACTORS_FILE):
            (folder / left_over).unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _saves_factors(args: SaraArguments) -> bool:
    return args.method == "mo_sara" and args.factors == "save"


def _config_text(adapter: "SaraAdapter", dtype: str, digests: Mapping[str, str]) -> str:
    """The config as JSON with one line per site, so that it is small and differences of two can be read."""
    config = {
        "format_version": FORMAT_VERSION,
        "method": adapter.args.method,
        "threshold": adapter.threshold,
        "arguments": adapter.args.to_dict(),
        "dtype": dtype,
        **digests,
        "base": describe_base(adapter.model),
        "versions": versions(),
    }
    records = []
    for site in adapter.sites:
        record: dict[str, Any] = {"name": site.name, "shape": list(site.shape), "k": site.k}
        if site.slice is not None:
            record["slice"] = asdict(site.slice)
        if site.name in adapter.seeds:
            record.update(adapter.seeds[site.name].to_json())
        records.append("    " + json.dumps(record, separators=(",", ":")))
    head = json.dumps(config, indent=2).removesuffix("\n}")
    return head + ',\n  "sites": [\n' + ",\n".join(records) + "\n  ]\n}\n"


def versions() -> dict[str, str]:
    """Versions of what made an adapter."""
    packages = {name: version(name) for name in ("hf_sara", "transformers", "torch")}
    return {**packages, "python": platform.python_version()}


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class as its author wrote it: while FSDP2 shards a model, it has a subclass of its own making."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What loading needs to know of the base model. Paths of the local machine are left out."""
    config = getattr(model, "config", None)
    model_id = hub_id(getattr(config, "_name_or_path", None))
    commit = getattr(config, "_commit_hash", None) or (cached_commit(model_id) if model_id else None)
    kind = class_of(model)
    labels = getattr(config, "id2label", None) if "Classification" in kind.__name__ else None
    return {
        "model_id": model_id,
        "revision": commit if commit and re.fullmatch(COMMIT, commit) else None,
        "class": kind.__name__,
        "model_type": getattr(config, "model_type", None),
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        # Training aligns these with the tokenizer, and an adapter has no config.json to carry them.
        "pad_token_id": getattr(config, "pad_token_id", None),
        "eos_token_id": getattr(config, "eos_token_id", None),
        "id2label": None if labels is None else {str(key): str(label) for key, label in labels.items()},
    }


def cached_commit(repo_id: str) -> str | None:
    """
    The commit of a model in huggingface_hub's cache, if there is one only. transformers 5.24 no longer keeps the
    commit that it loaded, and with several in the cache, which one that was is anybody's guess.
    """
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id, and is not a folder of this machine."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# ---- reading ----


def locate(
    folder_or_repo_id: str | PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """
    The folder of an adapter: the one that is given, or the cached files of a Hub repository, downloaded where needed.
    Only an adapter's own files are downloaded.

    Args:
        folder_or_repo_id (`str` or `os.PathLike`): A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): For private repositories; defaults to the one of `hf auth login`.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of downloads; defaults to huggingface_hub's.
        local_files_only (`bool`, *optional*, defaults to `False`): Take what the cache has, without a network.

    Returns:
        `Path`: A folder for [`read`].

    Raises:
        `FileNotFoundError`: If there is no such folder, repository or revision, or the cache does not have it.
        `OSError`: If the download failed; calling again goes on with it.
    """
    if os.path.isdir(folder_or_repo_id):
        return Path(folder_or_repo_id)
    name = str(folder_or_repo_id)
    if hub_id(name) is None:
        raise FileNotFoundError(f"There is no adapter folder {name!r}, and it cannot be a Hub id.")
    try:
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(ADAPTER_FILES),
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and no adapter can be had from the Hub: {error}"
        ) from error
    except NETWORK_ERRORS as error:
        raise OSError(
            f"The adapter {name!r} could not be downloaded: {error}. Try again; it goes on from here."
        ) from error
    return Path(found)


def is_adapter(folder: str | PathLike) -> bool:
    """Whether a folder has the files of an adapter."""
    return (Path(folder) / CONFIG_FILE).is_file() and (Path(folder) / TENSORS_FILE).is_file()


def size_on_disk(folder: str | PathLike) -> int:
    """Bytes of an adapter's own files in a folder."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.is_file())


def read(folder: str | PathLike) -> SavedAdapter:
    """
    Read an adapter's config and check it in itself.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`write`] made.

    Raises:
        `FileNotFoundError`: If the folder or a file is missing.
        [`AdapterError`]: If the config is damaged, or of a later format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {str(folder)!r}.")
    # What is no regular file, such as a pipe that would never end, counts as missing.
    config_file, pending = folder / CONFIG_FILE, folder / PENDING_CONFIG_FILE
    if not (folder / TENSORS_FILE).is_file() or not (config_file.is_file() or pending.is_file()):
        missing = TENSORS_FILE if config_file.is_file() else CONFIG_FILE
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {missing}.")
    if pending.is_file():
        # A write was cut off. If it got as far as the tensors, they belong to the pending config.
        newer = _read_config(pending)
        if newer.owns_tensors():
            has_moved = not (folder / PENDING_FACTORS_FILE).is_file()
            return newer if has_moved else replace(newer, factors_file=folder / PENDING_FACTORS_FILE)
    if not config_file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {CONFIG_FILE}.")
    return _read_config(config_file)


def _read_config(path: Path) -> SavedAdapter:
    try:
        config = _parse(path)
        version_found = config.get("format_version")
        if type(version_found) is int and version_found > FORMAT_VERSION:
            raise AdapterError(
                f"{path} has format version {version_found}; this hf_sara reads version {FORMAT_VERSION}. "
                "Update hf_sara: pip install -U hf_sara."
            )
        saved = _check_config(config, path.parent)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from error
    return saved


def _parse(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes, which no config has")
    try:
        config = json.loads(
            content.decode(), parse_float=_finite, parse_constant=_finite, object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if type(config) is not dict:
        raise ValueError("it is not a JSON object")
    return config


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"{name!r} stands twice in one object")
        record[name] = value
    return record


def _check_config(config: dict[str, Any], folder: Path) -> SavedAdapter:
    check_fields("the config", config, CONFIG_FIELDS, optional={"factors_sha256"})
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(f"there is no format version {config['format_version']}")
    hints = get_type_hints(SaraArguments)
    check_fields("its arguments", config["arguments"], hints, optional=hints)
    args = SaraArguments(**config["arguments"])
    if config["method"] != args.method:
        raise ValueError(f"its method {config['method']!r} is not that of its arguments")
    if config["dtype"] not in ("float32", "float64"):
        raise ValueError(f"trained tensors cannot have the dtype {config['dtype']!r}")
    check_threshold(config["threshold"])
    _check_digest("its tensors_sha256", config["tensors_sha256"])
    if ("factors_sha256" in config) != _saves_factors(args):
        raise ValueError("it has to have factors_sha256 if, and only if, the factors of a Mo-SARA adapter are saved")
    if "factors_sha256" in config:
        _check_digest("its factors_sha256", config["factors_sha256"])
    _check_base(config["base"])
    records = config["sites"]
    sites = [_site(f"the record of site {number}", record, args) for number, record in enumerate(records)]
    if not sites or len({site.name for site in sites}) != len(sites):
        raise ValueError("it names no sites, or one twice")
    seeds = {}
    if args.method == "mo_sara":
        seeds = {site.name: Seed.from_json(record, site) for site, record in zip(sites, records, strict=True)}
    return SavedAdapter(folder, args, config["threshold"], sites, seeds, config["base"], config, folder / FACTORS_FILE)


def _site(what: str, record: Any, args: SaraArguments) -> Site:
    hints = {**SITE_FIELDS, **SEED_FIELDS} if args.method == "mo_sara" else SITE_FIELDS
    check_fields(what, record, hints, optional={"slice", "clusters"})
    name, shape, k, part = record["name"], tuple(record["shape"]), record["k"], None
    if "slice" in record:
        check_fields(f"the slice of {name!r}", record["slice"], get_type_hints(OutputSlice))
        part = OutputSlice(**record["slice"])
    if len(shape) != 2 or not 1 <= k <= min(shape):
        raise ValueError(f"site {name!r} has k={k}, which a weight of shape {shape} cannot have")
    return Site(name, name.rsplit(".", 1)[0] if part else name, shape, part, k)


def _check_base(base: dict[str, Any]) -> None:
    """Raise a `ValueError` unless what is said of the base is harmless to look for: never a path, never a URL."""
    check_fields("its base", base, BASE_FIELDS)
    if base["model_id"] is not None:
        try:
            validate_repo_id(base["model_id"])
        except HFValidationError as error:
            raise ValueError(f"its base {base['model_id']!r} is not a Hub id") from error
    if base["revision"] is not None and not re.fullmatch(COMMIT, base["revision"]):
        raise ValueError(f"its base's revision {base['revision']!r} is not a commit")
    if not base["class"].isidentifier():
        raise ValueError(f"its base's class {base['class']!r} is not the name of a class")
    dtype = getattr(torch, base["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"its base's dtype {base['dtype']!r} is not one that a base can have")


def check_fields(what: str, record: Any, hints: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Raise a `ValueError` unless a JSON object has exactly the known fields, with values of their types."""
    if type(record) is not dict:
        raise ValueError(f"{what} is not a JSON object")
    for name in hints:
        if name not in record and name not in optional:
            raise ValueError(f"{name!r} is missing in {what}")
    for name, value in record.items():
        if name not in hints:
            raise ValueError(f"the field {name!r} in {what} is unknown: update hf_sara, or leave it out")
        if not _is_of_type(value, hints[name]):
            expected = inspect.formatannotation(hints[name])
            raise ValueError(f"{name}={reprlib.repr(value)} in {what} is not of the type {expected}")


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type. An integer is a float too, `True` is not an integer."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if kind is list:
        return type(value) is list and all(_is_of_type(item, parts[0]) for item in value)
    if kind is dict:
        return type(value) is dict and all(_is_of_type(item, parts[1]) for item in value.values())
    return type(value) is hint or (hint is float and type(value) is int)


def _check_digest(what: str, digest: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{what} {digest!r} is not a SHA-256")


def _most_bytes(shapes: Mapping[str, tuple[int, ...]], dtypes: Collection[str]) -> int:
    """
    More bytes than a file with these tensors has. What is larger is not opened, nor digested: a header may claim to be
    gigabytes long, and a file may be as long as a disk with nothing in it.
    """
    widest = max(getattr(torch, dtype).itemsize for dtype in dtypes)
    return widest * sum(map(math.prod, shapes.values())) + MAX_HEADER_BYTES_PER_TENSOR * (1 + len(shapes))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Collection[str], sha256: str
) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"The adapter is incomplete: {path} is missing.")
    size, limit = path.stat().st_size, _most_bytes(shapes, dtypes)
    if size > limit:
        raise AdapterError(f"{path} is damaged: it has {size:,} bytes, the tensors of the config {limit:,} at most.")
    allowed = {SAFETENSORS_DTYPES[dtype] for dtype in dtypes}
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_names(keys, shapes, path)
            for key in keys:
                part = file.get_slice(key)
                _check_shape(key, tuple(part.get_shape()), shapes[key])
                if part.get_dtype() not in allowed:
                    raise AdapterError(f"{key}: the file has dtype {part.get_dtype()}, expected {sorted(allowed)}.")
            if _sha256(path) != sha256:
                raise AdapterError(
                    f"{path} is damaged: its SHA-256 is not the one that {CONFIG_FILE} gives. One of the two was "
                    "changed, or belongs to another adapter."
                )
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from error
    check_tensors(tensors, shapes)
    return tensors


def shapes_at(
    shapes_of_site: Callable[..., dict[str, tuple[int, ...]]], args: SaraArguments, sites: Sequence[Site]
) -> dict[str, tuple[int, ...]]:
    """Names in a file and shapes of all sites' trained tensors (`trained_shapes`) or frozen ones (`frozen_shapes`)."""
    return {
        f"{site.name}.{name}": shape
        for site in sites
        for name, shape in shapes_of_site(args, site.shape, site.k).items()
    }


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Compare tensors with what they have to be.

    Raises:
        [`AdapterError`]: Names the first tensor that is missing, unexpected, misshaped, empty or not finite.
    """
    _check_names(tensors, shapes, None)
    for name, tensor in tensors.items():
        _check_shape(name, tuple(tensor.shape), shapes[name])
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name}: the tensor has NaN or infinite values. Did the training diverge?")


def _check_names(names: Any, shapes: Mapping[str, tuple[int, ...]], path: Path | None) -> None:
    where = "" if path is None else f" in {path}"
    present = set(names)
    missing = [name for name in shapes if name not in present]
    unexpected = [name for name in names if name not in shapes]
    if missing or unexpected:
        raise AdapterError(
            f"The tensors{where} are not those of the adapter. "
            f"Missing: {', '.join(missing[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'}."
        )


def _shape_text(site: Site) -> str:
    return str(site.shape) if site.slice is None else f"{site.shape} in the columns {site.slice}"


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != tuple(expected):
        empty = "is empty" if 0 in shape else f"has the shape {shape}"
        raise AdapterError(f"{name}: the tensor {empty}, expected {tuple(expected)}.")
