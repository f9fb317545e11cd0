"""The table of what clients may ask for: it knows every setting, and the documentation is made of it."""

from pathlib import Path

from helix.fields import FIELDS, SETTINGS, table

ROOT = Path(__file__).parents[2]


def test_every_setting_has_a_row_and_every_row_a_name_of_its_own() -> None:
    names = [each.name for each in FIELDS]
    assert len(set(names)) == len(names)
    assert set(SETTINGS) <= {name for each in FIELDS for name in (each.name, each.to)}
    assert {each.name for each in FIELDS if each.kind == "setting"} - set(SETTINGS) == {
        "max_completion_tokens",
        "max_new_tokens",
        "response_format",
    }


def test_the_documentation_has_the_table() -> None:
    assert f"\n{table()}\n" in (ROOT / "docs" / "serving.md").read_text()
