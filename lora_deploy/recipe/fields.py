"""Values as a person writes them in YAML: one or several, sizes, parts of a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

T = TypeVar("T")


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _several(value: Any) -> Any:  # noqa: ANN401 - YAML
    """Take one for several; ``false`` and nothing at all are none."""
    if value is None or value is False:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _share(value: Any) -> Any:  # noqa: ANN401 - YAML
    """Read ``3%`` as 0.03."""
    if isinstance(value, str) and value.strip().endswith("%"):
        number = value.strip().removesuffix("%")
        try:
            return float(number) / 100
        except ValueError as error:
            raise ValueError(f"found {value!r}, expected a part such as 3% or 0.03") from error
    return value


def _some(value: ByteSize) -> ByteSize:
    if value < 1:
        raise ValueError("expected a byte or more")
    return value


@dataclass(frozen=True, slots=True)
class _OrOne:
    """Tells the schema that one item may stand for several, and ``false`` for none."""

    or_false: bool = False

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        several = handler(core)
        return {"anyOf": [several["items"], several, *([{"const": False}] if self.or_false else [])]}


OneOrMore = Annotated[tuple[T, ...], BeforeValidator(_several), _OrOne()]
NoneOrMore = Annotated[tuple[T, ...], BeforeValidator(_several), _OrOne(or_false=True)]
Size = Annotated[ByteSize, AfterValidator(_some)]
"""Bytes: ``5GB``, ``2GiB`` or a number."""
Share = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_share, json_schema_input_type=float | str)]
"""Above 0 and below 1: ``3%`` or ``0.03``."""
