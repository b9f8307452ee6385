"""Judges: ways of judging answers, and the models that do it; one file each, found by discovery."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from backend.judges.base import Judge, JudgeModel
from backend.registry import Registry

JUDGES: Registry[Judge] = Registry("backend.judges", "judge")
JUDGE_MODELS: Registry[JudgeModel] = Registry("backend.judges", "judge model")
JudgeField = Annotated[SerializeAsAny[Judge], BeforeValidator(JUDGES.coerce)]
JudgeModelField = Annotated[SerializeAsAny[JudgeModel], BeforeValidator(JUDGE_MODELS.coerce)]

__all__ = ["JUDGES", "JUDGE_MODELS", "Judge", "JudgeField", "JudgeModel", "JudgeModelField"]
