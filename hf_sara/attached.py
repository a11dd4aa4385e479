"""An adapter on a model that can be switched off, merged and removed."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .carrier import adapters_on, set_adapters
from .contents import AdapterContents, hold_base, refuse_in_use
from .copies import refuse_spread
from .freezing import thaw_base
from .frozen_buffers import hold_buffers
from .merging import MergedWeights
from .parts import ModulePart
from .sites import PlannedSite

logger = logging.getLogger(__name__)


class AttachedUpdates(AdapterContents):
    """The contents of an adapter, and what can be done with them: switching off, merging and removing."""

    _merged: MergedWeights | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._told: set[str] = set()

    # ---- switching ----

    def enable(self) -> None:
        """Switch the updates on."""
        self._refuse_merged("enable")
        self._set_enabled(True)

    def disable(self) -> None:
        """Switch the updates off. The model then computes exactly what the base computes."""
        self._refuse_merged("disable")
        self._set_enabled(False)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the updates off within a `with` block."""
        deltas = {site.name: delta.enabled for site, delta in self.deltas()}
        copies = [copy.is_enabled() for _, copy in self.copies()]
        self.disable()
        try:
            yield
        finally:
            if any(copies):
                refuse_in_use(self.model, self.parts, self)
            for site, delta in self.deltas():
                delta.enabled = deltas[site.name]
            for (host, copy), enabled in zip(self.copies(), copies, strict=True):
                copy.switch(host, enabled)
            self._hold_buffers()

    def _set_enabled(self, enabled: bool) -> None:
        refuse_spread(self.model, self.parts, self.name, enabled)
        if enabled:
            refuse_in_use(self.model, self.parts, self)
        for host, copy in self.copies():
            copy.switch(host, enabled)
        for _, delta in self.deltas():
            delta.enabled = enabled
        self._hold_buffers()

    def _hold_buffers(self) -> None:
        """Hold the buffers of a base whose modules are in use now, after the trained copies were switched."""
        if any(isinstance(part, ModulePart) for part in self.parts):
            hold_buffers(self.model)

    def _refuse_merged(self, action: str) -> None:
        if self.merged:
            raise ValueError(
                f"Cannot {action} the adapter {self.name!r}: it is merged into the weights. Unmerge first."
            )

    # ---- updates that did not train ----

    def untrained_sites(
        self, state: Mapping[str, torch.Tensor] | None = None, by_use: bool = False
    ) -> list[PlannedSite]:
        """
        The sites whose updates learned nothing and took no part, although others did: those of experts that got no
        token, or of a cross-attention without an encoder. Their tensors are still those of their random start.

        Args:
            state (`Mapping[str, torch.Tensor]`, *optional*): See [`SaraAdapter.changed`].
            by_use (`bool`, *optional*, defaults to `False`): Whether an unused update counts although its tensors
                changed. DeepSpeed decays also the weights that have no gradient.
        """
        unused = [site for site, delta in self.deltas() if not delta.usage.learning]
        if by_use:
            return unused if self._usage.learning else []
        changed = self.changed(state)
        names = {site.name: [f"{site.name}.{name}" for name in self.delta(site).trained()] for site in unused}
        return [site for site in unused if changed and changed.isdisjoint(names[site.name])]

    def idle_sites(self) -> list[PlannedSite]:
        """
        The untrained sites, or of an adapter that has not trained at all the sites whose modules were never called,
        although others were. What the model computes with such a weight does not depend on the update.
        """
        if not self.is_untrained():
            return self.untrained_sites()
        idle = [site for site, delta in self.deltas() if not delta.usage.called]
        return idle if len(idle) < len(self.sites) else []

    def rest(self, sites: Sequence[PlannedSite]) -> None:
        """
        Let the updates of sites add nothing. SARA's random start would change what the base computes there, and the
        training has not made it any better.
        """
        for site in sites:
            self.delta(site).rest()

    def warn_of_idle(self, sites: Sequence[PlannedSite]) -> None:
        """Say once that the updates of sites add nothing."""
        self._tell(
            [site.name for site in sites],
            "The model did not use the modules of %d sites while the adapter trained, so their updates add nothing: "
            "%s. If it never will, leave them out with exclude_modules.",
        )

    def warn_of_unmoved(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Say once which tensors took part in a training, and have the bits of their start all the same."""
        changed = self.changed(state)
        unused = {f"{site.name}.{name}" for site in self.untrained_sites(state) for name in self.delta(site).trained()}
        self._tell(
            [name for name in self.trained() if changed and name not in changed and name not in unused],
            "%d trained tensors did not change in the training, so no gradient reaches them: %s.",
        )

    def _tell(self, names: Sequence[str], text: str) -> None:
        news = [name for name in names if name not in self._told]
        self._told.update(news)
        if news:
            logger.warning(text, len(news), ", ".join(news[:5]) + (" ..." if len(news) > 5 else ""))

    # ---- merging ----

    @property
    def merged(self) -> bool:
        """Whether the updates are part of the base weights now."""
        return self._merged is not None

    def merge(self) -> None:
        """
        Add the updates to the base weights, and write the parts over the base's. The sums are computed in float32 and
        rounded once to the weights' dtype. The weights' own bits are kept, so that [`SaraAdapter.unmerge`] can restore
        them.

        Raises:
            `ValueError`: For Mo-SARA with more than one head (its update depends on the token), weights that are
                quantized or tied to another module's, or a sum that the dtype cannot hold. The weights are then
                left as they were.
        """
        self._refuse_merged("merge")
        self.spec.method.refuse_merge()
        refuse_in_use(self.model, self.parts, self)
        refuse_spread(self.model, self.parts, self.name, False)
        idle = self.idle_sites()
        self._merged = MergedWeights(self.model, [d for d in self.deltas() if d[0] not in idle], self.copies())
        self.warn_of_idle(idle)
        self._set_enabled(False)

    def unmerge(self) -> None:
        """Restore the exact bits that the base weights had before [`SaraAdapter.merge`]."""
        if self._merged is None:
            raise ValueError(f"The adapter {self.name!r} is not merged.")
        order = self._merged.order
        later = [a.name for a in adapters_on(self.model).values() if a._merged and a._merged.order > order]
        if later:
            raise ValueError(f"Unmerge {later} first: they were merged after {self.name!r}, on top of it.")
        refuse_in_use(self.model, self.parts, self)
        self._merged.restore(self.copies())
        self._merged = None
        self._set_enabled(True)

    def detach(self, keep_merged: bool = False) -> None:
        """
        Remove the adapter from the model, with its modules, its hooks and its attributes. After the last adapter is
        removed, the parameters that were trainable before are trainable again.

        Args:
            keep_merged (`bool`, *optional*, defaults to `False`):
                Whether the updates of a merged adapter stay in the weights for good. By default, a merged adapter is
                unmerged first.
        """
        if self.merged and not keep_merged:
            self.unmerge()
        refuse_spread(self.model, self.parts, self.name, False)
        self._remove()
        others = {name: other for name, other in adapters_on(self.model).items() if other is not self}
        set_adapters(self.model, others)
        hold_base(self.model)
        thaw_base(self.model)
