"""The methods by name. A new method needs a file in this folder and a line in `METHODS`."""

from .base import Delta, Measured, Method, Options, deltas_of
from .mo_sara import MoSara
from .sara import Sara

METHODS: dict[str, type[Method]] = {method.name: method for method in (Sara, MoSara)}

__all__ = ["METHODS", "Delta", "Measured", "Method", "Options", "deltas_of"]
