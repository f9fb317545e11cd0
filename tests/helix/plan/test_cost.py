"""The model of cost: terms against arithmetic by hand, and the whole beside steps that were measured."""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attention import fused_exchange
from helix.plan import cost as cost_module
from helix.plan.cost import CostModel, experts_in_use
from helix.plan.data_parallel import DataParallel
from helix.plan.footprint import Footprint, Storage
from helix.plan.hardware import hardware_names, named_hardware, read_hardware
from helix.plan.planner import Plan, Setup
from parallel.all_reduce_norm import MAX_FUSED_BYTES, TWO_SHOT_BYTES
from parallel.layout import Layout
from tests.helix.plan.presets import preset

DOCS = Path(__file__).resolve().parents[3] / "docs"
# Steps of kernels that are no more: the experts before they were streamed.
OLD = {("qwen3_30b_a3b", "efd0f66")}


TOGETHER = "814267a"
"""The commit of 40 steps that were measured in one session."""


def cost(
    model: str, hardware: str, storage: Storage | None = None, chunk: int = 2048, layers: int | None = None,
    **layout: int,
) -> CostModel:  # fmt: skip
    spec = preset(model)
    foot = Footprint(
        spec if layers is None else replace(spec, num_layers=layers), Layout(**layout), storage or Storage()
    )
    return CostModel(foot, named_hardware(hardware), chunk)


EARLIER = (("performance.jsonl", "h200"), ("performance-h100.jsonl", "h100"))
VALIDATION = (("performance-plan.jsonl", "h200"),)


def measured(files: tuple[tuple[str, str], ...], bench: str) -> Iterator[tuple[str, dict, str, Storage]]:
    """(machine, line, model, how weights and cache are kept) of every line of a benchmark in docs/."""
    for file, machine in files:
        for line in (DOCS / file).read_text().splitlines():
            facts = json.loads(line)
            model = facts.get("model", "glm4_9b_1m")
            if facts["bench"] == bench and (model, facts["commit"]) not in OLD:
                cache = "fp8" if facts.get("cache") == "fp8_e4m3" else "bf16"
                yield machine, facts, model, Storage(facts.get("weights", "bf16"), cache)


def measured_steps(files: tuple[tuple[str, str], ...]) -> list[tuple[str, float, float, tuple]]:
    """(machine, measured ms, predicted ms, case) of every decode step; a case is what layouts are compared in:
    (model, commit, storage, ranks, context, batch, layers).
    """
    steps = []
    for machine, facts, model, storage in measured(files, "decode step"):
        for row in facts["rows"]:
            layout = {"kvp": row["kvp"], "tpa": row["tpa"], "ep": facts.get("ep", 1)}
            layers = facts.get("layers")
            ms = cost(model, machine, storage, layers=layers, **layout).decode(row["context"], row["batch"]).us / 1e3
            case = (model, facts["commit"], storage, facts["world_size"], row["context"], row["batch"], layers)
            steps.append((machine, row["TTL ms"], ms, case))
    return steps


def test_the_terms_of_a_step_by_hand() -> None:
    """GLM-4-9B, kvp 2 x tpa 2, 131,072 tokens, on made-up hardware of round numbers."""
    hw = replace(
        named_hardware("h200"), read_bytes_per_us=1e6, launch_us=1.0, attention_us=2.0, exchange_us=3.0,
        all_reduce_us=4.0, all_reduce_peer_us=0.5, step_us=10.0, link_bytes_per_us=1e6,
    )  # fmt: skip
    foot = Footprint(preset("glm4_9b_1m"), Layout(kvp=2, tpa=2))
    terms = CostModel(foot, hw).decode(131072, 1).terms
    assert terms["cache"] == pytest.approx(40 * 2 * 128 * 2 * 65536 / 1e6)
    assert terms["weights"] == pytest.approx((foot.weights_bytes - 2 * 4096 * (151552 + 1)) / 1e6)
    assert terms["launches"] == pytest.approx(40 * (5 * 1.0 + 2.0) + 4 * 1.0 + 10.0)
    assert terms["exchange"] == pytest.approx(40 * (3.0 + 16 * 128 * 2 / 2 / 1e6))
    assert terms["all-reduce"] == pytest.approx(40 * 2 * (4.0 + 2 * 0.5 + 3 * 8192 / 1e6))


