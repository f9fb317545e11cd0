"""Reading slices of checkpoints: the right elements and dtypes, and no more memory than that takes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import helix.models.checkpoint as checkpoint_module
from helix.models.checkpoint import Checkpoint, fill_dummy
from helix.models.decoder import Decoder
from helix.models.families import load_spec
from helix.models.loading import fill
from helix.models.parts import Part, Piece, Weight
from helix.models.spec import ModelSpec
from helix.models.weights import layer_weights, model_weights, tensor_shapes, whole
from scripts.make_checkpoint import FAMILIES, make_checkpoint

ROOT = Path(__file__).parents[3]
# 8 heads, 4 KV heads (2 for glm), 160 feed-forward units, 320 tokens, 6 experts of 72 units: ranges that begin and end
# inside.
PARTS = (
    Part((2, 4), (1, 2), (3, 4), (33, 70), (100, 207), (1, 4), (5, 40), (11, 60)),
    Part((0, 8), (0, 2), (5, 8), (0, 160), (319, 320), (0, 6), (0, 72), (0, 72)),
    Part((4, 4), (1, 1), (0, 0), (7, 7), (320, 320), (2, 3), (7, 7), (7, 7)),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give a checkpoint of some recipe, made once for all tests that only read it."""
    made: dict[str, Path] = {}

    def get(**recipe: Any) -> Path:
        key = json.dumps(recipe, sort_keys=True)
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), force=True, **recipe)
        return made[key]

    return get


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def all_weights(spec: ModelSpec, part: Part) -> dict[str, Weight]:
    layers = {f"{n}.{role}": w for n in range(spec.num_layers) for role, w in layer_weights(spec, n, part).items()}
    return model_weights(spec, part) | layers


