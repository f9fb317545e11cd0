"""Calibration: constants out of times, and the file that holds them. The micro-benchmarks themselves need GPUs."""

from dataclasses import replace

import pytest

from helix.plan.cost import ONE_SHOT_BYTES, CostModel
from helix.plan.footprint import Footprint
from helix.plan.hardware import named_hardware, read_hardware
from parallel.layout import Layout
from scripts.calibrate import CalibrateConfig, Found, as_yaml, merged
from scripts.constants import HIDDEN, LARGE, LONG, SMALL, fit_all_reduce, fit_collective, fit_exchange
from tests.helix.plan.presets import preset


@pytest.mark.parametrize("sizes", [(2, 8), (4,)])
def test_times_that_the_model_gives_lead_back_to_its_constants(sizes: tuple[int, ...]) -> None:
    hw = replace(
        named_hardware("h200"), all_reduce_us=3.0, all_reduce_peer_us=0.4, flight_us=1.5, link_bytes_per_us=2.5e5,
    )  # fmt: skip
    cost = CostModel(Footprint(preset("glm4_9b_1m"), Layout(tpa=2)), hw)
    assert cost.footprint.spec.hidden_size == HIDDEN
    times = {
        ranks: {size: cost.all_reduce_us(size // (2 * HIDDEN), ranks) for size in (SMALL, ONE_SHOT_BYTES, *LARGE)}
        for ranks in sizes
    }
    expected = {"link_bytes_per_us": 2.5e5, "flight_us": 1.5}
    if len(sizes) == 2:
        expected |= {"all_reduce_us": 3.0, "all_reduce_peer_us": 0.4}
    assert fit_all_reduce(times) == pytest.approx(expected)
    ranks = sizes[-1]
    long = {size: cost.all_reduce_us(size // (2 * HIDDEN), ranks) for size in LONG}
    expected = {"collective_us": hw.collective_us, "collective_bytes_per_us": hw.collective_bytes_per_us}
    assert fit_collective(ranks, long) == pytest.approx(expected)


def test_an_exchange_of_two_and_of_eight() -> None:
    assert fit_exchange({2: 5.0, 8: 8.0}) == pytest.approx({"exchange_us": 5.0, "exchange_peer_us": 0.5})
    assert fit_exchange({3: 5.0}) == {}


def test_the_file_says_of_each_constant_whence_it_is(tmp_path) -> None:
    base = named_hardware("b200")
    found = {"read_bytes_per_us": Found(7.123456e6, "a read"), "launch_us": Found(1.2345678, "a chain")}
    made = merged(base, found, name="mine", gpu="NVIDIA X", gpus_per_node=4)
    file = tmp_path / "mine.yaml"
    file.write_text(as_yaml(made, found, base, "today"))
    read = read_hardware(file)
    assert (read.name, read.gpu, read.domain, read.source) == ("mine", "NVIDIA X", 4, "data sheet")
    assert (read.read_bytes_per_us, read.launch_us) == (7.123e6, 1.235)
    assert read.exchange_us == base.exchange_us
    text = file.read_text()
    assert "read_bytes_per_us: 7.123e+6  # measured: a read" in text
    assert f"exchange_us: {base.exchange_us}  # not measured here; of b200: data sheet" in text


def test_a_name_is_asked_for() -> None:
    with pytest.raises(ValueError, match="name = '' must be letters"):
        CalibrateConfig()
