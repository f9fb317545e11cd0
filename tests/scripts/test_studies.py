"""The studies of docs/layouts.md: the page says what the command gives."""

from pathlib import Path

from scripts.studies import DP, HELIX, TP, World, gain, studies

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"


def test_the_page_holds_the_tables_that_the_command_prints() -> None:
    page = PAGE.read_text().splitlines()
    lines, _ = studies()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 30
    assert [line for line in tables if line not in page] == []


def test_a_gain_compares_within_a_ttl_what_is_run_with_what_is_not() -> None:
    def world(family: str, slope: float, most: int) -> World:
        return World(family, "", 2, most, lambda batch: 1000.0 + slope * batch)

    worlds = [world(TP, 1000.0, 4), world(DP, 500.0, 2), world(HELIX, 250.0, 8)]
    found = gain(worlds, [TP])
    assert found.lowest == 2000.0 / 1250.0
    assert (found.sequences, found.ttl_ms) == (4.0, 2.0)  # at 2 ms TP holds 1 and Helix 4; at 5 ms 4 and 8
    both = gain(worlds, [TP, DP])
    assert (both.lowest, both.sequences, both.ttl_ms) == (1.2, 4.0, 3.0)  # both hold 2 there, and DP no more
