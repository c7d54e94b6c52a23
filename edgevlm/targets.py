"""The verbs of `edgevlm targets`: list, show, detect, validate."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec

from edgevlm.errors import EdgeVLMError, StoreError, UsageError
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.machine import describe_machine
from edgevlm.target import Target, host_target, load_target, read_target, target_names, target_text

__all__ = ["detect", "list", "show", "validate"]


def list() -> tuple[Target, ...]:
    """The built-in targets, as they are written."""
    return tuple(read_target(name) for name in target_names())


def show(name_or_path: str) -> Target:
    """A target with the host's facts filled in."""
    return load_target(name_or_path)


def detect(output: Path | None = None, *, is_measured: bool = True) -> Target:
    """This machine as a target; written to ``output`` (a ``.toml`` that does not exist yet) where one is given.

    Args:   is_measured: also measure the best rates that its backends reach, which takes some seconds for each.
    Raises: UsageError: the path is not a new TOML file. StoreError: it cannot be written.
    """
    if output is not None:
        if output.suffix != ".toml":
            raise UsageError(f"'{output}' is no name for a target file.", hint=f"Call it {output.stem}.toml.")
        if output.exists():
            raise UsageError(f"'{output}' exists already.", hint="Choose another name, or remove it first.")
    machine = describe_machine()
    name = output.stem if output else "detected"
    target = host_target(machine, name=name, description=f"{machine.name}, detected by edgevlm")
    if is_measured:
        target = with_peaks(target)
    if output is not None:
        try:
            output.write_text(target_text(target), encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"'{output}' cannot be written: {error.strerror}.", hint="Choose another folder."
            ) from error
    return target


def with_peaks(target: Target) -> Target:
    """The target with the best rates that its backends reach on this machine with all cores; the fastest counts.

    Where they cannot be measured, ``sources`` says why.
    """
    from edgevlm.measure.peak import measure_peak

    if importlib.util.find_spec("onnx") is None:
        return _sourced(target, "not measured: the probes need onnx (pip install 'edgevlm[compile]')")
    best: dict[str, tuple[float, str]] = {}
    for name in target.backends:
        if load_backend(name).version() is None:
            continue
        try:
            peak = measure_peak(backend=name)
        except EdgeVLMError as error:
            return _sourced(target, f"not measured: {error.message}")
        where = f"{name} {peak.version}, {peak.n_threads} threads"
        busy = "" if peak.is_valid else " (others took processor time meanwhile: too low rather than too high)"
        found = {
            f"{rate.precision}_gmac_per_s": (rate.gmac_per_s, f"{where}, {rate.probe}{busy}") for rate in peak.rates
        }
        found["bandwidth_gb_per_s"] = (peak.bandwidth_gb_per_s, f"triad in numpy, {peak.n_threads} threads{busy}")
        best |= {key: value for key, value in found.items() if value[0] > best.get(key, (0.0, ""))[0]}
    peaks = {key: round(value, 1) for key, (value, _) in best.items()}
    sources = {f"peaks.{key}": f"measured: {how}" for key, (_, how) in best.items()}
    return msgspec.convert({**msgspec.to_builtins(target), "peaks": peaks, "sources": target.sources | sources}, Target)


def _sourced(target: Target, words: str) -> Target:
    return msgspec.structs.replace(target, sources={**target.sources, "peaks": words})


def validate(path: str) -> Target:
    """Read a target file and check that what it names exists; its backends need not be installed here.

    Raises: UsageError: what is wrong with it, and where.
    """
    target = load_target(path)
    if target.emulated_as:
        from edgevlm.devices.emulated import check_cpu  # loads what emulation takes

        check_cpu(target.emulated_as)
    return target
