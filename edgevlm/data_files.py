"""Where the TOML folders ``targets/`` and ``calibration/`` lie: in the wheel, or at the top of a checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from edgevlm.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The folder ``targets`` or ``calibration``."""
    inside = _PACKAGE / "_data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def data_names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in data_folder(folder).glob("*.toml")))


def read_toml(path: Path, kind: type[T], *, what: str) -> T:
    """Read a TOML file strictly as ``kind``.

    Raises: UsageError: no such file, not TOML, an unknown or missing key, or a value of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The {what} '{path}' cannot be read: {error.strerror}.", hint="Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not TOML: {error}.", hint="Mend the line that is named.") from error
    return convert_table(table, kind, where=f"{what} '{path}'")


def convert_table(table: object, kind: type[T], *, where: str) -> T:
    """A parsed TOML or JSON table as ``kind``; an unknown key gets its nearest known one as hint."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"The {where} is wrong: {error}.", hint=_hint(error, kind)) from error


def _hint(error: msgspec.ValidationError, kind: type[object]) -> str:
    message = str(error)
    fields, values = _vocabulary(kind)
    if "unknown field" in message:
        return did_you_mean(message.split("`")[1], fields)
    if "Invalid enum value" in message:
        return did_you_mean(message.split("'")[1], values)
    return "Compare it with the files in the folder that holds the built-in ones."


def _vocabulary(kind: object) -> tuple[set[str], set[str]]:
    """Every field's name, and every value that a ``Literal`` allows."""
    fields: set[str] = set()
    values: set[str] = set()
    left: list[object] = [kind]
    while left:
        info = left.pop()
        if isinstance(info, str):
            values.add(info)
        elif isinstance(info, type) and issubclass(info, msgspec.Struct):
            for field in msgspec.structs.fields(info):
                fields.add(field.encode_name)
                left.append(field.type)
        else:
            left.extend(getattr(info, "__args__", ()))
    return fields, values