def test_chunks_travel_by_collectives_and_few_rows_by_kernels_of_ours() -> None:
    """GLM-4-9B, kvp 2: of 8,192 rows the queries, all heads' partials, and two sums of the stream."""
    hw = replace(named_hardware("h200"), collective_us=20.0, collective_bytes_per_us=2e5)
    terms = CostModel(Footprint(preset("glm4_9b_1m"), Layout(kvp=2)), hw, 8192).prefill(8192).terms
    sent = 8192 * 4096 * 2
    assert terms["all-reduce"] == pytest.approx(40 * 2 * (20.0 + sent / 2e5))
    assert terms["exchange"] == pytest.approx(40 * 2 * (20.0 + sent / 2 / 2e5))
    assert (cost_module.ONE_SHOT_BYTES, cost_module.FUSED_REDUCE_BYTES) == (TWO_SHOT_BYTES, MAX_FUSED_BYTES)
    assert (cost_module.FUSED_EXCHANGE_BYTES, cost_module.FUSED_EXCHANGE_ROWS) == (
        fused_exchange.CAPACITY_BYTES, (fused_exchange.MIN_CAPACITY, fused_exchange.MAX_CAPACITY),
    )  # fmt: skip


def test_queries_that_ranks_share_are_read_in_part() -> None:
    """DeepSeek-R1, kvp 8: of few rows each rank reads an eighth of what makes queries, and receives the others'."""
    foot = Footprint(preset("deepseek_r1"), Layout(kvp=8))
    model = CostModel(foot, named_hardware("h200"))
    assert model.shares_queries(1) and not model.shares_queries(2048)
    matrices = foot.layers[-1].matrices
    made = sum(matrices[role].num_bytes for role in ("q_b", "k_up"))
    shared, whole = (defaultdict(float), defaultdict(float))
    model.add_products(shared, foot.layers[-1], 1, shared=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostModel, "shares_queries", lambda *_: False)
        model.add_products(whole, foot.layers[-1], 1, shared=False)
    assert whole["weights"] - shared["weights"] == pytest.approx(7 / 8 * made / model.hardware.read_bytes_per_us)


def test_an_exchange_crosses_the_network_where_its_group_leaves_the_domain() -> None:
    foot = Footprint(preset("qwen3_30b_a3b"), Layout(kvp=16))
    small, large = (replace(named_hardware("h200"), domain=domain, network_us=100.0) for domain in (8, 72))
    exchange = [CostModel(foot, hw).decode(1 << 20, 1).terms["exchange"] / 48 for hw in (small, large)]
    assert exchange[0] > 100.0 > exchange[1]


def test_steps_that_were_measured_together_are_predicted() -> None:
    """40 steps of four models at one commit, on one and two H200; no constant is fitted to any of them."""
    steps = [step for step in measured_steps(VALIDATION) if step[3][1] == TOGETHER]
    errors = [abs(predicted / measured - 1) for _, measured, predicted, _ in steps]
    assert len(errors) == 40 and len({case[0] for *_, case in steps}) == 4
    assert statistics.median(errors) <= 0.04
    assert max(errors) <= 0.10


def test_steps_of_other_commits_are_predicted() -> None:
    """A weaker check: points of several commits and machines, mostly one model; three with 8 bits throughout."""
    steps = [step for step in measured_steps(EARLIER + VALIDATION) if step[3][1] != TOGETHER]
    errors = [abs(predicted / measured - 1) for _, measured, predicted, _ in steps]
    assert len(errors) >= 58 and sum(case[2].weights == "fp8" for *_, case in steps) >= 3
    assert statistics.median(errors) <= 0.04
    assert max(errors) <= 0.12


def test_prompts_are_predicted() -> None:
    """GLM-4-9B on one and two H200, with weights and cache of 8 bits too."""
    errors = []
    for machine, facts, model, storage in measured(VALIDATION, "prefill"):
        for row in facts["rows"]:
            model_of = cost(model, machine, storage, row["chunk"], kvp=row["kvp"], tpa=row["tpa"])
            errors.append(abs(model_of.prefill(row["prompt"]).us / 1e6 / row["TTFT s"] - 1))
    assert len(errors) >= 8
    assert statistics.median(errors) <= 0.03
    assert max(errors) <= 0.06


