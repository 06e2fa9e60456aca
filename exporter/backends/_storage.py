"""Refuse the schemes that a format cannot store, naming the weight and the alternatives."""

from collections.abc import Callable, Collection, Mapping

from exporter.errors import InputError
from exporter.model.config import ModelConfig
from exporter.quantization.schemes import Scheme, every_scheme

#: ``stores(name, scheme, shape)``: the reason why a format cannot store a weight of this name and
#: shape in this scheme, or None if it can.
Stores = Callable[[str, Scheme, tuple[int, ...]], str | None]


def check_stored(config: ModelConfig, schemes: Mapping[str, Scheme], stores: Stores) -> None:
    """Raise InputError for the first weight that the format cannot store in its scheme.

    The message lists the schemes in which the format can store this weight.
    """
    for name, shape in config.parameter_shapes().items():
        problem = stores(name, schemes[name], shape)
        if problem:
            stored = [
                scheme
                for scheme in every_scheme()
                if not scheme.problem_with(shape) and not stores(name, scheme, shape)
            ]
            stored.sort(key=lambda scheme: scheme.bits != schemes[name].bits)  # same bits first
            choice = " or ".join(map(str, stored))
            raise InputError(f"{name}: {schemes[name]}", problem, f"Use {choice} for it")


def wrong_bits(scheme: Scheme, known: Collection[int]) -> str | None:
    """The reason why a format whose codes have `known` bits cannot store the scheme, or None."""
    if scheme.bits is None or scheme.bits in known:
        return None
    return f"codes have {' or '.join(map(str, known))} bits in this format, not {scheme.bits}"
