"""The model of cost beside a run: planned layouts, advice, and predicted beside measured."""

import logging

import pytest

from helix import LLM, HelixConfig, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig
from helix.plan.footprint import Storage
from helix.plan.hardware import named_hardware
from helix.predicted import predicted
from helix.prediction import Case, advise, planned_layout
from parallel.layout import Layout
from scripts.make_checkpoint import make_checkpoint
from tests.helix.plan.presets import preset


def test_a_planned_layout_is_the_fastest_that_holds_the_case() -> None:
    setup, hardware = (preset("glm4_9b_1m"), Storage()), named_hardware("h200")
    config = HelixConfig(model=ModelConfig(load="dummy", config={}))
    assert planned_layout(config, hardware, setup, 8, Case(1 << 20, 1)) == Layout(kvp=4, tpa=2)
    assert planned_layout(config, hardware, setup, 8, Case(4096, 1)) == Layout(kvp=1, tpa=8)
    with pytest.raises(ValueError, match=r"parallel.planned = true: no layout of 8 ranks holds 9999 sequences"):
        planned_layout(config, hardware, setup, 8, Case(1 << 20, 9999))
    with pytest.raises(ValueError, match=r"parallel.planned = true needs constants of this machine"):
        planned_layout(config, None, setup, 8, Case(1 << 20, 1))


def test_a_layout_that_is_more_than_a_tenth_faster_is_named() -> None:
    spec, storage, hardware = preset("glm4_9b_1m"), Storage(), named_hardware("h200")
    config, case = HelixConfig(model=ModelConfig(load="dummy", config={})), Case(1 << 20, 1)
    line = advise(config, hardware, spec, storage, Layout(kvp=1, tpa=8), case)
    assert line is not None and "parallel.kvp=4 parallel.tpa=2" in line
    assert advise(config, hardware, spec, storage, Layout(kvp=8, tpa=1), case) is None  # slower, by less


def test_a_planned_run_says_what_was_predicted(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    path = str(make_checkpoint(tmp_path / "model", family="llama"))
    config = HelixConfig(
        model=ModelConfig(path=path),
        parallel=ParallelConfig(planned=True),
        cache=CacheConfig(num_pages=64, block_size=16),
        runtime=RuntimeConfig(hardware="h200"),
    )
    prompts = [[1, 2, 3, 4], [5, 6]]
    llm = LLM(config, prompts=prompts)
    assert llm.layout == Layout()
    assert predicted(llm) is None  # nothing has run
    llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    said = predicted(llm)
    assert said is not None and said["ttl_ms"] > 0 and said["hardware"] == "h200"
    assert said["batch"] == 2 and 3 <= said["context"] <= 11
    assert "predicted for 2 sequences" in caplog.text
    llm.close()


def test_planned_and_given_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"parallel.planned = true chooses the layout, but parallel.kvp = 2 is given"):
        ParallelConfig(planned=True, kvp=2)
