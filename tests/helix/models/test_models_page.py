"""docs/models.md says what the code does: its tables are held against the tables and the refusals of the code."""

import json
import re
from pathlib import Path

import pytest

from helix.models.config_keys import KEYS, LIMITS, Key, valid_values
from helix.models.families import FAMILIES, spec_of
from helix.models.quantization import REFUSED
from helix.models.weight_files import OTHER_KINDS

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text("utf-8")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 320, "num_experts_per_tok": 2}  # fmt: skip


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def key_row(key: Key) -> list[str]:
    where = ", ".join(key.families) or "all" + (f" but {', '.join(key.computed_by)}" if key.computed_by else "")
    return [f"`{key.name}`", where, valid_values(key).removeprefix("valid: "), key.meaning]


def test_families_are_those_of_the_code() -> None:
    assert [re.findall(r"`(\w+)`", cells[0])[0] for cells in rows("Families")] == sorted(FAMILIES)


def test_config_keys_are_those_of_the_code() -> None:
    assert rows("Config keys that must be absent, null or neutral") == [key_row(key) for key in KEYS]
    assert rows("Config keys that limit the context") == [[f"`{limit.name}`", limit.meaning] for limit in LIMITS]


@pytest.mark.parametrize("cells", rows("Config values that a family refuses"), ids=lambda cells: " ".join(cells[:2]))
@pytest.mark.filterwarnings("default")
def test_values_that_the_page_calls_refused_are_refused(cells: list[str]) -> None:
    settings = json.loads("{" + cells[1].strip("`") + "}")
    [key] = settings
    families = sorted(FAMILIES) if cells[0] == "all" else cells[0].split(", ")
    for family in families:
        assert spec_of({"model_type": family, **SIZES}, "x").num_layers == 2
        with pytest.raises(ValueError, match=r"^x: ") as error:
            spec_of({"model_type": family, **SIZES, **settings}, "x")
        assert (key if key != "rope_scaling" else "rope_type") in str(error.value)


def test_kinds_of_files_are_those_of_the_code() -> None:
    section = PAGE.split("## Files", 1)[1]
    for patterns, _, way_out in OTHER_KINDS:
        assert any(
            all(f"`{pattern}`" in line for pattern in patterns) and way_out in line for line in section.splitlines()
        )
    assert all(name in PAGE for name in REFUSED)
