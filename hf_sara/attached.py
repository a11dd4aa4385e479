"""An adapter on a model that can be switched off, merged and removed."""

import contextlib
from collections.abc import Iterator

from .carrier import adapters_on, set_adapters
from .contents import AdapterContents, refuse_in_use, thaw
from .copies import refuse_spread
from .merging import MergedWeights


class AttachedUpdates(AdapterContents):
    """The contents of an adapter, and what can be done with them: switching off, merging and removing."""

    _merged: MergedWeights | None = None

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

    def _set_enabled(self, enabled: bool) -> None:
        refuse_spread(self.model, self.parts, self.name, enabled)
        if enabled:
            refuse_in_use(self.model, self.parts, self)
        for host, copy in self.copies():
            copy.switch(host, enabled)
        for _, delta in self.deltas():
            delta.enabled = enabled

    def _refuse_merged(self, action: str) -> None:
        if self.merged:
            raise ValueError(
                f"Cannot {action} the adapter {self.name!r}: it is merged into the weights. Unmerge first."
            )

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
        self._merged = MergedWeights(self.model, list(self.deltas()), self.copies())
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
        if others:
            next(reversed(others.values()))._unfrozen += self._unfrozen
        else:
            thaw(self.model, self._unfrozen)
