"""An adapter's files: writing and reading. No other module knows the format.

    sara_adapter.safetensors  the adapter: its tensors, and its config as a text in the header
    sara_config.json          a readable copy of the config

One file is the adapter, so that the moment at which it is renamed is the moment at which the adapter changes. Nobody
can see a config with the tensors of another save: neither after crashes, nor beside another writer.

Loading is strict, and reads no pickle. A config has exactly the known fields, its shapes are used only after they were
checked against the base, and every tensor's name, shape and dtype is compared before its bytes are read.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from . import format1
from .errors import AdapterError
from .factors import Factors
from .files import make_folder, write_files
from .format1 import CONFIG_FILE, FACTORS_FILE, PENDING_CONFIG_FILE, PENDING_FACTORS_FILE, TENSORS_FILE
from .linears import compute_dtype, is_linear, is_packed, why_not_on
from .manifest import MAX_CONFIG_BYTES, Config, Manifest, config_text, parse_config
from .parts import (
    ModulePart,
    Part,
    TokenPart,
    input_embedding,
    module_parts,
    refuse_collisions,
    refuse_overlap,
)
from .patterns import is_within
from .records import parse_json
from .renaming import rename, renamed_fields, renamed_modules
from .seeds import recompute
from .sites import PlannedSite, Site, all_sites, whole_site
from .spread import whole_shape, why_not_spread
from .tensor_files import SAFETENSORS_DTYPES, TensorFile, check_tensors, tensors_digest, to_bytes
from .weights import Weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
# The file of saved factors is one of the first format, which can still be read.
ADAPTER_FILES = (TENSORS_FILE, CONFIG_FILE, FACTORS_FILE)
# These are of an adapter of the first format that was in the folder before.
LEFT_OVERS = (FACTORS_FILE, PENDING_CONFIG_FILE, PENDING_FACTORS_FILE)
# The name of the config in the header.
CONFIG_KEY = "sara_config"


class Files(Protocol):
    """The files of an adapter in which its tensors lie."""

    def check(self, config: Config) -> None:
        """Compare the names, shapes and dtypes of the tensors with the config, without reading them."""

    def contents(self) -> dict[str, bytes]:
        """The content of every file of the adapter, by the file's name."""

    def read_state(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the tensors that are saved."""

    def read_factors(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the frozen factors."""


@dataclass(frozen=True)
class SavedAdapter(Config):
    """
    An adapter as it was read from its files. They were compared with each other, but not yet with a base.

    Args:
        folder (`Path`): The folder of its files.
        files ([`Files`]): The files of its tensors. They stay as they were when the adapter was read.
        renames (`dict[str, str]`, *optional*): By name of a module in the files, its name in the model.
        as_written ([`SavedAdapter`], *optional*): The adapter with the names of its files, if some have others here.
    """

    folder: Path = Path()
    files: Files | None = None
    renames: dict[str, str] = field(default_factory=dict)
    as_written: "SavedAdapter | None" = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The saved tensors: the trained ones, and those of its parts that do not train. Each access reads and checks
        them.
        """
        assert self.files is not None
        return self._renamed(self.files.read_state(self.as_written or self))

    def _renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {rename(name, self.renames): tensor for name, tensor in tensors.items()}

    def named_for(self, model: nn.Module) -> "SavedAdapter":
        """The adapter with the names of this model, where transformers has renamed modules since it was saved."""
        renames = renamed_modules(model, [*(s.module for s in self.sites), *(part.name for part in self.parts)])
        if not renames:
            return self
        return replace(self, **renamed_fields(self, renames), renames=renames, as_written=self)

    def sites_on(self, model: nn.Module) -> list[PlannedSite]:
        """Check that the model has each site with the same shape and columns; returns the sites."""
        offered, modules = {site.name: site for site in all_sites(model)}, dict(model.named_modules())
        for site in self.sites:
            there = offered.get(site.name)
            module = modules.get(site.name)
            if there is None and site.slice is None and module is not None and is_linear(module):
                # Its layout was not known to an earlier version, which adapted the module as a whole.
                there = whole_site(site.name, module)
            if there is None:
                packed = module is not None and is_packed(module)
                missing = f"has as a {type(module).__name__}, which it cannot adapt" if packed else "does not have"
                raise AdapterError(
                    f"The adapter in {self.folder} adapts {site.name!r}, which this {type(model).__name__} {missing}. "
                    f"{self.origin}"
                )
            if (there.shape, there.slice, there.module) != (site.shape, site.slice, site.module):
                raise AdapterError(
                    f"{site.name}: the adapter in {self.folder} is for a weight of shape {_shape_text(site)}, this "
                    f"model's has {_shape_text(there)}. It was trained on {self.base}."
                )
            part = site.slice.groups if site.slice else None
            reason = why_not_spread(model, site.module, part) or why_not_on(model, site.module)
            if reason is not None:
                raise AdapterError(f"{site.name} cannot hold the update of {self.folder}: {reason}.")
        updates, weights = sum(map(self.count, self.sites)), sum(math.prod(site.shape) for site in self.sites)
        # The number of a router's heads is the one size that the base does not bound.
        if self.method.router_heads is not None and updates > 3 * weights:
            raise AdapterError(
                f"The adapter in {self.folder} claims num_heads={self.args.num_heads} and {updates:,} trained numbers "
                f"beside weights of {weights:,}: it is damaged."
            )
        return self.sites

    def parts_on(self, model: nn.Module) -> list[Part]:
        """Check that the model has each part with the same tensors, and as many tokens; returns the parts."""
        modules = [part for part in self.parts if isinstance(part, ModulePart)]
        names = dict(model.named_modules())
        for name in (part.name for part in self.parts):
            if not name or name not in names:
                raise AdapterError(
                    f"The adapter in {self.folder} trains {name!r}, which this {type(model).__name__} does not have. "
                    f"{self.origin}"
                )
        try:
            found = module_parts(model, [module.name for module in modules])
            refuse_overlap(model, self.parts, self.sites)
            refuse_collisions(model, self.parts)
        except ValueError as error:
            raise AdapterError(f"The adapter in {self.folder} does not fit to this model: {error}") from error
        for module, there in zip(modules, found, strict=True):
            if module != there:
                raise AdapterError(
                    f"{module.name}: the adapter in {self.folder} trains it with {_tensors_text(module)}, and this "
                    f"model's has {_tensors_text(there)}. Load the base with the same "
                    f"configuration, labels and vocabulary: {self.base}."
                )
        embedding = input_embedding(model)
        rows = None if embedding is None else embedding.num_embeddings
        if self.base.vocab_size is not None and (rows is None or rows < self.base.vocab_size):
            raise AdapterError(
                f"The adapter in {self.folder} was trained with {self.base.vocab_size} tokens, and this model's input "
                f"embedding has {rows} rows. Call model.resize_token_embeddings({self.base.vocab_size}) first."
            )
        for part in self.parts:
            if isinstance(part, TokenPart):
                self._check_rows(model, part)
        return self.parts

    def fit_vocabulary(self, model: Any, name: str) -> None:
        """Give a base as many tokens as the training had, if the adapter holds the rows that it lacks."""
        embedding, size = input_embedding(model), self.base.vocab_size
        if embedding is None or size is None or embedding.num_embeddings == size:
            return
        # A config that claims more rows than its file has would make the base take any amount of memory.
        assert self.files is not None
        self.files.check(self.as_written or self)
        missing = range(embedding.num_embeddings, size)
        if missing:
            held = {part.name: set(part.indices) for part in self.parts if isinstance(part, TokenPart)}
            whole = [part.name for part in self.parts if isinstance(part, ModulePart)]
            names = {module: module_name for module_name, module in model.named_modules()}
            output = model.get_output_embeddings()
            needed = [embedding]
            if output is not None and output.weight is not embedding.weight:
                needed.append(output)
            lacking = [
                names[module]
                for module in needed
                if not is_within(names[module], whole) and not held.get(names[module], set()).issuperset(missing)
            ]
            if lacking:
                raise AdapterError(
                    f"The adapter in {self.folder} was trained with {size} tokens, and the base {name!r} has "
                    f"{embedding.num_embeddings}. The rows {missing[0]} to {missing[-1]} of {' and '.join(lacking)} "
                    "are not in the adapter, so they would be random. Train them: name the tokens in "
                    "trainable_token_indices, or the modules in modules_to_save. Or give a base_model that has them."
                )
        # The new rows are written over right after this, so nothing has to be estimated for them.
        model.resize_token_embeddings(size, mean_resizing=False)

    def _check_rows(self, model: nn.Module, part: TokenPart) -> None:
        there = dict(model.named_modules()).get(part.name)
        embedding: Any = input_embedding(model) if part.trained else cast(Any, model).get_output_embeddings()
        shape = whole_shape(embedding.weight) if there is not None and there is embedding else (0, 0)
        if part.indices[-1] >= shape[0] or part.width != shape[1]:
            raise AdapterError(
                f"The adapter in {self.folder} has rows of {part.width} numbers up to the token {part.indices[-1]} "
                f"for {part.name!r}, which is no such embedding of this model. It was trained on {self.base}."
            )

    def factors_on(self, model: nn.Module, sites: Sequence[PlannedSite]) -> dict[str, Factors]:
        """The frozen factors of sites: read from their file, or computed again from the base and verified."""
        if not self.method.has_factors:
            return {}
        if self.factors_sha256 is not None:
            assert self.files is not None
            tensors = self._renamed(self.files.read_factors(self.as_written or self))
            return {s.name: Factors(tensors[f"{s.name}.U"], tensors[f"{s.name}.Vh"], []) for s in sites}

        def find(site: PlannedSite, weight: torch.Tensor) -> Factors:
            factors = recompute(self.seeds[site.name], site, weight, str(self.base))
            return factors.to(compute_dtype(site.linear(model), model))

        found = Weights.of(model).for_each(find, sites, "Singular vectors")
        return {site.name: factors for site, factors in zip(sites, found, strict=True)}


def _shape_text(site: Site) -> str:
    return str(site.shape) if site.slice is None else f"{site.shape} in the columns {site.slice}"


def _tensors_text(part: ModulePart) -> str:
    tensors = [f"{name} {shape}" for name, shape in part.parameters.items()]
    tensors += [f"{name} {shape} {part.dtypes[name]}" for name, shape in part.buffers.items()]
    tensors += [f"{name} tied to {other}" for name, other in part.ties.items()]
    return f"the tensors {', '.join(tensors)}" if tensors else "no tensors"


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
        tensors (`dict[str, torch.Tensor]`): The saved tensors, see [`AdapterSpec.state_shapes`], on the CPU.
        factors (`dict[str, torch.Tensor]`, *optional*): The frozen factors, if they are saved too.

    Raises:
        [`AdapterError`]: If a tensor is missing, empty or not finite. Nothing is written then.
    """
    factors = factors or {}
    check_tensors(tensors, manifest.state_shapes())
    check_tensors(factors, manifest.saved_factor_shapes())
    folder = Path(folder)
    make_folder(folder)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    digests = {"tensors_sha256": tensors_digest(tensors)}
    if factors:
        digests["factors_sha256"] = tensors_digest(factors)
    config = config_text(manifest, FORMAT_VERSION, dtype, digests)
    try:
        parse_config(parse_json(config.encode(), MAX_CONFIG_BYTES), FORMAT_VERSION)
    except ValueError as error:
        raise AdapterError(f"The adapter cannot be saved, since its config is not readable: {error}.") from error
    payload = to_bytes({**tensors, **factors}, CONFIG_KEY, config)
    write_files({folder / TENSORS_FILE: payload, folder / CONFIG_FILE: config.encode()})
    for left_over in LEFT_OVERS:
        (folder / left_over).unlink(missing_ok=True)


# ---- reading ----


def size_on_disk(folder: str | PathLike) -> int:
    """Bytes of an adapter's own files in a folder."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.is_file())


def adapters_in(folder: str | PathLike) -> dict[str, Path]:
    """The folders of adapters in a folder, by name. Raises a `FileNotFoundError` if there are none."""
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{TENSORS_FILE}"))}
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} has no folder of an adapter, in which {TENSORS_FILE} would be.")
    return found


def read(folder: str | PathLike) -> SavedAdapter:
    """
    Read an adapter's config and check it, without a base. Its tensors are read later, and are of the same moment.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`write`] made.

    Raises:
        `FileNotFoundError`: If the folder or a file is missing.
        [`AdapterError`]: If the config is damaged, or of a later format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {str(folder)!r}.")
    path = folder / TENSORS_FILE
    # Anything but a regular file counts as missing, because reading a pipe, for example, might never end.
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {TENSORS_FILE}.")
    file = TensorFile(path)
    text = file.metadata.get(CONFIG_KEY)
    if text is None:
        config, files = format1.read(file)
        return SavedAdapter(**vars(config), folder=folder, files=files)
    try:
        parsed = parse_json(text.encode(), MAX_CONFIG_BYTES)
        format1.refuse_later_format(parsed, FORMAT_VERSION, path)
        config = parse_config(parsed, FORMAT_VERSION)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"The config in the header of {path} is damaged: {error}.") from error
    _compare_copy(folder / CONFIG_FILE, text, path)
    return SavedAdapter(**vars(config), folder=folder, files=_OneFile(file))


