"""What a device tells of itself: a phone, a board, an emulator, and what cannot be right."""

import pytest

from devices import energy
from devices.catalogue import catalogue, core_name, find, known_device
from devices.errors import BadDeviceError, DeviceError
from devices.identity import Core, parse_identity, parse_meminfo
from devices.prediction import Workload, predict_on, predict_speed, products_per_second


def core(number: int, part: str) -> str:
    return f"processor\t: {number}\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\n" \
           f"CPU part\t: {part}\n\n"  # fmt: skip


PHONE = {
    "kernel": "Linux 5.15.110-android14 aarch64",
    "process": "sh",
    "cpuinfo": core(0, "0xd46") + core(1, "0xd46") + core(2, "0xd4d") + core(3, "0xd4e"),
    "meminfo": "MemTotal:        7768172 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n",
    "release": "",
    "getprop": "[ro.product.manufacturer]: [Google]\n[ro.product.model]: [Pixel 8]\n"
    "[ro.soc.model]: [Tensor G3]\n[ro.build.version.release]: [14]\n",
    "frequencies": "".join(
        f"/sys/devices/system/cpu/cpu{n}/cpufreq/cpuinfo_max_freq {khz}\n\n"
        for n, khz in enumerate((1704000, 1704000, 2367000, 2914000))
    ),
    "governors": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor sched_pixel\n\n",
    "usable": "Cpus_allowed_list:\t0-3\n",
    "thermal": "zone 41500 BIG\nzone 30100 battery\nzone -274000 broken\nzone 0 usb\n",
    "board": "\n",
}


def told(**changes: str) -> str:
    sections = PHONE | changes
    return "".join(f"@@{name}\n{text}\n" for name, text in sections.items()) + "@@end\n"


def test_an_android_phone_is_known_by_its_properties_and_its_cores() -> None:
    phone = parse_identity(told())
    assert (phone.name, phone.soc, phone.system) == ("Google Pixel 8", "Tensor G3", "Android 14")
    assert phone.cores == (
        Core("Cortex-X3", 1, 2914000),
        Core("Cortex-A715", 1, 2367000),
        Core("Cortex-A510", 2, 1704000),
    )
    assert phone.temperatures == {"BIG": 41.5, "battery": 30.1}
    assert (phone.kind, phone.governors) == ("real", ("sched_pixel",))
    assert "i8mm" in phone.features
    known = find(phone.name)
    assert known is not None and known.key == "pixel-8"


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"process": "/usr/libexec/qemu-binfmt/aarch64-binfmt-P"}, "emulated", "its shell is run"),
        ({"process": "/usr/bin/qemu-aarch64-static"}, "emulated", "qemu-aarch64-static"),
        ({"cpuinfo": "processor : 0\nvendor_id : AuthenticAMD\n"}, "emulated", "an x86 processor"),
        ({"getprop": "[ro.kernel.qemu]: [1]\n"}, "virtual", "ro.kernel.qemu is 1"),
        ({"getprop": "[ro.boot.qemu]: [1]\n"}, "virtual", "ro.boot.qemu"),
        ({"getprop": "[ro.hardware]: [ranchu]\n"}, "virtual", "ranchu"),
        ({"getprop": "[ro.hardware]: [cutf_cvm]\n"}, "virtual", "cutf_cvm"),
        ({"board": "QEMU\nKVM Virtual Machine\n"}, "virtual", "the board is"),
        ({"board": "linux,dummy-virt\n"}, "virtual", "dummy-virt"),
        ({"kernel": "Linux 6.1 x86_64", "cpuinfo": "processor : 0\nvendor_id : A\n"
          "flags : fpu hypervisor sse\n"}, "virtual", "a hypervisor"),
        ({"board": "Raspberry Pi 5 Model B Rev 1.0\n", "getprop": ""}, "real", ""),
    ],
)  # fmt: skip
def test_what_is_no_real_device_gives_itself_away(
    changes: dict[str, str], kind: str, reason: str
) -> None:
    identity = parse_identity(told(**changes))
    assert identity.kind == kind
    assert reason in identity.kind_reason


def test_a_board_is_known_by_its_device_tree() -> None:
    board = parse_identity(told(board="Raspberry Pi 5 Model B Rev 1.0\n", getprop=""))
    known = find(board.name)
    assert known is not None and known.key == "raspberry-pi-5"