def test_the_faster_of_two_layouts_is_never_the_wrong_one() -> None:
    pairs = 0
    for (machine, measured, predicted, case), other in itertools.combinations(measured_steps(EARLIER + VALIDATION), 2):
        if (machine, case) == (other[0], other[3]) and max(measured, other[1]) > 1.1 * min(measured, other[1]):
            pairs += 1
            assert (measured < other[1]) == (predicted < other[2]), case
    assert pairs >= 11


def test_experts_in_use() -> None:
    experts = preset("qwen3_30b_a3b").experts
    assert experts_in_use(experts, 1, 1) == pytest.approx(8 / 128)
    assert experts_in_use(experts, 1, 2) == pytest.approx(1 - (1 - 8 / 128) ** 2)
    # the fuller of two halves has 4 of the 8 and what the mean of |binomial(8, 1/2) - 4| is: 1.09
    assert experts_in_use(experts, 2, 1) * 64 == pytest.approx(4 + 1.09, abs=0.1)
    assert experts_in_use(experts, 128, 10000) == pytest.approx(1.0)


def test_kvp_overtakes_plain_tp_where_the_two_are_equal() -> None:
    plan = Plan(Setup(preset("glm4_9b_1m"), named_hardware("h200")), 8)
    at = plan.crossover(1)
    assert at is not None and 32768 < at < 131072
    fastest = plan.fastest(at, 1), plan.fastest(at - plan.setup.block_size * 8, 1)
    assert fastest[0] is not None and fastest[0].kvp > 1
    assert fastest[1] is not None and fastest[1].kvp == 1
    assert Plan(plan.setup, 2).crossover(1) is None  # two KV heads on two GPUs: nothing is stored twice


def test_the_largest_batch_within_a_limit_is_the_last_one() -> None:
    plan = Plan(Setup(preset("glm4_9b_1m"), named_hardware("h200")), 8)
    for row in plan.largest_within(131072, 20.0):
        model = next(model for model, _ in plan.costs if model.footprint.layout == row.layout)
        assert row.ttl.us <= 20e3
        assert row.batch == row.max_sequences or model.decode(131072, row.batch + 1).us > 20e3


@pytest.mark.parametrize("name", hardware_names())
def test_hardware_files_are_whole_and_name_their_source(name: str) -> None:
    hardware = named_hardware(name)
    assert hardware.name == name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name: x", "lacks all_reduce_peer_us"),
        ("- 1", "holds list"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_broken_file_of_constants_ends_in_one_line(tmp_path, text: str, why: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"hardware.file = {file}.*{why}"):
        read_hardware(file)


@pytest.mark.parametrize("model", ["qwen2_5_7b_1m", "glm4_9b_1m"])
def test_data_parallel_attention_of_one_group_is_plain_tp(model: str) -> None:
    setup = Setup(preset(model), named_hardware("h200"))
    plain, one_group = setup.cost_of(Layout(tpa=4)), DataParallel(setup, 4, 4)
    assert one_group.decode(131072, 8).terms == pytest.approx(plain.decode(131072, 8).terms)
    pages = setup.num_pages(plain.footprint)
    assert one_group.most(131072) == setup.max_sequences(plain.footprint, 131072) == pages // (131072 // 64)


def test_tokens_reach_their_experts_and_come_back_by_an_all_to_all_each() -> None:
    """Qwen3-30B-A3B, 8 ranks with attention of their own, 16 sequences: 2 rows of 2,048 to 8 experts each, twice."""
    hw = replace(named_hardware("h200"), exchange_us=3.0, exchange_peer_us=0.5, link_bytes_per_us=1e6)
    terms = DataParallel(Setup(preset("qwen3_30b_a3b"), hw), 8).decode(1024, 16).terms
    sent = 2 * 8 * 2048 * 2 * 7 / 8
    assert terms["exchange"] == pytest.approx(48 * 2 * (3.0 + 6 * 0.5 + sent / 1e6))
    assert terms["cache"] == pytest.approx(2 * 1024 * 48 * 2 * 4 * 128 * 2 / hw.read_bytes_per_us)
