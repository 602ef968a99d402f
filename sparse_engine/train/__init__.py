"""Training by recipe: data in, a trained sparse model and its executable out.

Example::

    result = se.train.run("epsd", "digits", out="runs/epsd")
    print(result)
"""

from __future__ import annotations

from . import diagnostics, models
from .data import ArrayData, as_array_data, load_data
from .evaluate import accuracy, outputs
from .loop import Mechanism, Phase, fit
from .memory import keep_freed_memory
from .models import build
from .post import PostPruning
from .recipe import Recipe, load_recipe, parse_setting, recipe_names
from .run import RunResult, run
from .source import BatchSource

__all__ = [
    "ArrayData",
    "BatchSource",
    "Mechanism",
    "Phase",
    "PostPruning",
    "Recipe",
    "RunResult",
    "accuracy",
    "as_array_data",
    "build",
    "diagnostics",
    "fit",
    "keep_freed_memory",
    "load_data",
    "load_recipe",
    "models",
    "outputs",
    "parse_setting",
    "recipe_names",
    "run",
]
