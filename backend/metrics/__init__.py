"""Metrics: one file each, found by METRICS."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from backend.metrics.base import Measurement, Metric
from backend.registry import Registry

METRICS: Registry[Metric] = Registry("backend.metrics", "metric")
MetricField = Annotated[SerializeAsAny[Metric], BeforeValidator(METRICS.coerce)]

__all__ = ["METRICS", "Measurement", "Metric", "MetricField"]
