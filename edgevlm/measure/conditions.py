"""What the machine says of itself while it is measured: temperature, clock, throttling and energy. Linux tells some.

Every figure is optional: a virtual machine tells nothing, and Linux lets only root read the energy counters of x86
(since CVE-2020-8694). Functions take the root of the file tree, so that a test can bring its own.

Sources: Linux, Documentation/ABI/testing/sysfs-class-thermal, sysfs-class-powercap, sysfs-devices-system-cpu,
Documentation/admin-guide/pm/cpufreq.rst, Documentation/hwmon/sysfs-interface.rst, hwmon/ina3221.rst; Raspberry Pi,
``vcgencmd get_throttled``.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.runtime.spec import Spec

# Where a system has zones for the processor, the others (battery, radio, power supply) are not asked.
_PROCESSOR_ZONE = re.compile("cpu|x86_pkg|soc|core|tj", re.IGNORECASE)
_PROCESSOR_CHIPS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal"})
# The kernel's ways of slowing a processor down because it is hot; a fan is another kind of cooling device.
_SLOWING = re.compile("cpufreq|^Processor$|cpu-throttle")
_INPUT_RAIL = re.compile("^(VDD_IN|POM_5V_IN|VIN_SYS_5V0|5V_IN|total)$", re.IGNORECASE)

# Asking for one core's clock makes some kernels interrupt it: a few cores tell as much as all.
_MAX_CLOCKS = 16
# The firmware of a Raspberry Pi is asked through a program of its own, which takes some milliseconds.
_FIRMWARE_EVERY_S = 2.0
# get_throttled: bits 1 to 3 say that the clock is capped, throttled, or at the soft temperature limit now, bits 17 to
# 19 that it was so since boot.
_FIRMWARE_NOW, _FIRMWARE_SINCE_BOOT = 0b1110, 0b1110 << 16


class Conditions(Spec, frozen=True, kw_only=True):
    """What the machine said while turns were taken; null where it does not tell.

    Args:
        start_temperature_c: of the hottest part of the processor, as ``max_temperature_c``.
        clock_mhz: of the fastest core, the median over the rounds; ``min_clock_mhz`` is the lowest.
        n_throttled: how often the processor throttled itself meanwhile, summed over its counters.
        energy_j: what ``energy_of`` took, everything else that runs on it included.
        energy_of: ``processor package``, or the name of the supply rail.
        power_w: its mean.
        throttling: why the times are not to be trusted, a sentence; null where nothing was throttled or nobody tells.
    """

    start_temperature_c: float | None = None
    max_temperature_c: float | None = None
    clock_mhz: float | None = None
    min_clock_mhz: float | None = None
    n_throttled: int | None = None
    energy_j: float | None = None
    energy_of: str = ""
    power_w: float | None = None
    throttling: str | None = None

    def to_texts(self) -> dict[str, str | None]:
        """``temperature``, ``clock`` and ``energy`` for people; None for what the machine does not tell."""
        return {"temperature": self._temperature(), "clock": self._clock(), "energy": self._energy()}

    def _temperature(self) -> str | None:
        if self.start_temperature_c is None or self.max_temperature_c is None:
            return None
        return f"{self.start_temperature_c:.0f} to {self.max_temperature_c:.0f} °C"

    def _clock(self) -> str | None:
        if self.clock_mhz is None or self.min_clock_mhz is None:
            return None
        lowest = f" (lowest {self.min_clock_mhz:.0f})" if self.min_clock_mhz < self.clock_mhz else ""
        return f"{self.clock_mhz:.0f} MHz{lowest}"

    def _energy(self) -> str | None:
        if self.energy_j is None or self.power_w is None:
            return None
        return f"{self.energy_j:.1f} J of {self.energy_of} ({self.power_w:.1f} W)"


class Counter(Spec, frozen=True, kw_only=True):
    """Energy in microjoules since some time; after ``range_uj`` it begins anew."""

    value_uj: int
    range_uj: int


class Reading(Spec, frozen=True, kw_only=True):
    """The machine at one moment.

    Args:
        clock_limit_mhz: the highest clock that every core may take now.
        slowing: the kernel's cooling devices that slow the processor down now, by name.
        firmware: the bits of a Raspberry Pi.
        power_w: at this moment, of the rail ``power_of``.
    """

    at_s: float
    temperature_c: float | None = None
    clock_mhz: float | None = None
    clock_limit_mhz: float | None = None
    n_throttled: int | None = None
    slowing: tuple[str, ...] = ()
    firmware: int | None = None
    counters: tuple[Counter, ...] = ()
    power_w: float | None = None
    power_of: str = ""


def energy_between(before: Sequence[Counter], after: Sequence[Counter]) -> float | None:
    """Joules between two readings of the same counters, over at most one wrap-around; null where there are none."""
    if not before or len(before) != len(after):
        return None
    spent_uj = 0
    for early, late in zip(before, after, strict=True):
        spent_uj += late.value_uj - early.value_uj + (late.range_uj if late.value_uj < early.value_uj else 0)
    return spent_uj / 1e6


def conditions_of(sittings: Iterable[Sequence[Reading]]) -> Conditions | None:
    """What the readings come to; between two sittings nothing is measured. None where there is no reading."""
    sittings = [sitting for sitting in sittings if sitting]
    readings = [reading for sitting in sittings for reading in sitting]
    if not readings:
        return None
    temperatures = [reading.temperature_c for reading in readings if reading.temperature_c is not None]
    # The first reading of a sitting is of a machine that has only opened its graphs.
    worked = [reading for sitting in sittings for reading in sitting[1:]]
    clocks = sorted(reading.clock_mhz for reading in worked if reading.clock_mhz is not None)
    counts = [reading.n_throttled for reading in readings if reading.n_throttled is not None]
    energy_j, energy_of, wall_s = _energy(sittings)
    return Conditions(
        start_temperature_c=temperatures[0] if temperatures else None,
        max_temperature_c=max(temperatures, default=None),
        clock_mhz=clocks[len(clocks) // 2] if clocks else None,
        min_clock_mhz=clocks[0] if clocks else None,
        n_throttled=counts[-1] - counts[0] if counts else None,
        energy_j=energy_j,
        energy_of=energy_of,
        power_w=energy_j / wall_s if energy_j is not None and wall_s else None,
        throttling=_throttling(readings),
    )


def _energy(sittings: Sequence[Sequence[Reading]]) -> tuple[float | None, str, float]:
    """Joules, of what, and over how many seconds: by counters, else power integrated by the trapezoidal rule."""
    pairs = [pair for sitting in sittings for pair in itertools.pairwise(sitting)]
    wall_s = sum(late.at_s - early.at_s for early, late in pairs)
    counted = [energy_between(early.counters, late.counters) for early, late in pairs]
    known = [joules for joules in counted if joules is not None]
    if known and len(known) == len(counted):
        return sum(known), "processor package", wall_s
    if pairs and all(early.power_w is not None and late.power_w is not None for early, late in pairs):
        joules = sum(
            ((early.power_w or 0.0) + (late.power_w or 0.0)) / 2 * (late.at_s - early.at_s) for early, late in pairs
        )
        return joules, pairs[0][0].power_of, wall_s
    return None, "", wall_s


def _throttling(readings: Sequence[Reading]) -> str | None:
    """The first sign that the clock was cut, as a sentence."""
    first = readings[0]
    hottest = max((r.temperature_c for r in readings if r.temperature_c is not None), default=None)
    heat = "" if hottest is None else f" at up to {hottest:.0f} °C"
    counts = [reading.n_throttled for reading in readings if reading.n_throttled is not None]
    if counts and counts[-1] > counts[0]:
        n = counts[-1] - counts[0]
        return f"The processor throttled itself while it was measured{heat}: its counters rose by {n}."
    if slowing := sorted({name for reading in readings for name in reading.slowing}):
        return f"The kernel slowed the processor down while it was measured{heat} ({', '.join(slowing)})."
    firmware = [reading.firmware for reading in readings if reading.firmware is not None]
    if any(bits & _FIRMWARE_NOW or (bits & ~firmware[0]) & _FIRMWARE_SINCE_BOOT for bits in firmware):
        return f"The firmware capped the clock while it was measured{heat}: too hot, or too weak a power supply."
    limits = [reading.clock_limit_mhz for reading in readings if reading.clock_limit_mhz is not None]
    if first.clock_limit_mhz is not None and min(limits) < first.clock_limit_mhz:
        return f"The highest clock allowed fell from {first.clock_limit_mhz:.0f} to {min(limits):.0f} MHz{heat}."
    return None


# --- sensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """Where this machine tells what, looked for once."""

    temperatures: tuple[Path, ...]
    clocks: tuple[Path, ...]
    clock_limits: tuple[Path, ...]
    throttle_counts: tuple[Path, ...]
    slowing: tuple[tuple[str, Path], ...]
    counters: tuple[tuple[Path, int], ...]
    power: Callable[[], float | None]
    power_of: str
    firmware: Callable[[], int | None]

    def look(self) -> Reading:
        temperatures = [c for file in self.temperatures if (c := _scaled(file, 1e-3)) is not None]
        clocks = [mhz for file in self.clocks if (mhz := _scaled(file, 1e-3)) is not None]
        limits = [mhz for file in self.clock_limits if (mhz := _scaled(file, 1e-3)) is not None]
        counts = [n for file in self.throttle_counts if (n := _number(file)) is not None]
        return Reading(
            at_s=time.monotonic(),
            temperature_c=max(temperatures, default=None),
            clock_mhz=max(clocks, default=None),
            clock_limit_mhz=min(limits, default=None),
            n_throttled=sum(counts) if counts else None,
            slowing=tuple(name for name, file in self.slowing if (_number(file) or 0) > 0),
            firmware=self.firmware(),
            counters=self.read_counters(),
            power_w=self.power(),
            power_of=self.power_of,
        )

    def read_counters(self) -> tuple[Counter, ...]:
        values = [(_number(file), range_uj) for file, range_uj in self.counters]
        return tuple(Counter(value_uj=v, range_uj=range_uj) for v, range_uj in values if v is not None)


@functools.lru_cache(maxsize=1)
def _sensors_here() -> Sensors:
    return find_sensors(Path("/"), cpus=_own_cpus(), firmware=_firmware_here())


def look_here() -> Reading:
    """This machine now."""
    return _sensors_here().look()


def read_counters_here() -> tuple[Counter, ...]:
    """This machine's energy counters now; empty where there are none for us."""
    return _sensors_here().read_counters()


