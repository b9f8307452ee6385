"""Imported by the warm process of the tests: its workers do stand-in work."""

import stand_in
import stand_in_kind

import backend.execute
from backend.methods import METHODS
from backend.metrics import METRICS

for method in stand_in.KINDS["method"]:
    METHODS.register(method)
for metric in stand_in.KINDS["metric"]:
    METRICS.register(metric)
backend.execute.execute = stand_in.execute
stand_in_kind.install()[stand_in_kind.COUNT.name] = stand_in_kind.COUNT
