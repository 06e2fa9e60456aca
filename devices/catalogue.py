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
    """So many equal cores at up to so many Hz, each beginning so many int8 products a cycle."""

    count: int
    name: str
    hertz: float
    products_per_cycle: int


@dataclass(frozen=True)
class KnownDevice:
    """An entry of the catalogue. `bandwidth` is the memory's peak in bytes a second."""

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
    """Every known device by its key."""
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
    """An entry by its key. Raises BadDeviceError."""
    if key not in catalogue():
        raise BadDeviceError(key, "is not in the catalogue", f"Known: {', '.join(catalogue())}")
    return catalogue()[key]


def find(name: str) -> KnownDevice | None:
    """The entry of a device that calls itself so: the longest model name that `name` ends with
    or, for a board, begins with."""
    fitting = [
        (len(model), known)
        for known in catalogue().values()
        for model in known.match
        if name.endswith(f" {model}") or name == model or name.startswith(f"{model} ")
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def core_name(implementer: int, part: int) -> str:
    """A core's name from the two numbers in /proc/cpuinfo."""
    name = _content()["parts"].get(implementer, {}).get(part)
    return name or f"implementer {implementer:#x} part {part:#x}"