def find_sensors(root: Path, *, cpus: Sequence[int], firmware: Callable[[], int | None] | None = None) -> Sensors:
    """The sensors of the machine whose file system is at ``root``; only what can be read is taken.

    Args: cpus: the processors that are measured on.
    """
    cores = [root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in cpus[:_MAX_CLOCKS]]
    power, power_of = _power(root)
    return Sensors(
        temperatures=_temperatures(root),
        clocks=_readable(core / "cpufreq/scaling_cur_freq" for core in cores),
        clock_limits=_readable(core / "cpufreq/scaling_max_freq" for core in cores),
        throttle_counts=_readable(
            core / f"thermal_throttle/{what}_throttle_count" for core in cores for what in ("core", "package")
        ),
        slowing=_slowing(root),
        counters=_counters(root),
        power=power,
        power_of=power_of,
        firmware=firmware or (lambda: None),
    )


def _temperatures(root: Path) -> tuple[Path, ...]:
    zones = _readable(_sorted(root / "sys/class/thermal", "thermal_zone*/temp"))
    of_processor = tuple(zone for zone in zones if _PROCESSOR_ZONE.search(_text(zone.with_name("type"))))
    chips = [chip for chip in _sorted(root / "sys/class/hwmon", "hwmon*") if _text(chip / "name") in _PROCESSOR_CHIPS]
    on_chips = _readable(file for chip in chips for file in _sorted(chip, "temp*_input"))
    return of_processor or on_chips or zones