def settle(folder: str | PathLike) -> dict[str, bytes]:
    """
    Finish a write that was cut off, and read all files of the adapter.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`write`] made.

    Returns:
        `dict[str, bytes]`: The content of each of `ADAPTER_FILES` that there is, all of one moment.

    Raises:
        `FileNotFoundError`: If the folder or a file is missing.
        [`AdapterError`]: If a file is damaged. Nothing is changed then.
    """
    saved = read(folder)
    assert saved.files is not None
    contents = saved.files.contents()
    # This compares every tensor with its digest.
    saved.files.read_state(saved)
    if saved.factors_sha256 is not None:
        saved.files.read_factors(saved)
    stale = {name for name in LEFT_OVERS if name not in contents and saved.folder.joinpath(name).is_file()}
    try:
        copy = saved.folder / CONFIG_FILE
        if stale or not copy.is_file() or copy.read_bytes() != contents[CONFIG_FILE]:
            # The file of tensors stays, since another process may have put a newer one there.
            write_files({saved.folder / name: contents[name] for name in contents if name != TENSORS_FILE})
            for name in stale:
                (saved.folder / name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("The last save to %s was cut off, and cannot be finished: %s", folder, error)
    return contents


def _compare_copy(copy: Path, text: str, path: Path) -> None:
    try:
        if not copy.is_file():
            return
        with open(copy, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError:
        # Nothing depends on the copy.
        return
    if content.replace(b"\r\n", b"\n") != text.encode():
        logger.warning(
            "%s is not the config of the adapter beside it: it was changed, or a save was interrupted. What counts is "
            "the config in the header of %s. Save the adapter again to make both the same.",
            copy,
            path.name,
        )


class _OneFile:
    """The file that is the adapter."""

    def __init__(self, file: TensorFile):
        self.file = file

    def check(self, config: Config) -> None:
        """Compare the file's tensors with the config, without reading them. So no config claims more than there is."""
        dtypes = {name: {config.dtype} for name in config.trained_shapes()}
        for part in config.parts:
            # Updates have the dtype of the base or a wider one, and a head may have another dtype than its body.
            dtypes |= {name: {"float32", "float64"} for name in {**part.trained_shapes(), **part.buffer_shapes()}}
            if isinstance(part, ModulePart):
                dtypes |= {f"{part.name}.{name}": {dtype} for name, dtype in part.dtypes.items()}
        factors = config.saved_factor_shapes()
        dtypes |= {name: set(SAFETENSORS_DTYPES) for name in factors}
        self.file.check({**config.state_shapes(), **factors}, dtypes)

    def contents(self) -> dict[str, bytes]:
        return {TENSORS_FILE: self.file.content(), CONFIG_FILE: self.file.metadata[CONFIG_KEY].encode()}

    def read_state(self, config: Config) -> dict[str, torch.Tensor]:
        self.check(config)
        return self._read(config.state_shapes(), config.tensors_sha256)

    def read_factors(self, config: Config) -> dict[str, torch.Tensor]:
        self.check(config)
        return self._read(config.saved_factor_shapes(), config.factors_sha256)

    def _read(self, shapes: dict[str, tuple[int, ...]], sha256: str | None) -> dict[str, torch.Tensor]:
        tensors = self.file.read(shapes)
        if tensors_digest(tensors) != sha256:
            raise AdapterError(
                f"{self.file.path} is damaged: the SHA-256 of its tensors is not the one in its config. Take the file "
                "from where it came once more."
            )
        return tensors
