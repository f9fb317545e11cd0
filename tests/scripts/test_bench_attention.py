"""The attention benchmark, as far as a CPU goes: its inputs mean the same to everyone, and every column is filled."""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention.backends import select_backend
from scripts import attention_peers, bench_attention, cli
from scripts.attention_peers import Shape, agree_on, load_flashinfer, make_case, sdpa
from scripts.bench_attention import Bench, BenchAttentionConfig, make_exchanges, measure, measure_ranks
from scripts.dummy_weights import BenchCache

CPU = torch.device("cpu")
SMALL = {"shapes": [[2, 64, 8, 2]], "lengths": [64], "heads": [8, 2], "head_dim": 16, "block_size": 16}


class PagedDecode:
    """FlashInfer's wrapper by its documented contract: HND pages, the tables of ``plan``, out and a base-2 lse."""

    def __init__(
        self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool, use_tensor_cores: bool, **buffers
    ):
        assert (layout, use_cuda_graph) == ("HND", True)
        self.num_rows = {len(buffer) for name, buffer in buffers.items() if "indices" not in name}

    def plan(self, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, *, sm_scale, **dtypes):
        assert self.num_rows == {len(last_page_len), len(indptr)}
        self.tables = [indices[a:b].long() for a, b in pairwise(indptr)]
        self.lens = [(len(t) - 1) * page_size + int(last) for t, last in zip(self.tables, last_page_len, strict=True)]
        self.group, self.scale = heads // kv_heads, sm_scale

    def run(self, q: torch.Tensor, pages: torch.Tensor, *, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses = [], []
        for q_QD, table, length in zip(q.float(), self.tables, self.lens, strict=True):
            kv = pages[table].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # [2, K, S, D]
            k, v = kv.repeat_interleave(self.group, 1)
            scores = torch.einsum("qd,qsd->qs", q_QD, k) * self.scale
            outs.append(torch.einsum("qs,qsd->qd", scores.softmax(-1), v))
            lses.append(scores.logsumexp(-1) * 1.4426950408889634)
        return torch.stack(outs).to(q.dtype), torch.stack(lses)


PEER = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode, __version__="stub")


def once(calls: list[Callable[[], Any]], *, repeats: int, iterations: int) -> tuple[float, float]:
    """Stand in for the clock: every call runs; they take 2 us."""
    assert len(calls) == iterations and iterations % 2 == 0
    for call in calls[:3]:
        call()
    return 2.0, 0.1


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(bench_attention, "graph_us", once)
    monkeypatch.setattr(attention_peers, "WORKSPACE_BYTES", 1)
    return small_bench(PEER)


def small_bench(flashinfer: Any, **settings: Any) -> Bench:
    config = BenchAttentionConfig(**SMALL, dtype="float16", rotated_bytes=50_000, **settings)
    return Bench(
        config, CPU, torch.float16, select_backend("reference", CPU), flashinfer, pdl=False, read_bytes_per_us=4.5e6
    )


def test_ours_and_the_peers_attend_to_the_same_tokens(bench: Bench):
    case = make_case(Shape(2, 64, 8, 2, 16, 16), 2, torch.float16, CPU)
    agree_on(case, bench.ours(case, 0)().out)
    assert len(bench.flashinfer_runs(case)) == 2
    with pytest.raises(AssertionError):
        agree_on(case, bench.ours(case, 1)().out)
    k, v = case.gathered(0)
    case.pages[0].view(-1).copy_(torch.stack([k, v]).flatten())
    scores = (case.q.unsqueeze(2).float() @ k.repeat_interleave(4, 1).float().mT * case.scale).softmax(-1)
    dense = scores @ v.repeat_interleave(4, 1).float()
    torch.testing.assert_close(sdpa(case, 0)().float(), dense, rtol=1e-2, atol=1e-2)


def test_a_row_holds_every_column_and_its_ratios(bench: Bench):
    row = measure(bench, bench.config.local_shapes()[0])
    assert (row["B"], row["S"], row["Q/K"], row["FlashInfer us"], row["merged/best"]) == (2, 64, "8/2", 2.0, 1.0)
    assert row["floor us"] == pytest.approx(2 * 2 * 64 * 2 * 16 * 2 / 4.5e6)