def test_a_story_that_is_cut_off_is_not_believed() -> None:
    with pytest.raises(DeviceError, match="does not identify itself"):
        parse_identity(told().removesuffix("@@end\n"))
    with pytest.raises(DeviceError, match="has no MemTotal"):
        parse_meminfo("MemFree: 12 kB")


def test_carriage_returns_of_a_terminal_do_not_matter() -> None:
    assert parse_identity(told().replace("\n", "\r\n")) == parse_identity(told())


def test_a_core_that_is_not_known_keeps_its_numbers() -> None:
    assert core_name(0x41, 0xD0B) == "Cortex-A76"
    assert core_name(0x99, 0x1) == "implementer 0x99 part 0x1"


def test_the_catalogue_can_be_predicted_for_every_entry() -> None:
    work = Workload(70_000_000, 140_000_000, 23_000, 17_000, 200_000_000)
    for device in catalogue().values():
        assert 1 <= device.threads <= sum(cores.count for cores in device.cores), device.key
        empty, full = (predict_on(work, device, depth) for depth in (0, 2048))
        assert 0 < full.decode < empty.decode < empty.decode_at_most
        assert empty.prefill is not None and empty.prefill > empty.decode
        assert empty.fits


def test_a_device_that_is_not_in_the_catalogue_is_refused_with_those_that_are() -> None:
    assert find("Acme Phone 1") is None
    assert find("Google Pixel 8 Pro") is None
    with pytest.raises(BadDeviceError, match="Known: pixel-6, pixel-8"):
        known_device("pixel-99")


def test_memory_bounds_a_step_and_products_a_prompt() -> None:
    work = Workload(1_000_000, 2_000_000, 1_000, 1_000, 10_000_000)
    slow_memory = predict_speed(work, 1_000, 1e9, 1e12, 15_000_000)
    assert slow_memory.decode_at_most == pytest.approx(1e9 / 2_000_000)
    assert slow_memory.prefill_at_most == pytest.approx(1e12 / 2_000_000)
    assert slow_memory.fits is False
    slow_cores = predict_speed(work, 0, 1e15, 1e9)
    assert slow_cores.decode_at_most == pytest.approx(500)
    assert predict_speed(work, 0, 1e9).prefill is None


def test_a_core_without_dot_products_multiplies_less() -> None:
    old, new = known_device("raspberry-pi-4"), known_device("raspberry-pi-5")
    assert products_per_second(old) == 4 * 1.5e9 * 8
    assert products_per_second(new) == 4 * 2.4e9 * 32


RAPL, CORE = "powercap/intel-rapl:0/energy_uj", "powercap/intel-rapl:0:0/energy_uj"
CHARGE, VOLTS = "power_supply/battery/charge_counter", "power_supply/battery/voltage_now"
ENERGY = "power_supply/BAT0/energy_now"


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({RAPL: 10, CORE: 5}, {RAPL: 2_000_010, CORE: 999}, 2.0),
        ({CHARGE: 3_000_000, VOLTS: 4_000_000}, {CHARGE: 2_999_000, VOLTS: 4_000_000}, 14.4),
        ({ENERGY: 100}, {ENERGY: 90}, 0.036),
        ({CHARGE: 5, VOLTS: 4_000_000}, {CHARGE: 9, VOLTS: 4_000_000}, None),  # it is charging
        ({CHARGE: 9}, {CHARGE: 5}, None),  # at which voltage?
        ({RAPL: 9}, {RAPL: 3}, None),  # the counter began anew
        ({}, {}, None),
    ],
)
def test_energy_is_what_a_counter_moved_by(
    before: dict[str, int], after: dict[str, int], joules: float | None
) -> None:
    used = energy.used(
        {f"/sys/class/{name}": value for name, value in before.items()},
        {f"/sys/class/{name}": value for name, value in after.items()},
    )
    assert (used and used.joules) == (joules and pytest.approx(joules))


def test_counters_are_read_from_what_the_device_printed() -> None:
    text = "/sys/class/power_supply/battery/voltage_now 4012000\nnonsense\n/etc/passwd 3\n"
    assert energy.parse_counters(text) == {"/sys/class/power_supply/battery/voltage_now": 4012000}