def sliced(weight: Weight, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    pieces = []
    for piece in weight.pieces:
        rows = tensors[piece.name][slice(*piece.rows) if piece.rows else slice(None)]
        pieces.append(rows[:, slice(*piece.cols)] if piece.cols else rows)
    return torch.cat(pieces) if pieces else torch.empty(weight.shape)


@pytest.mark.parametrize("part", PARTS, ids=("inner", "edges", "empty"))
@pytest.mark.parametrize("shards", ["", "150KB"], ids=("single", "sharded"))
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_equals_slicing_the_whole_tensors(
    shared: Callable[..., Path], family: str, shards: str, part: Part
) -> None:
    path = shared(family=family, max_shard_size=shards)
    assert (len(list(path.glob("*.safetensors"))) > 1) == bool(shards)
    spec, tensors = load_spec(path), all_tensors(path)
    with Checkpoint(path, spec) as checkpoint:
        for role, weight in all_weights(spec, part).items():
            out = torch.full(weight.shape, torch.nan)
            checkpoint.read(weight, out)
            assert torch.equal(out, sliced(weight, tensors)), role


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reading_converts_to_the_dtype_of_the_destination(
    shared: Callable[..., Path], stored: str, wanted: torch.dtype
) -> None:
    path = shared(family="qwen2", dtype=stored)
    spec, tensors = load_spec(path), all_tensors(path)
    assert tensors["lm_head.weight"].dtype == getattr(torch, stored)
    with Checkpoint(path, spec) as checkpoint:
        for role, weight in all_weights(spec, PARTS[0]).items():
            out = torch.empty(weight.shape, dtype=wanted)
            checkpoint.read(weight, out)
            assert torch.equal(out, sliced(weight, tensors).to(wanted)), role


def test_destination_may_be_strided(shared: Callable[..., Path]) -> None:
    path = shared(family="llama")
    spec = load_spec(path)
    weight = layer_weights(spec, 0, PARTS[0])["down"]
    storage = torch.full((64, 50), -1.0)
    with Checkpoint(path, spec) as checkpoint:
        checkpoint.read(weight, storage[:, :37])
    assert torch.equal(storage[:, :37], sliced(weight, all_tensors(path)))
    assert (storage[:, 37:] == -1.0).all()


def test_tied_head_is_read_from_the_embedding(shared: Callable[..., Path]) -> None:
    path = shared(family="llama", tied=True)
    spec = load_spec(path)
    assert spec.tied_embeddings
    out = torch.empty(107, 64)
    with Checkpoint(path, spec) as checkpoint:
        checkpoint.read(model_weights(spec, PARTS[0])["lm_head"], out)
    assert torch.equal(out, all_tensors(path)["model.embed_tokens.weight"][100:207])


@pytest.mark.parametrize(
    ("weight", "shape"),
    [
        (Weight((4, 64), (Piece("lm_head.weight", (0, 4)),)), (5, 64)),
        (Weight((5, 64), (Piece("lm_head.weight", (0, 4)),)), (5, 64)),
        (Weight((3, 64), (Piece("lm_head.weight", (0, 4)),)), (3, 64)),
        (Weight((4, 64), (Piece("lm_head.weight", (0, 4), (63, 64)),)), (4, 64)),
        (Weight((8, 64), (Piece("lm_head.weight", (316, 324)),)), (8, 64)),
    ],
)
def test_pieces_that_do_not_fill_the_destination_are_refused(
    shared: Callable[..., Path], weight: Weight, shape: tuple[int, ...]
) -> None:
    path = shared(family="llama")
    with (
        Checkpoint(path, load_spec(path)) as checkpoint,
        pytest.raises(ValueError, match=r"must be|does not fit"),
    ):
        checkpoint.read(weight, torch.zeros(shape))


def test_only_the_bytes_of_the_slices_are_copied(shared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared(family="llama")
    spec = load_spec(path)
    slices: list[int] = []
    read_slice = Checkpoint._slice

    def record(self: Checkpoint, piece: Piece) -> torch.Tensor:
        data = read_slice(self, piece)
        slices.append(data.numel())
        return data

    monkeypatch.setattr(checkpoint_module.Checkpoint, "_slice", record)
    weights = all_weights(spec, PARTS[0])
    with Checkpoint(path, spec) as checkpoint:
        for weight in weights.values():
            checkpoint.read(weight, torch.empty(weight.shape))
    assert sum(slices) == sum(torch.Size(weight.shape).numel() for weight in weights.values())


PEAK_PROGRAM = """
import sys, threading, torch
from helix.models.checkpoint import Checkpoint
from helix.models.families import load_spec
from helix.models.parts import Part
from helix.models.weights import layer_weights, model_weights, tensor_shapes

def private_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, private_bytes())

torch.set_num_threads(1)
spec = load_spec(sys.argv[1])
part = Part((4, 6), (2, 3), (4, 6), (1536, 2304), (0, 256))
sizes = [torch.Size(shape).numel() * 4 for shape in tensor_shapes(spec).values()]
torch.zeros(1 << 20).to(torch.bfloat16)
peak = start = private_bytes()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
kept = []
with Checkpoint(sys.argv[1], spec) as checkpoint:
    for weights in [model_weights(spec, part)] + [layer_weights(spec, n, part) for n in range(spec.num_layers)]:
        for weight in weights.values():
            kept.append(torch.empty(weight.shape))
            checkpoint.read(weight, kept[-1])
peak = max(peak, private_bytes())
done.set()
watcher.join()
print(peak - start, sum(w.numel() * 4 for w in kept), max(sizes), sum(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_host_memory_peaks_below_the_shard_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden": 1024, "heads": 8, "kv_heads": 4, "head_dim": 128, "ffn": 3072, "vocab": 1024, "layers": 4}
    path = make_checkpoint(tmp_path / "model", **sizes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    peak, shard, largest, total = map(int, done.stdout.split())
    assert total > 190e6
    assert shard < 0.3 * total
    assert 0.9 * shard < peak < shard + largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_are_finite_scaled_and_repeatable(
    shared: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    spec = load_spec(shared(family=family) / "config.json")
    for role, weight in all_weights(spec, whole(spec)).items():
        role = role.rpartition(".")[2]
        first, second = torch.full((2, *weight.shape), torch.nan, dtype=dtype)
        fill_dummy(role, weight.shape[-1], first, torch.Generator().manual_seed(3))
        fill_dummy(role, weight.shape[-1], second, torch.Generator().manual_seed(3))
        assert torch.equal(first, second)
        if role.endswith("norm"):
            assert (first == 1).all()
        elif not role.endswith("bias"):
            wanted = 1.0 if role == "embedding" else weight.shape[1] ** -0.5
            assert first.float().std().item() == pytest.approx(wanted, rel=0.1)
        else:
            assert 0 < first.abs().max() < 0.2


def test_dummy_weights_may_be_empty(shared: Callable[..., Path]) -> None:
    spec = load_spec(shared(family="qwen2"))
    for role, weight in layer_weights(spec, 0, PARTS[2]).items():
        fill_dummy(role, 64, torch.empty(weight.shape))


def test_dummy_copies_agree_between_ranks_and_dummy_shards_do_not(shared: Callable[..., Path]) -> None:
    spec = load_spec(shared(family="llama", kv_heads=4))
    first, second = (0, spec.num_heads // 2), (spec.num_heads // 2, spec.num_heads)
    heads, kv_heads, middle, vocab = (0, spec.num_heads), (0, spec.num_kv_heads), spec.ffn_size // 2, (0, 64)
    ranks = []
    for part in (
        Part(heads, kv_heads, first, (0, middle), vocab),
        Part(heads, kv_heads, second, (middle, spec.ffn_size), vocab),
    ):
        [layer] = layers = [{role: torch.empty(w.shape) for role, w in layer_weights(spec, 0, part).items()}]
        top = {role: torch.empty(w.shape) for role, w in model_weights(spec, part).items()}
        fill(
            cast(Decoder, SimpleNamespace(spec=spec, part=part, top=top, layers=layers, next=None, device="cpu")), None
        )
        ranks.append(top | layer)
    one, other = ranks
    assert {role for role in one if torch.equal(one[role], other[role])} == set(one) - {"o", "gate_up", "down"}
    whole_columns = spec.num_heads * spec.head_dim
    assert one["o"].shape[1] == whole_columns // 2
    assert one["o"].std().item() == pytest.approx(whole_columns**-0.5, rel=0.1)


def test_expected_tensors_are_those_of_the_reference_model(shared: Callable[..., Path]) -> None:
    for family in FAMILIES:
        path = shared(family=family)
        assert tensor_shapes(load_spec(path)) == {name: tuple(t.shape) for name, t in all_tensors(path).items()}
