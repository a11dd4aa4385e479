"""
Seeds, which identify frozen factors that are not stored. The factors are computed again from the base weight when an
adapter is loaded, and the seed tells whether they are the same.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .errors import AdapterError
from .factors import Factors, find_factors, sketch, sketches_agree
from .files import check_digest
from .sites import PlannedSite, Site
from .spectrum import weight_digest
from .tensor_files import SAFETENSORS_DTYPES

# The fields of a seed in an adapter's config, and the types of their values.
SEED_FIELDS = {"dtype": str, "sha256": str, "sketch": str, "clusters": list[list[int]]}


@dataclass(frozen=True)
class Seed:
    """
    The facts that identify the frozen factors of a site.

    Args:
        dtype (`str`): Dtype of the weight that the factors were computed from.
        sha256 (`str`): Digest of the weight's values, see [`~hf_sara.spectrum.weight_digest`].
        sketch (`torch.Tensor` of shape `(8,)`, *optional*): Summary of U and Vh, see [`~hf_sara.factors.sketch`].
        clusters (`tuple[tuple[int, int], ...]`, *optional*): Ranges of vectors that share one singular value.
    """

    dtype: str
    sha256: str
    sketch: torch.Tensor | None = None
    clusters: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_weight(cls, weight: torch.Tensor, digest: str | None = None) -> "Seed":
        """The part of a seed that follows from a weight alone. The caller may have its digest already."""
        return cls(str(weight.dtype).removeprefix("torch."), digest or weight_digest(weight))

    def with_factors(self, factors: Factors) -> "Seed":
        """The whole seed, once the factors are computed."""
        return replace(self, sketch=sketch(factors), clusters=tuple(factors.clusters))

    def to_json(self) -> dict[str, Any]:
        """The seed's fields in the record of its site."""
        if self.sketch is None:
            raise ValueError("A seed without a sketch cannot be saved: its factors were never computed.")
        packed = base64.b64encode(self.sketch.numpy().astype("<f4").tobytes()).decode()
        record = {"dtype": self.dtype, "sha256": self.sha256, "sketch": packed}
        return {**record, "clusters": self.clusters} if self.clusters else record

    @classmethod
    def from_json(cls, record: Mapping[str, Any], site: Site) -> "Seed":
        """Read the seed in a site's record. The types of the record's fields must have been checked before."""
        if record["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{site.name}: a weight cannot have the dtype {record['dtype']!r}")
        check_digest(f"{site.name}: its sha256", record["sha256"])
        packed = record["sketch"]
        if not re.fullmatch(r"[A-Za-z0-9+/]{43}=", packed):
            raise ValueError(f"{site.name}: its sketch {packed!r} is not 32 bytes in base64")
        numbers = np.frombuffer(base64.b64decode(packed), dtype="<f4")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{site.name}: its sketch has NaN or infinite values")
        clusters: list[tuple[int, int]] = []
        end = 0
        for cluster in record.get("clusters", []):
            if len(cluster) != 2 or not end <= cluster[0] < cluster[1] - 1 < min(site.shape):
                raise ValueError(f"{site.name}: its clusters {record['clusters']} are not ranges of its vectors")
            clusters.append((cluster[0], cluster[1]))
            end = cluster[1]
        return cls(record["dtype"], record["sha256"], torch.from_numpy(numbers.copy()), tuple(clusters))


def recompute(seed: Seed, site: PlannedSite, weight: torch.Tensor, base: str) -> Factors:
    """
    The frozen factors of a site that a seed identifies.

    Args:
        seed ([`Seed`]): The seed.
        site ([`PlannedSite`]): The site.
        weight (`torch.Tensor` of shape `(d_in, d_out)`): Its weight.
        base (`str`): The name of the base of the training, for error messages.

    Raises:
        [`AdapterError`]: If the weight is another one, or its singular vectors cannot be told apart.
    """
    here = Seed.of_weight(weight)
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
            f"differs). Load the base of the training ({base}), with its weights unchanged, {remedy}."
        )

    def find(use_cache: bool) -> Factors:
        return find_factors(
            weight, k=site.k, clusters=seed.clusters, site=site.name, digest=here.sha256, use_cache=use_cache
        )

    factors = find(use_cache=True)
    if seed.sketch is not None and not sketches_agree(sketch(factors), seed.sketch, site.k):
        # The cache may be to blame.
        factors = find(use_cache=False)
    if seed.sketch is None or not sketches_agree(sketch(factors), seed.sketch, site.k):
        raise AdapterError(
            f"{site.name}: the singular vectors computed here are not those of the training, although the weight "
            f"is the same: they are too close to one another to be told apart. Save the adapter again, where it "
            "was trained, with factors='save'."
        )
    return factors