def _slowing(root: Path) -> tuple[tuple[str, Path], ...]:
    found = []
    for file in _readable(_sorted(root / "sys/class/thermal", "cooling_device*/cur_state")):
        if _SLOWING.search(name := _text(file.with_name("type"))):
            found.append((name, file))
    return tuple(found)


def _counters(root: Path) -> tuple[tuple[Path, int], ...]:
    """The packages' counters; their parts (intel-rapl:0:0) and what holds them (psys) would count twice."""
    found = []
    for file in _readable(_sorted(root / "sys/class/powercap", "intel-rapl:*/energy_uj")):
        is_package = file.parent.name.count(":") == 1 and _text(file.with_name("name")).startswith("package")
        range_uj = _number(file.with_name("max_energy_range_uj"))
        if is_package and range_uj:
            found.append((file, range_uj))
    return tuple(found)


def _power(root: Path) -> tuple[Callable[[], float | None], str]:
    """The power of the board's supply where an INA sensor measures it (Jetson: VDD_IN), else of a sensor's one rail."""
    rails: dict[str, Callable[[], float | None]] = {}
    for chip in _sorted(root / "sys/class/hwmon", "hwmon*"):
        if _text(chip / "name").startswith("ina"):
            rails |= _rails(chip)
    main = next((name for name in rails if _INPUT_RAIL.match(name)), None)
    name = main or (next(iter(rails)) if len(rails) == 1 else None)
    return (rails[name], name) if name is not None else (lambda: None, "")


