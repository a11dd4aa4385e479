"""An adapter's files: the format, writing and reading. No other module knows the format.

    sara_config.json          arguments, sites, ranks, the base; for Mo-SARA the seeds of its frozen factors
    sara_adapter.safetensors  the trained tensors
    sara_factors.safetensors  methods with frozen factors and factors="save" only: U and Vh of every site

Loading is strict and pickle-free. A config has exactly the known fields, its shapes are used only after they were
checked against the base, and every tensor's name, shape and dtype is compared before its bytes are read.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from .arguments import SaraArguments
from .base_model import BaseRecord
from .errors import AdapterError
from .factors import Factors, find_factors, sketch, sketches_agree
from .files import check_digest, file_digest, write_file
from .methods import Method
from .parallel import for_each
from .planning import AdapterSpec
from .records import check_fields, read_json
from .seeds import SEED_FIELDS, Seed
from .sites import OutputSlice, PlannedSite, Site, all_sites
from .spectrum import check_threshold
from .tensor_files import SAFETENSORS_DTYPES, check_tensors, most_bytes, read_tensors, to_bytes

CONFIG_FILE = "sara_config.json"
TENSORS_FILE = "sara_adapter.safetensors"
FACTORS_FILE = "sara_factors.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE, FACTORS_FILE)
# The files of a save that is not finished. They count as soon as the tensors that this config describes are in place.
PENDING_CONFIG_FILE = "sara_config.json.new"
PENDING_FACTORS_FILE = "sara_factors.safetensors.new"

FORMAT_VERSION = 1
# A config has about 200 bytes per site, so this is enough for forty thousand sites. There is a limit, because a parsed
# config may take 20 times as much memory.
MAX_CONFIG_BYTES = 8 * 2**20

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
SITE_FIELDS = {"name": str, "shape": list[int], "k": int, "slice": dict}


# ---- the manifest ----


@dataclass(frozen=True)
class Manifest(AdapterSpec):
    """
    The description of an adapter that its files hold besides its tensors. Writing takes it, and reading returns it.

    Args:
        args ([`SaraArguments`]): The adapter's arguments.
        threshold (`float`): The threshold in force.
        sites (`list[PlannedSite]`): The sites with their ranks.
        seeds (`dict[str, Seed]`): The seeds of the frozen factors by site; empty for a method that has none.
        base ([`BaseRecord`]): The base model of the training.
        versions (`dict[str, str]`): Versions of the packages that made the adapter.
    """

    seeds: dict[str, Seed]
    base: BaseRecord
    versions: dict[str, str]


def current_versions() -> dict[str, str]:
    """The versions that an adapter records: those of packages and of Python."""
    packages = {name: version(name) for name in ("hf_sara", "transformers", "torch")}
    return {**packages, "python": platform.python_version()}


@dataclass(frozen=True)
class SavedAdapter(Manifest):
    """
    An adapter as it was read from its files. They were compared with each other, but not yet with a base.

    Args:
        folder (`Path`): The folder of its files.
        factors_file (`Path`): The file of its frozen factors, if they are saved.
        dtype (`str`): Dtype of its trained tensors.
        tensors_sha256 (`str`): Digest of the file of its trained tensors.
        factors_sha256 (`str`, *optional*): Digest of the file of its frozen factors.
    """

    folder: Path
    factors_file: Path
    dtype: str
    tensors_sha256: str
    factors_sha256: str | None = None

    def read_tensors(self) -> dict[str, torch.Tensor]:
        """Read and check the trained tensors, named `"<site>.<tensor>"`. Each call reads the file."""
        return read_tensors(self.folder / TENSORS_FILE, self.trained_shapes(), {self.dtype}, self.tensors_sha256)

    def owns_tensors(self) -> bool:
        """Whether the tensors in the folder are those of this config, by their digest."""
        file = self.folder / TENSORS_FILE
        limit = most_bytes(self.trained_shapes(), {self.dtype})
        return file.stat().st_size <= limit and file_digest(file) == self.tensors_sha256

    def sites_on(self, model: nn.Module) -> list[PlannedSite]:
        """Check that the model has each site with the same shape and columns; returns the sites."""
        offered = {site.name: site for site in all_sites(model)}
        for site in self.sites:
            there = offered.get(site.name)
            if there is None:
                raise AdapterError(
                    f"The adapter in {self.folder} adapts {site.name!r}, which this {type(model).__name__} does not "
                    f"have. It was trained on {self.base}."
                )
            if (there.shape, there.slice, there.module) != (site.shape, site.slice, site.module):
                raise AdapterError(
                    f"{site.name}: the adapter in {self.folder} is for a weight of shape {_shape_text(site)}, this "
                    f"model's has {_shape_text(there)}. It was trained on {self.base}."
                )
        trained, weights = self.trained_parameters, sum(math.prod(site.shape) for site in self.sites)
        # The number of a router's heads is the one size that the base does not bound.
        if self.method.router_heads is not None and trained > 3 * weights:
            raise AdapterError(
                f"The adapter in {self.folder} claims num_heads={self.args.num_heads} and {trained:,} trained numbers "
                f"beside weights of {weights:,}: it is damaged."
            )
        return self.sites

    def factors_on(self, model: nn.Module, sites: Sequence[PlannedSite]) -> dict[str, Factors]:
        """The frozen factors of sites: read from their file, or computed again from the base and verified."""
        if not self.method.has_factors:
            return {}
        if self.factors_sha256 is not None:
            dtypes = set(SAFETENSORS_DTYPES)
            tensors = read_tensors(self.factors_file, self.saved_factor_shapes(), dtypes, self.factors_sha256)
            return {s.name: Factors(tensors[f"{s.name}.U"], tensors[f"{s.name}.Vh"], []) for s in sites}
        found = for_each(lambda site: self._recompute(model, site), sites, "Singular vectors")
        return {site.name: factors for site, factors in zip(sites, found, strict=True)}

    def _recompute(self, model: nn.Module, site: PlannedSite) -> Factors:
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
                f"differs). Load {self.base}, without merging or changing its weights, {remedy}."
            )
        factors = find_factors(weight, k=site.k, clusters=seed.clusters, site=site.name, digest=here.sha256)
        if seed.sketch is None or not sketches_agree(sketch(factors), seed.sketch, site.k):
            raise AdapterError(
                f"{site.name}: the singular vectors computed here are not those of the training, although the weight "
                f"is the same: they are too close to one another to be told apart. Save the adapter again, where it "
                "was trained, with factors='save'."
            )
        return factors


# ---- writing ----


def write(
    folder: str | PathLike,
    manifest: Manifest,
    tensors: dict[str, torch.Tensor],
    factors: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Write an adapter's files.

    Args:
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.
        manifest ([`Manifest`]): The description of the adapter.
        tensors (`dict[str, torch.Tensor]`): The trained tensors, named `"<site>.<tensor>"`, on the CPU.
        factors (`dict[str, torch.Tensor]`, *optional*): The frozen factors, if they are saved too.

    Raises:
        [`AdapterError`]: If a tensor is missing, empty or not finite. Nothing is written then.
    """
    factors = factors or {}
    check_tensors(tensors, manifest.trained_shapes())
    check_tensors(factors, manifest.saved_factor_shapes())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    payload = to_bytes(tensors)
    factors_payload = to_bytes(factors) if factors else None
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    digests = {"tensors_sha256": hashlib.sha256(payload).hexdigest()}
    if factors_payload is not None:
        digests["factors_sha256"] = hashlib.sha256(factors_payload).hexdigest()
    config = _config_text(manifest, dtype, digests)
    # The adapter changes at the moment at which the tensors are put in place. Everything else is ready before, and the
    # old files stay until then. See `read`.
    if factors_payload is not None:
        write_file(folder / PENDING_FACTORS_FILE, factors_payload)
    write_file(folder / PENDING_CONFIG_FILE, config.encode())
    write_file(folder / TENSORS_FILE, payload)
    if factors_payload is not None:
        os.replace(folder / PENDING_FACTORS_FILE, folder / FACTORS_FILE)
    os.replace(folder / PENDING_CONFIG_FILE, folder / CONFIG_FILE)
    if factors_payload is None:
        for left_over in (FACTORS_FILE, PENDING_FACTORS_FILE):
            (folder / left_over).unlink(missing_ok=True)


