"""Models of conf/model/, by name."""

from functools import cache
from pathlib import Path

import yaml

from helix.config import ModelConfig
from helix.models.loading import read_spec
from helix.models.spec import ModelSpec

CONF = Path(__file__).resolve().parents[3] / "conf"


@cache
def preset(name: str) -> ModelSpec:
    return read_spec(ModelConfig(**yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())))