def _rails(chip: Path) -> dict[str, Callable[[], float | None]]:
    """Rail -> its power in watts: as the chip tells it, or voltage × current of each channel."""
    if _number(power := chip / "power1_input") is not None:
        name = _text(chip / "power1_label") or _text(chip / "label") or _text(chip / "name")
        return {name: lambda: _scaled(power, 1e-6)}
    rails: dict[str, Callable[[], float | None]] = {}
    for current in _readable(_sorted(chip, "curr*_input")):
        number = current.name.removeprefix("curr").removesuffix("_input")
        voltage, label = chip / f"in{number}_input", _text(chip / f"in{number}_label")
        if label and _number(voltage) is not None:
            rails[label] = functools.partial(_product, voltage, current)
    return rails


def _product(voltage: Path, current: Path) -> float | None:
    mv, ma = _number(voltage), _number(current)
    return None if mv is None or ma is None else mv * ma / 1e6


def _firmware_here() -> Callable[[], int | None]:
    program = shutil.which("vcgencmd")
    if program is None:
        return lambda: None
    last: tuple[float, int | None] = (-_FIRMWARE_EVERY_S, None)

    def ask() -> int | None:
        nonlocal last
        now_s = time.monotonic()
        if now_s - last[0] >= _FIRMWARE_EVERY_S:
            last = (now_s, _ask_firmware(program))
        return last[1]

    return ask


def _ask_firmware(program: str) -> int | None:
    try:
        told = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_throttled(told)


def parse_throttled(told: str) -> int | None:
    """
    Example:
        >>> parse_throttled("throttled=0x50005")
        327685
    """
    found = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)\s*", told)
    return int(found[1], 16) if found else None


def _own_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def _readable(files: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(file for file in files if _number(file) is not None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def _scaled(file: Path, factor: float) -> float | None:
    number = _number(file)
    return None if number is None else number * factor