def _config_text(manifest: Manifest, dtype: str, digests: Mapping[str, str]) -> str:
    """The config as JSON with one line per site, so that it is small, and people can compare two of them."""
    config = {
        "format_version": FORMAT_VERSION,
        "method": manifest.args.method,
        "threshold": manifest.threshold,
        "arguments": manifest.args.to_dict(),
        "dtype": dtype,
        **digests,
        "base": manifest.base.to_json(),
        "versions": manifest.versions,
    }
    records = []
    for site in manifest.sites:
        record: dict[str, Any] = {"name": site.name, "shape": list(site.shape), "k": site.k}
        if site.slice is not None:
            record["slice"] = asdict(site.slice)
        if site.name in manifest.seeds:
            record.update(manifest.seeds[site.name].to_json())
        records.append("    " + json.dumps(record, separators=(",", ":")))
    head = json.dumps(config, indent=2).removesuffix("\n}")
    return head + ',\n  "sites": [\n' + ",\n".join(records) + "\n  ]\n}\n"


# ---- reading ----


def size_on_disk(folder: str | PathLike) -> int:
    """Bytes of an adapter's own files in a folder."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.is_file())


def read(folder: str | PathLike) -> SavedAdapter:
    """
    Read an adapter's config and check it, without a base.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`write`] made.

    Raises:
        `FileNotFoundError`: If the folder or a file is missing.
        [`AdapterError`]: If the config is damaged, or of a later format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {str(folder)!r}.")
    # Anything but a regular file counts as missing, because reading a pipe, for example, might never end.
    config_file, pending = folder / CONFIG_FILE, folder / PENDING_CONFIG_FILE
    if not (folder / TENSORS_FILE).is_file() or not (config_file.is_file() or pending.is_file()):
        missing = TENSORS_FILE if config_file.is_file() else CONFIG_FILE
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {missing}.")
    if pending.is_file():
        # A save was interrupted. If it had put the tensors in place, they belong to the pending config.
        newer = _read_config(pending)
        if newer.owns_tensors():
            has_moved = not (folder / PENDING_FACTORS_FILE).is_file()
            return newer if has_moved else replace(newer, factors_file=folder / PENDING_FACTORS_FILE)
    if not config_file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {CONFIG_FILE}.")
    return _read_config(config_file)


