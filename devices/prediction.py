"""Predict the speed of a model on a device: a roofline, times the share of it that programs reach.

A decode step reads every weight and the cache once, and multiplies every weight once; the longer of
the two times bounds it. A prompt takes as many products for each token, but reads the weights once.
"""

from dataclasses import dataclass

from devices.catalogue import KnownDevice

#: Shares of the peak that programs reach. Decode: Llama 3.2 1B on a OnePlus 12 reads weights at
#: 0.46 (int4) and 0.62 (bf16) of the memory's peak by published figures, our 140M int4 program at
#: 0.46 of what this project's x86 server reads. Prefill: 0.42 of the products on that phone.
DECODE_SHARE, PREFILL_SHARE = 0.5, 0.4


@dataclass(frozen=True)
class Workload:
    """What one token costs in a model.

    `weight_bytes` are read in each step; `products` are the multiply-adds with weights.
    `cache_bytes` and `cache_products` are the same for each position of the cache, over all layers.
    `memory` is the predicted use in bytes.
    """

    weight_bytes: int
    products: int
    cache_bytes: int
    cache_products: int
    memory: int


@dataclass(frozen=True)
class Speed:
    """Predicted tokens/s after `depth` tokens; `…_at_most` is the roofline itself.

    `prefill` is None where the device's products/s are unknown. `fits` says whether the predicted
    memory is at most half of the device's, which an app can count on; None where that is unknown.
    """

    depth: int
    decode: float
    decode_at_most: float
    prefill: float | None
    prefill_at_most: float | None
    fits: bool | None


def predict_speed(
    workload: Workload,
    depth: int,
    bandwidth: float,
    products_per_second: float | None = None,
    memory: int | None = None,
) -> Speed:
    """The speed on a device of this bandwidth (bytes/s) and memory (bytes).

    Without `products_per_second` (int8 multiply-adds/s) only the bandwidth bounds decoding.
    """
    times = [(workload.weight_bytes + depth * workload.cache_bytes) / bandwidth]
    prefill = None
    if products_per_second is not None:
        times.append((workload.products + depth * workload.cache_products) / products_per_second)
        prefill = products_per_second / workload.products
    decode = 1 / max(times)
    return Speed(
        depth=depth,
        decode=DECODE_SHARE * decode,
        decode_at_most=decode,
        prefill=None if prefill is None else PREFILL_SHARE * prefill,
        prefill_at_most=prefill,
        fits=None if memory is None else 2 * workload.memory <= memory,
    )


def predict_on(workload: Workload, device: KnownDevice, depth: int) -> Speed:
    """The speed on a device of the catalogue, with the number of threads recommended for it."""
    return predict_speed(
        workload, depth, device.bandwidth, products_per_second(device), device.memory_bytes
    )


def products_per_second(device: KnownDevice) -> float:
    """int8 multiply-adds/s of as many of the fastest cores as threads are recommended."""
    left, total = device.threads, 0.0
    for cores in device.cores:
        used = min(left, cores.count)
        total += used * cores.hertz * cores.products_per_cycle
        left -= used
    return total
