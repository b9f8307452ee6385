"""Quantization methods: one file each, found by METHODS."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from backend.methods.base import LinearMethod, Method, Seen
from backend.registry import Registry

METHODS: Registry[Method] = Registry("backend.methods", "method")
MethodField = Annotated[SerializeAsAny[Method], BeforeValidator(METHODS.coerce)]

__all__ = ["METHODS", "LinearMethod", "Method", "MethodField", "Seen"]