def _read_config(path: Path) -> SavedAdapter:
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
        version_found = config.get("format_version")
        if type(version_found) is int and version_found > FORMAT_VERSION:
            raise AdapterError(
                f"{path} has format version {version_found}; this hf_sara reads version {FORMAT_VERSION}. "
                "Update hf_sara: pip install -U hf_sara."
            )
        return _check_config(config, path.parent)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from error


def _check_config(config: dict[str, Any], folder: Path) -> SavedAdapter:
    check_fields("the config", config, CONFIG_FIELDS, optional={"factors_sha256"})
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(f"there is no format version {config['format_version']}")
    hints = get_type_hints(SaraArguments)
    check_fields("its arguments", config["arguments"], hints, optional=hints)
    args = SaraArguments(**config["arguments"])
    method = args.resolved_method()
    if config["method"] != args.method:
        raise ValueError(f"its method {config['method']!r} is not that of its arguments")
    if config["dtype"] not in ("float32", "float64"):
        raise ValueError(f"trained tensors cannot have the dtype {config['dtype']!r}")
    check_threshold(config["threshold"])
    check_digest("its tensors_sha256", config["tensors_sha256"])
    if ("factors_sha256" in config) != method.saves_factors:
        raise ValueError("it has to have factors_sha256 if, and only if, the frozen factors are saved")
    if "factors_sha256" in config:
        check_digest("its factors_sha256", config["factors_sha256"])
    base = BaseRecord.from_json(config["base"])
    records = config["sites"]
    sites = [_read_site(f"the record of site {number}", record, method) for number, record in enumerate(records)]
    if not sites or len({site.name for site in sites}) != len(sites):
        raise ValueError("it names no sites, or one twice")
    seeds = {}
    if method.has_factors:
        seeds = {site.name: Seed.from_json(record, site) for site, record in zip(sites, records, strict=True)}
    return SavedAdapter(
        args=args,
        threshold=config["threshold"],
        sites=sites,
        seeds=seeds,
        base=base,
        versions=config["versions"],
        folder=folder,
        factors_file=folder / FACTORS_FILE,
        dtype=config["dtype"],
        tensors_sha256=config["tensors_sha256"],
        factors_sha256=config.get("factors_sha256"),
    )


def _read_site(what: str, record: Any, method: Method) -> PlannedSite:
    hints = {**SITE_FIELDS, **SEED_FIELDS} if method.has_factors else SITE_FIELDS
    check_fields(what, record, hints, optional={"slice", "clusters"})
    name, shape, k, part = record["name"], tuple(record["shape"]), record["k"], None
    if "slice" in record:
        check_fields(f"the slice of {name!r}", record["slice"], get_type_hints(OutputSlice))
        part = OutputSlice(**record["slice"])
    if len(shape) != 2 or not 1 <= k <= min(shape):
        raise ValueError(f"site {name!r} has k={k}, which a weight of shape {shape} cannot have")
    return PlannedSite(name, name.rsplit(".", 1)[0] if part else name, shape, part, k=k)


def _shape_text(site: Site) -> str:
    return str(site.shape) if site.slice is None else f"{site.shape} in the columns {site.slice}"
