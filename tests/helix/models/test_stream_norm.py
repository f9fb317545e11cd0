"""Rows of a chunk that are quantised where they are normalised: a whole model's hidden states are those of two steps.

Products of 8 bits need a Hopper GPU; here the same operands are widened and multiplied in float32 on any device.
"""

from types import SimpleNamespace

import pytest
import torch

from helix.batch import LocalRows, StepRows
from helix.config import CacheConfig, HelixConfig, ModelConfig, SchedulerConfig
from helix.llm import LLM
from helix.models import chunk_product, linear, stream_norm
from helix.models.gate import silu_mul
from helix.models.quantized import Quantized, widen_slice
from helix.models.unlike import one_of_each_layer
from helix.sampling import SamplingParams
from parallel.all_reduce_norm import AllReduceNorm
from scripts.make_checkpoint import make_checkpoint
from scripts.quantize import quantize_checkpoint

if torch.cuda.is_available():
    pytest.skip("its kernels run in Triton's interpreter", allow_module_level=True)


def widened_product(rows, w, dtype, bias, *, gated):
    """Do what ``chunk_product._product`` does."""
    values, scales = rows
    x = widen_slice(values, scales, w.shift - w.lead, torch.float32)
    out = x @ w.widen_stored(0, w.shape[0], torch.float32).T
    out = (out if bias is None else out + bias.float()).to(dtype)
    return silu_mul(out) if gated and w.grid is None else out


def in_two_steps(self, x, residual, weight, eps, *, powers_of_two):
    normed = torch.empty_like(residual)
    self._add_norm(x, residual, weight, normed, None, eps)
    w = SimpleNamespace(values=normed, scales=normed[:1].expand(normed.shape[1] // 128, -1), width=normed.shape[1],
                        shift=0, lead=0, powers_of_two=powers_of_two)  # fmt: skip
    calls.append(len(x))
    values, scales = chunk_product.quantize_rows(normed, w)
    return stream_norm.RowsInEightBits(values, scales, normed.dtype)


def as_on_hopper(monkeypatch):
    narrow = lambda w, x: isinstance(w, Quantized) and x.dim() == 2 and x.shape[0] > linear.MAX_ROWS  # noqa: E731
    for room in (linear, stream_norm):
        monkeypatch.setattr(room, "multiplies_in_8_bits", narrow)
    monkeypatch.setattr(chunk_product, "_product", widened_product)
    monkeypatch.setattr(AllReduceNorm, "can_quantize", lambda self, x: len(x) > 0)


calls: list[int] = []


@pytest.mark.parametrize("family", ["glm", "deepseek_v3"])
def test_a_model_that_normalises_in_8_bits_equals_one_that_quantises_afterwards(tmp_path, monkeypatch, family):
    sizes = {"hidden": 128, "ffn": 256, "expert_ffn": 128, "heads": 4}
    make_checkpoint(tmp_path / "plain", family=family, kv_heads=4 if family == "deepseek_v3" else 2, **sizes)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "fp8")
    as_on_hopper(monkeypatch)
    prompt = torch.randint(0, 256, (66,), generator=torch.Generator().manual_seed(1)).tolist()
    config = HelixConfig(
        model=ModelConfig(path=str(tmp_path / "fp8"), dtype="bfloat16"),
        cache=CacheConfig(block_size=16, num_pages=16, reuse=False),
        scheduler=SchedulerConfig(prefill_chunk=80),
    )
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=3)
    with LLM(config) as llm:
        (one,) = llm.generate([prompt], sampling)
        monkeypatch.setattr(AllReduceNorm, "in_8_bits", in_two_steps)
        calls.clear()
        (two,) = llm.generate([prompt], sampling)
    assert calls
    assert one.token_ids == two.token_ids
    assert [each.top for each in one.logprobs] == [each.top for each in two.logprobs]


def test_layers_that_are_skipped_do_not_say_what_the_next_one_reads(monkeypatch):
    """Of layers in 8 bits and one in 16 the first of each sort are run alone when kernels are compiled."""
    as_on_hopper(monkeypatch)
    kept = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.2"]}
    shape = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "quantization_config": kept,
    }  # fmt: skip
    model = ModelConfig(load="dummy", config=shape, dtype="bfloat16")
    with LLM(HelixConfig(model=model, cache=CacheConfig(num_pages=4))) as llm:
        with one_of_each_layer(llm.runner.decoder):
            llm.runner.forward(StepRows.for_nobody(66), LocalRows.for_nobody(66))
        (output,) = llm.generate([[1] * 66], SamplingParams(max_tokens=1, ignore_eos=True))
    assert output.error is None
