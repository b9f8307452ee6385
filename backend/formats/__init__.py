"""Number formats: one file each, found by FORMATS."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from backend.formats.base import Format, QTensor
from backend.registry import Registry

FORMATS: Registry[Format] = Registry("backend.formats", "format")
FormatField = Annotated[SerializeAsAny[Format], BeforeValidator(FORMATS.coerce)]

__all__ = ["FORMATS", "Format", "FormatField", "QTensor"]
