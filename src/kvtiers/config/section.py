"""What every part of the configuration is: frozen, with no unknown keys, and refused with one `ConfigError` that lists all problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvtiers.config.problems import all_problems
from kvtiers.model.errors import ConfigError

if TYPE_CHECKING:  # mypy wants a name, and pydantic has no public one
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _OneError(ModelMetaclass):
    """Constructing a section in a program reports as reading a file does.

    pydantic makes nested sections without this call, so only the outermost one translates.
    """

    def __call__(cls, *args: Any, **values: Any) -> Any:  # noqa: N805 - a metaclass
        try:
            return super().__call__(*args, **values)
        except ValidationError:
            assert issubclass(cls, BaseModel)
            raise ConfigError(
                [found.text() for found in all_problems(cls, values)], source=cls.__name__
            ) from None


class Section(BaseModel, metaclass=_OneError):
    """A mapping of the YAML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        validate_by_name=True,
        validate_by_alias=True,
        hide_input_in_errors=True,
    )
