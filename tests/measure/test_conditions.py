"""What a machine says of itself: read from a made-up /sys, and from a made-up machine while it is measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgevlm.cli.benchmark import benchmark_text
from edgevlm.measure.bundles import BundleBenchmark
from edgevlm.measure.conditions import (
    Conditions,
    Counter,
    Reading,
    conditions_of,
    energy_between,
    find_sensors,
    parse_throttled,
)
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Comparison
from edgevlm.report.facts import validity
from tests.measure.fakes import ENVIRONMENT, FakeMachine, noisy, subject
from tests.report.example import example_report


def tree(root: Path, files: dict[str, object]) -> Path:
    for path, content in files.items():
        (root / "sys" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys" / path).write_text(f"{content}\n")
    return root


CPU = "devices/system/cpu"
LAPTOP: dict[str, object] = {
    "class/thermal/thermal_zone0/type": "acpitz",
    "class/thermal/thermal_zone0/temp": 99000,
    "class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "class/thermal/thermal_zone1/temp": 61500,
    "class/thermal/cooling_device0/type": "Processor",
    "class/thermal/cooling_device0/cur_state": 0,
    "class/thermal/cooling_device1/type": "Fan",
    "class/thermal/cooling_device1/cur_state": 3,
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": 800000,
    f"{CPU}/cpu0/cpufreq/scaling_max_freq": 4200000,
    f"{CPU}/cpu1/cpufreq/scaling_cur_freq": 3900000,
    f"{CPU}/cpu1/cpufreq/scaling_max_freq": 4200000,
    f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 2,
    f"{CPU}/cpu0/thermal_throttle/package_throttle_count": 5,
    f"{CPU}/cpu1/thermal_throttle/core_throttle_count": 0,
    f"{CPU}/cpu1/thermal_throttle/package_throttle_count": 5,
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": 262_000_000_000,
    "class/powercap/intel-rapl:0/max_energy_range_uj": 262_143_328_850,
    "class/powercap/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0:0/energy_uj": 7,
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": 262_143_328_850,
    "class/powercap/intel-rapl:1/name": "psys",
    "class/powercap/intel-rapl:1/energy_uj": 9,
    "class/powercap/intel-rapl:1/max_energy_range_uj": 262_143_328_850,
}
JETSON: dict[str, object] = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": 48250,
    "class/thermal/thermal_zone1/type": "tj-thermal",
    "class/thermal/thermal_zone1/temp": 50125,
    "class/thermal/thermal_zone2/type": "PMIC-Die",
    "class/thermal/thermal_zone2/temp": 100000,
    "class/thermal/cooling_device0/type": "thermal-cpufreq-0",
    "class/thermal/cooling_device0/cur_state": 4,
    "class/hwmon/hwmon0/name": "ina3221",
    "class/hwmon/hwmon0/in1_label": "VDD_IN",
    "class/hwmon/hwmon0/in1_input": 5000,
    "class/hwmon/hwmon0/curr1_input": 1500,
    "class/hwmon/hwmon0/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon0/in2_input": 5000,
    "class/hwmon/hwmon0/curr2_input": 400,
}


def test_a_laptop_tells_temperature_clock_throttling_and_energy_of_its_packages(tmp_path: Path):
    reading = find_sensors(tree(tmp_path, LAPTOP), cpus=[0, 1]).look()
    assert reading.temperature_c == pytest.approx(61.5), "of the processor, not of the board"
    assert (reading.clock_mhz, reading.clock_limit_mhz) == (pytest.approx(3900), pytest.approx(4200))
    assert reading.n_throttled == 12
    assert reading.slowing == (), "a fan slows nothing down"
    assert reading.counters == (Counter(value_uj=262_000_000_000, range_uj=262_143_328_850),), "no part of it twice"
    assert reading.power_w is None


def test_a_jetson_tells_its_supply_and_that_it_is_slowed_down(tmp_path: Path):
    reading = find_sensors(tree(tmp_path, JETSON), cpus=[0]).look()
    assert reading.temperature_c == pytest.approx(50.125)
    assert (reading.power_w, reading.power_of) == (pytest.approx(7.5), "VDD_IN")
    assert reading.slowing == ("thermal-cpufreq-0",)
    assert reading.clock_mhz is None
    assert reading.counters == ()


def test_a_chip_that_tells_power_itself(tmp_path: Path):
    files = {"name": "ina226", "power1_input": 3_250_000, "in1_input": 1, "curr1_input": 1, "label": "5V_IN"}
    sensors = find_sensors(tree(tmp_path, {f"class/hwmon/hwmon2/{k}": v for k, v in files.items()}), cpus=[0])
    assert (sensors.look().power_w, sensors.power_of) == (pytest.approx(3.25), "5V_IN")


def test_rails_that_are_parts_are_not_taken_for_the_whole(tmp_path: Path):
    parts = {path: value for path, value in JETSON.items() if "1_" not in path.rpartition("/")[2]}
    parts |= {"class/hwmon/hwmon0/in3_label": "VDD_SOC", "class/hwmon/hwmon0/in3_input": 5000}
    parts |= {"class/hwmon/hwmon0/curr3_input": 100}
    assert find_sensors(tree(tmp_path, parts), cpus=[0]).look().power_w is None


@pytest.mark.parametrize("files", [{}, {"class/powercap/intel-rapl:0/name": "package-0"}, {f"{CPU}/cpu0/online": 1}])
def test_a_machine_that_tells_nothing(tmp_path: Path, files: dict[str, object]):
    reading = find_sensors(tree(tmp_path, files), cpus=[0]).look()
    assert reading == Reading(at_s=reading.at_s)
    assert conditions_of([[reading, reading]]) == Conditions()
    assert conditions_of([]) is None


def test_what_cannot_be_read_is_left_out(tmp_path: Path):
    unreadable = {"class/thermal/thermal_zone1/temp": "", f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "?"}
    root = tree(tmp_path, LAPTOP | unreadable)
    sensors = find_sensors(root, cpus=[0, 1])
    assert sensors.look().clock_mhz == pytest.approx(800)
    assert sensors.look().temperature_c == pytest.approx(99), "the only zone that can be read"
    (root / "sys/class/thermal/thermal_zone0/temp").unlink()
    assert sensors.look().temperature_c is None


def test_a_counter_that_began_anew_has_not_given_energy_back():
    def at(*values: int) -> list[Counter]:
        return [Counter(value_uj=value, range_uj=1_000_000) for value in values]

    assert energy_between(at(100_000), at(400_000)) == pytest.approx(0.3)
    assert energy_between(at(900_000), at(100_000)) == pytest.approx(0.2)
    assert energy_between(at(900_000, 0), at(100_000, 500_000)) == pytest.approx(0.7)
    assert energy_between(at(), at()) is None
    assert energy_between(at(1), at()) is None


def test_power_is_integrated_and_the_time_between_sittings_left_out():
    watts = ((0, 4.0), (1, 6.0), (3, 6.0)), ((100, 2.0), (101, 2.0))
    found = conditions_of([[Reading(at_s=t, power_w=w, power_of="VDD_IN") for t, w in sitting] for sitting in watts])
    assert found is not None
    assert found.energy_j == pytest.approx(5 + 12 + 2)
    assert found.power_w == pytest.approx(19 / 4)
    assert found.energy_of == "VDD_IN"


def test_the_clock_is_that_of_the_rounds():
    """The first reading of a sitting is of a machine that was idle."""
    mhz = ((600, 2400, 2300), (600, 2400, 2400))
    found = conditions_of([[Reading(at_s=i, clock_mhz=each) for i, each in enumerate(sitting)] for sitting in mhz])
    assert found is not None
    assert (found.clock_mhz, found.min_clock_mhz) == (2400, 2300)


def test_what_the_firmware_says():
    assert parse_throttled("throttled=0x50005\n") == 0x50005
    assert parse_throttled("throttled=0x0\n") == 0
    assert parse_throttled("VCHI initialization failed") is None


@pytest.mark.parametrize(
    ("first", "later", "words"),
    [
        ({"n_throttled": 7}, {"n_throttled": 9}, "counters rose by 2"),
        ({}, {"slowing": ("cpufreq-cpu0",)}, "(cpufreq-cpu0)"),
        ({"firmware": 0}, {"firmware": 0x4}, "firmware capped the clock"),
        ({"firmware": 0x50000}, {"firmware": 0xD0000}, "firmware capped the clock"),
        ({"clock_limit_mhz": 2400.0}, {"clock_limit_mhz": 1500.0}, "fell from 2400 to 1500 MHz"),
    ],
)
def test_every_sign_of_throttling_is_a_reason_against_the_measurement(first, later, words: str):
    def reading(now_s: float) -> Reading:
        return Reading(at_s=now_s, temperature_c=60 + now_s, **(later if now_s > 0.5 else first))

    found = measured(reading)
    (reason,) = found.reasons
    assert not found.is_valid
    assert words in reason
    assert "at up to 6" in reason
    assert found.conditions is not None
    assert found.conditions.throttling == reason


@pytest.mark.parametrize("steady", [{"n_throttled": 7}, {"firmware": 0x50000}, {"clock_limit_mhz": 1500.0}])
def test_what_happened_before_is_no_reason(steady):
    assert measured(lambda now_s: Reading(at_s=now_s, **steady)).is_valid


def measured(reading, **changes) -> Comparison:
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}), reading=reading, **changes)
    return compare(
        [subject("float"), subject("int8")], baseline="float", protocol=ALL_STAY, surroundings=machine.surroundings()
    )


def test_each_subject_has_the_energy_of_its_own_turns():
    """10 W for 3 runs of 10 and of 5 ms; the run that settles is counted as one more."""
    found = measured(None, has_energy=True)
    assert found.measurement("float").energy_j() == pytest.approx(10 * 0.030 / 4, rel=0.02)
    assert found.measurement("int8").energy_j() == pytest.approx(10 * 0.015 / 4, rel=0.02)
    assert measured(None).measurement("float").energy_j() is None


def test_the_benchmark_says_what_is_known_and_what_is_not():
    def lines(found: Comparison) -> list[str]:
        whole = BundleBenchmark(
            bundles=("float", "int8"), task="image-classification", comparisons={"model": found}, batches={},
            picture_size=(640, 480), environment=ENVIRONMENT,
        )  # fmt: skip
        return benchmark_text(whole).splitlines()

    told = lines(measured(lambda s: Reading(at_s=s, temperature_c=50 + s, clock_mhz=2400 - s), has_energy=True))
    assert "  mJ a run  " in told[0]
    assert told[4] == "temperature 50 to 51 °C, clock 2400 MHz (lowest 2399); not available: energy"

    def spending(now_s: float) -> Reading:
        return Reading(at_s=now_s, counters=(Counter(value_uj=round(now_s * 8e6), range_uj=10**9),))

    assert lines(measured(spending))[4].endswith(" J of processor package (8.0 W); not available: temperature, clock")
    assert lines(measured(lambda s: Reading(at_s=s)))[4] == "not available: temperature, clock, energy"


def test_the_report_says_what_is_known_and_leaves_out_what_is_not():
    def facts(conditions: Conditions | None) -> dict[str, str]:
        comparison = msgspec.structs.replace(measured(None), conditions=conditions)
        (found,) = validity(msgspec.structs.replace(example_report(), comparisons=(comparison,)))
        return dict(found.facts)

    told = Conditions(start_temperature_c=50.2, max_temperature_c=61.7, energy_j=12.0, power_w=3.0, energy_of="x")
    known = facts(told)
    assert known["Temperature"] == "50 to 62 °C"
    assert known["Energy"] == "12.0 J of x (3.0 W)"
    assert "Clock" not in known
    assert facts(None).keys() == known.keys() - {"Temperature", "Energy"}
