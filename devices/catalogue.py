"""The catalogue of known devices: ``catalogue.yaml``."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from devices.errors import BadDeviceError


@dataclass(frozen=True)
class KnownCores:
    """A group of equal cores: their number, name, highest clock in Hz, and the int8 multiply-adds
    that each starts in a cycle."""

    count: int
    name: str
    hertz: float
    products_per_cycle: int


@dataclass(frozen=True)
class KnownDevice:
    """An entry of the catalogue.

    `match` holds the model names by which the device identifies itself. `bandwidth` is the peak of
    its memory in bytes/s, `threads` the recommended number of threads.
    """

    key: str
    name: str
    match: tuple[str, ...]
    soc: str
    memory_bytes: int
    bandwidth: float
    cores: tuple[KnownCores, ...]
    threads: int


@functools.cache
def _content() -> Mapping[str, Any]:
    text = Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


@functools.cache
def catalogue() -> Mapping[str, KnownDevice]:
    """All known devices, by key."""
    products = _content()["int8_products_per_cycle"]
    return {
        key: KnownDevice(
            key=key,
            name=entry["name"],
            match=tuple(entry["match"]),
            soc=entry["soc"],
            memory_bytes=int(entry["memory_gb"] * 1e9),
            bandwidth=entry["bandwidth_gbps"] * 1e9,
            cores=tuple(
                KnownCores(count, name, ghz * 1e9, products[name])
                for count, name, ghz in entry["cores"]
            ),
            threads=entry["threads"],
        )
        for key, entry in _content()["devices"].items()
    }


def known_device(key: str) -> KnownDevice:
    """The entry with this key. Raises BadDeviceError where there is none."""
    if key not in catalogue():
        raise BadDeviceError(key, "is not in the catalogue", f"Known: {', '.join(catalogue())}")
    return catalogue()[key]


def find(name: str) -> KnownDevice | None:
    """The entry of the device whose own name is `name`, or None.

    Of the model names that `name` ends with or, for a board, begins with, the longest decides.
    """
    matching = [
        (len(model), known)
        for known in catalogue().values()
        for model in known.match
        if name.endswith(f" {model}") or name == model or name.startswith(f"{model} ")
    ]
    return max(matching, key=lambda pair: pair[0])[1] if matching else None


def core_name(implementer: int, part: int) -> str:
    """The name of a core whose `CPU implementer` and `CPU part` in /proc/cpuinfo are these."""
    name = _content()["parts"].get(implementer, {}).get(part)
    return name or f"implementer {implementer:#x} part {part:#x}"
