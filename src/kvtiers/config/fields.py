"""The kinds of value a setting takes, and `setting`, which declares one with its unit and its effect.

Numbers are strict where YAML is treacherous: `true` is no number, `off` may be read as False, `80` is no share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from kvtiers.config.plugins import installed_names
from kvtiers.config.sizes import FORMS, MIB, format_exact, parse_size

Auto: TypeAlias = Literal["auto"]
AUTO: Final[Auto] = "auto"


def setting(
    default: Any,
    effect: str,
    *,
    unit: str = "",
    allowed: str = "",
    shown_default: str = "",
    **constraints: Any,
) -> Any:
    """A field. A callable default gets the values of the fields before it.

    `allowed` and `shown_default` are for people where the constraints and the default do not speak for themselves.
    """
    extra: dict[str, Any] = {"unit": unit, "allowed": allowed, "shown_default": shown_default}
    known = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=effect, json_schema_extra=extra, **known, **constraints)


def problem(message: str, *keys: str) -> PydanticCustomError:
    """What a validator raises. `keys`: the settings of the section that contradict each other, if several do."""
    return PydanticCustomError("setting", "{message}", {"message": message, "keys": keys})


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise problem("must be a number, not true or false")
    return value


def _share(value: object) -> object:
    value = _no_bool(value)
    percent = value.strip().removesuffix("%") if isinstance(value, str) else value
    try:
        number = float(percent)  # type: ignore[arg-type] # whatever it can't take is caught
    except (TypeError, ValueError):
        return value
    if 1 < number <= 100 and (number >= 2 or isinstance(value, str)):
        raise problem(f"must be a share of 1, not a percentage: write {number / 100:.6g} for {number:.6g} %")
    if isinstance(value, str) and value.strip().endswith("%"):
        raise problem(f"must be a share of 1, not a percentage: write {number / 100:.6g}")
    return value


def _size(smallest: int, or_auto: str = "") -> Callable[[object], int]:
    def check(value: object) -> int:
        try:
            nbytes = parse_size(value)
        except ValueError as error:
            raise problem(f"{error}{or_auto if str(error).endswith(FORMS) else ''}") from None
        if nbytes < smallest:
            unit = " (plain numbers are bytes: was a unit forgotten?)" if _is_plain(value) else ""
            raise problem(f"must be at least {format_exact(smallest)}{unit}")
        return nbytes

    return check


def _size_or_auto(smallest: int) -> Callable[[object], int | Auto]:
    parse = _size(smallest, or_auto=', or "auto"')

    def check(value: object) -> int | Auto:
        return AUTO if isinstance(value, str) and value.strip().lower() == AUTO else parse(value)

    return check


def _is_plain(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit())


def _bare_off(value: object) -> object:
    return "off" if value is False else value  # YAML 1.1 reads a bare `off` as False


def _name_in(group: str) -> Callable[[str], str]:
    def check(name: str) -> str:
        names = installed_names(group)
        if name not in names:
            raise problem(f"must be one of {', '.join(names)} (what is installed)")
        return name

    return check


Count = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_share), Field(gt=0, le=1, allow_inf_nan=False)]
Size = Annotated[int, PlainValidator(_size(0))]
PoolSize = Annotated[int, PlainValidator(_size(MIB))]
SizeOrAuto = Annotated[int | Auto, PlainValidator(_size_or_auto(MIB))]
Policy = Annotated[str, AfterValidator(_name_in("kvtiers.policies"))]
Codec = Annotated[str, AfterValidator(_name_in("kvtiers.codecs"))]

SwitchedOff = BeforeValidator(_bare_off)
"""For a Literal with "off" among its values."""

SIZE_FORMS: Final = FORMS
