"""The noise that draws tokens: uniform, a function of seed, position and column alone, and the same for ever."""

import math

import pytest
import torch
from torch import Tensor

from helix.noise import TOKEN_STREAM, _hash, gumbel, row_keys


def hashes(seeds: Tensor, positions: Tensor, num: int) -> Tensor:
    """What noise is made of: [B, num] integers below 2**32."""
    keys = row_keys(seeds.cpu().numpy(), positions.cpu().numpy(), TOKEN_STREAM)
    return _hash(torch.from_numpy(keys).to(seeds.device), num)


def uniform(seed: int, position: int, num: int) -> Tensor:
    return hashes(torch.tensor([seed]), torch.tensor([position]), num)[0].double() / 2**32


def test_hashes_are_uniform() -> None:
    found = hashes(torch.arange(100), torch.arange(100) * 3, 10_000)
    assert found.shape == (100, 10_000)
    assert 0 <= int(found.min()) < 2**19 and 2**32 - 2**19 < int(found.max()) < 2**32
    counts = torch.bincount(found.flatten() >> 26, minlength=64).double()
    expected = found.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(2 * 63)  # chi-squared, 5 deviations


def test_extreme_hashes_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helix.noise._hash", lambda keys, num, first: torch.tensor([[0, 2**32 - 1]]))
    noise = gumbel(torch.zeros(2, 1, dtype=torch.int64), 2)
    torch.testing.assert_close(noise, torch.tensor([[33 * math.log(2), -math.log(24 * math.log(2))]]))


def test_other_seeds_and_positions_are_uncorrelated() -> None:
    seeds, positions = (0, 1, 2, 3, 2**31, 2**32, 2**32 + 1, 2**62), (0, 1, 2, 3, 65_536, 2**32)
    rows = [uniform(seed, position, 20_000) for seed in seeds for position in positions]
    correlation = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)  # 5 standard deviations over 1,128 pairs


def test_neighbouring_columns_are_uncorrelated() -> None:
    u = uniform(3, 4, 200_001)
    for lag in (1, 2, 64, 4096):
        assert abs(float(torch.corrcoef(torch.stack((u[:-lag], u[lag:])))[0, 1])) < 4.5 / math.sqrt(200_001 - lag)


def test_noise_does_not_depend_on_the_batch_or_on_how_many_numbers_are_asked() -> None:
    seeds, positions = torch.tensor([4, 5, 2**62 + 1]), torch.tensor([0, 9, 2**40])
    whole = hashes(seeds, positions, 33)
    assert torch.equal(hashes(seeds[2:], positions[2:], 33), whole[2:])
    assert torch.equal(hashes(seeds, positions, 3), whole[:, :3])


def test_the_hash_keeps_its_numbers() -> None:
    """Recorded outputs: a change would silently change the tokens of every seeded request."""
    got = hashes(torch.tensor([0, 42]), torch.tensor([0, 123_456_789]), 3)
    assert got.tolist() == [[2710861526, 3893693456, 2290969320], [3355380768, 4173714113, 2037572285]]


@pytest.mark.gpu
def test_hashes_on_a_gpu_are_those_of_the_cpu() -> None:
    seeds, positions = torch.arange(5) * 2**60, torch.arange(5) * 2**33
    assert torch.equal(hashes(seeds.cuda(), positions.cuda(), 999).cpu(), hashes(seeds, positions, 999))