def test_of_a_cache_in_8_bits_ours_reads_its_bytes_and_peers_what_they_mean(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_attention, "graph_us", once)
    monkeypatch.setattr(attention_peers, "PAGES_AT_ONCE", 3)
    bench = small_bench(None, cache=BenchCache(dtype="fp8_e4m3"))
    row = measure(bench, bench.config.local_shapes()[0])  # whose peers must agree with ours
    assert (row["16 bits us"], row["8/16 bits"]) == (2.0, 1.0)
    assert row["floor us"] == pytest.approx(2 * 2 * 64 * 2 * (16 + 4) / 4.5e6)
    with pytest.raises(ValueError, match=r"rows = 256 .*expand_rows"):
        BenchAttentionConfig(cache=BenchCache(dtype="fp8_e4m3"), rows=256)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_of_several_rows_each_sees_what_stands_before_it(kv_heads: int):
    case = make_case(Shape(2, 64, 8, kv_heads, 16, 16, rows=12), 2, torch.float16, CPU)
    bench = small_bench(None)
    agree_on(case, bench.ours(case, 0)().out)
    with pytest.raises(AssertionError):
        agree_on(case, bench.ours(case, 0)().out.roll(1, 0))
    k, v = (each.float().repeat_interleave(8 // kv_heads, 1) for each in case.dense(0))
    q = case.q.float().unflatten(0, (2, 12)).transpose(1, 2)
    unseen = torch.arange(64) > torch.arange(52, 64).unsqueeze(1)
    expected = (q @ k.mT * case.scale).masked_fill(unseen, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sdpa(case, 0)().float(), expected, rtol=1e-2, atol=1e-2)
    assert case.shape.flops() == 4 * 8 * 16 * int((~unseen).sum()) * 2


def test_inputs_fill_what_they_shall_and_never_fewer_than_two_copies():
    shape = Shape(1, 4096, 16, 1, 128, 64)
    assert shape.num_copies(torch.bfloat16, 1 << 30) == 512
    assert (shape.num_copies(torch.bfloat16, 1), shape.num_copies(torch.bfloat16, 1 << 40)) == (2, 1024)


def ranks_body() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_attention, "graph_us", once)
        patch.setattr(attention_peers, "WORKSPACE_BYTES", 1)
        bench = small_bench(PEER)
        [shape] = bench.config.rank_shapes()
        return measure_ranks(bench, shape, make_exchanges(bench, shape, None))


@pytest.mark.ranks(2)
def test_compositions_run_over_ranks(ranks):
    for row in ranks().run(ranks_body):
        assert (row["S/KVP"], row["ours us"], row["FlashInfer + packed us"], row["ours/unpacked"]) == (
            64,
            2.0,
            2.0,
            1.0,
        )


def test_a_missing_flashinfer_is_told_and_leaves_a_gap(monkeypatch: pytest.MonkeyPatch, bench: Bench):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    module, reason = load_flashinfer(16, 1, torch.float16, CPU)
    assert module is None
    assert reason.startswith("ModuleNotFoundError: ")
    assert measure(small_bench(None), bench.config.local_shapes()[0])["FlashInfer us"] is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shapes": [[1, 4096, 16]]}, "shapes: [1, 4096, 16] must be 4 numbers"),
        ({"shapes": [[1, 4096, 16, 3]]}, "heads = 16 of a shape must be a multiple of its kv_heads = 3"),
        ({"lengths": [100]}, "tokens = 100 of a shape must be a multiple of block_size = 64"),
        ({"shapes": []}, "shapes = [] and lengths = [4096, 16384, 65536, 262144] must not be empty"),
        ({"shapes": [[1, 64, 16, 1]], "rows": 65}, "rows = 65 must be at most the tokens of a shape = 64"),
        ({"dtype": "float8"}, "dtype = 'float8' must be one of bfloat16, float16"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError) as refused:
        BenchAttentionConfig(**changes)
    assert str(refused.value) == problem


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_attention", "lengths=[4096]", "shapes=[[1,4096,16,1]]"])
    with pytest.raises(SystemExit, match="2"):
        cli.main("bench_attention", BenchAttentionConfig, bench_attention.run)
    assert "this command measures GPUs" in capsys.readouterr().err
