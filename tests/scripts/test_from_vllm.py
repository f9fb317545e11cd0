"""The page for those who come from vLLM names keys that there are."""

import re
from pathlib import Path

import pytest

from scripts import cli
from scripts.serve import ServeConfig

PAGE = (Path(__file__).parents[2] / "docs" / "from-vllm.md").read_text("utf-8")
SETTINGS = sorted(set(re.findall(r"`([a-z_.]+=[^` ]+)`", PAGE)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_page_is_one_of_the_server(setting: str) -> None:
    cli.check("serve", ServeConfig, [setting])


def test_the_page_has_settings() -> None:
    assert len(SETTINGS) > 25 and "parallel.kvp=4" in SETTINGS
