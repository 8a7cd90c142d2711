"""NF4 against its definition in float64 and against codes that bitsandbytes made; QPiSSA's rounds against theirs."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import basiscli.linalg.nf4 as module
from basiscli.linalg.nf4 import BLOCK, LEVELS, Start, nf4_rounded, quantised_start
from basiscli.linalg.svd import SVD

HALVES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).double().split(BLOCK) if tensor.numel() else ()


def codes(tensor: Tensor) -> list[int]:
    """Return the index of each element's nearest level, blocks of zeros as level zero."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    found = []
    for block in blocks_of(tensor):
        distances = (block[:, None] / block.abs().max().clamp_min(1e-300) - levels).abs()
        found += distances.argmin(1).tolist()
    return found


# The format -----------------------------------------------------------------------------------------------------------


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Bitsandbytes' `create_normal_map`, which took them from SciPy in float32."""
    outermost, inverse = 0.9677083, NormalDist().inv_cdf
    above = [inverse(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    below = [-inverse(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    assert sorted(level / above[0] for level in [*below, 0.0, *above]) == pytest.approx(LEVELS, abs=2e-7)
    assert torch.tensor(LEVELS).double().tolist() == list(LEVELS)  # nothing is lost in float32


def test_the_codes_of_bitsandbytes() -> None:
    """What `quantize_4bit(quant_type="nf4")` of 0.50.2 packs, the first element in the high half of a byte."""
    numbers = torch.tensor([((i * 37) % 101 - 50) / 64 for i in range(130)])
    packed = (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
        "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18f2"
    )
    assert "".join(f"{code:x}" for code in codes(nf4_rounded(numbers))) == packed


@dtypes
@pytest.mark.parametrize("shape", [(64,), (3, 64), (1,), (63,), (65,), (7, 129), (100, 33), (2, 3, 32), (1000, 40)])
@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_it_is_the_nearest_level_in_float64(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    weight = (gaussian(shape) * scale).to(dtype)
    rounded = nf4_rounded(weight)
    assert (rounded.dtype, rounded.shape) == (dtype, weight.shape)
    levels, epsilon = torch.tensor(LEVELS, dtype=torch.float64), torch.finfo(dtype).eps
    for before, after in zip(blocks_of(weight), blocks_of(rounded), strict=True):
        absmax = before.abs().max()
        distance = (before[:, None] - levels * absmax).abs()
        nearest, code = distance.min(1)
        assert bool(((after - levels[code] * absmax).abs() <= epsilon * absmax).all())
        assert bool(((before - after).abs() <= nearest + epsilon * absmax).all())


def test_the_middle_between_two_levels_is_the_lower() -> None:
    levels = torch.tensor(LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    one = torch.ones(1)  # the block's largest
    for values, expected in (
        (middle, levels[:-1]),
        (torch.nextafter(middle, one), levels[1:]),
        (torch.nextafter(middle, -one), levels[:-1]),
    ):
        assert torch.equal(nf4_rounded(torch.cat([one, values]))[1:], expected)
    # The thresholds of bitsandbytes' kernel, lowest and highest, and those beside zero.
    kernel = torch.tensor([-0.8480964004993439, -0.045525018125772476, 0.03979014977812767, 0.8614784181118011])
    assert torch.equal(middle[[0, 6, 7, 14]], kernel)


def test_gaussian_weights_lose_nine_per_cent() -> None:
    weight = gaussian((300, 640))
    assert float((weight - nf4_rounded(weight)).norm() / weight.norm()) == pytest.approx(0.0915, abs=1e-3)


@dtypes
def test_blocks_go_on_across_rows(dtype: torch.dtype) -> None:
    weight = gaussian((24, 40)).to(dtype)
    flat = nf4_rounded(weight.reshape(-1))
    assert torch.equal(nf4_rounded(weight).reshape(-1), flat)
    assert not torch.equal(torch.stack([nf4_rounded(row) for row in weight]).reshape(-1), flat)
    outlier = weight.clone()
    outlier[0, 0] = 100
    changed = (nf4_rounded(outlier) != nf4_rounded(weight)).reshape(-1).nonzero().max()
    assert int(changed) < BLOCK


def test_what_is_transposed_is_quantised_as_it_is_indexed() -> None:
    weight = gaussian((96, 70))
    assert torch.equal(nf4_rounded(weight.mT), nf4_rounded(weight.mT.contiguous()))
    assert not torch.equal(nf4_rounded(weight.mT), nf4_rounded(weight).mT)


@dtypes
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_single(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.full(shape, -0.3, dtype=dtype)
    assert torch.equal(nf4_rounded(weight), weight)
    assert nf4_rounded(weight).shape == weight.shape


@dtypes
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_equal_elements_stay(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((3, 50), value, dtype=dtype)
    assert torch.equal(nf4_rounded(weight), weight)


def test_a_block_of_zeros_beside_others() -> None:
    weight = torch.cat([torch.zeros(BLOCK), gaussian((BLOCK,)), torch.zeros(9)])
    rounded = nf4_rounded(weight)
    assert not rounded[:BLOCK].any()
    assert not rounded[-9:].any()
    assert rounded[BLOCK : 2 * BLOCK].any()


@pytest.mark.parametrize("largest", [3e38, 1e-37, 2e-38, 1e-41, 1.4e-45])
def test_the_ends_of_float32(largest: float) -> None:
    weight = gaussian((3, 70))
    weight = weight / weight.abs().max() * largest
    rounded = nf4_rounded(weight)
    assert bool(torch.isfinite(rounded).all())
    assert float(rounded.abs().max()) <= float(weight.abs().max())
    if largest > 1e-38:
        assert float(rounded.abs().max()) == float(weight.abs().max())
    elif largest < 1e-40:  # relative to 1e-38, as in bitsandbytes on a CPU
        assert not rounded.any()


def test_float64_is_rounded_to_float32() -> None:
    weight = gaussian((10, 30)).double() * (1 + 1e-12)
    assert torch.equal(nf4_rounded(weight), nf4_rounded(weight.float()).double())


@dtypes
@pytest.mark.parametrize("size", [2 * BLOCK, 6 * BLOCK, 6 * BLOCK + 1])
def test_the_size_of_chunks_changes_no_bit(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian((size,)).to(dtype)
    whole = nf4_rounded(weight)
    monkeypatch.setattr(module, "_CHUNK", 4 * BLOCK)
    assert torch.equal(nf4_rounded(weight), whole)


def test_the_input_is_left_alone() -> None:
    weight = gaussian((5, 70))
    before = weight.clone()
    nf4_rounded(weight)
    quantised_start(weight, pissa(2), rounds=2)
    assert torch.equal(weight, before)


# Rounding twice -------------------------------------------------------------------------------------------------------


@dtypes
def test_the_result_is_its_own_rounding(dtype: torch.dtype) -> None:
    rounded = nf4_rounded((gaussian((500, 130)) * 0.02).to(dtype))
    assert torch.equal(nf4_rounded(rounded), rounded)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_survive_a_narrower_storage_of_the_result(dtype: torch.dtype) -> None:
    rounded = nf4_rounded(gaussian((500, 128)) * 0.02)
    stored = rounded.to(dtype)
    assert codes(stored) == codes(rounded)
    again = nf4_rounded(stored)
    assert codes(again) == codes(rounded)
    torch.testing.assert_close(again, stored, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert not torch.equal(again, stored)  # the largest magnitude was rounded, and its multiples are rounded anew
    assert torch.equal(nf4_rounded(again), again)


def test_how_far_a_border_is_from_its_level() -> None:
    """Why codes survive: two roundings of bfloat16, of element and absmax, move their ratio by 2⁻⁷."""
    levels = [level for level in LEVELS if level]
    middle = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    assert min(abs(border / level - 1) for level in levels for border in middle) > 0.1
    assert torch.finfo(torch.bfloat16).eps < 0.008  # twice what one rounding moves


def test_codes_do_not_survive_a_narrower_storage_of_the_weight() -> None:
    """So a residual has to be quantised as it is stored to know what a load will compute with."""
    weight = gaussian((500, 128)) * 0.02
    different = sum(
        a != b for a, b in zip(codes(nf4_rounded(weight.bfloat16())), codes(nf4_rounded(weight)), strict=True)
    )
    assert 0 < different < 0.02 * weight.numel()


# Starts for a quantised base ------------------------------------------------------------------------------------------


def pissa(rank: int) -> Start:
    svd = SVD(exact=True, seed=0)

    def start(matrix: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = svd.top(matrix, rank)
        return u * s.sqrt(), s.sqrt()[:, None] * vh

    return start


def milora(rank: int) -> Start:
    svd = SVD(exact=True, seed=0)

    def start(matrix: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = svd.bottom(matrix, rank)
        return u * s.sqrt(), s.sqrt()[:, None] * vh

    return start


def trained(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a matrix with a spectrum like a language model's: a few strong directions over a flat rest."""
    noise = gaussian(shape, seed)
    u, s, vh = torch.linalg.svd(noise.double(), full_matrices=False)
    strong = s + 8 * s[0] / torch.arange(1, len(s) + 1)
    matrix: Tensor = 0.02 * (u * strong) @ vh
    return matrix.float()


def lost(weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Return W − (nf4(W − BA) + BA)."""
    product = factors[0] @ factors[1]
    return weight - (nf4_rounded(weight - product) + product)


norms = pytest.mark.parametrize("norm", ["fro", "nuc"])
shapes = pytest.mark.parametrize("shape", [(192, 320), (320, 192), (200, 200)], ids=str)


@shapes
def test_one_round_is_the_start(shape: tuple[int, int]) -> None:
    weight = trained(shape)
    for start in (pissa(8), milora(8)):
        expected, found = start(weight), quantised_start(weight, start, rounds=1)
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@shapes
@pytest.mark.parametrize("rounds", [2, 5])
def test_it_is_the_algorithm_in_float64(shape: tuple[int, int], rounds: int) -> None:
    """QPiSSA-T-iters as it was published: res = W; T times B A = SVD_r(res), Q = nf4(W − B A), res = W − Q."""
    weight, rank = trained(shape).double(), 8
    rest = weight
    for _ in range(rounds):
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        product = (u[:, :rank] * s[:rank]) @ vh[:rank]
        rest = weight - nf4_rounded((weight - product).float()).double()
    b, a = quantised_start(weight.float(), pissa(rank), rounds=rounds)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    # An element at a border may fall to the other side: one step of one element among tens of thousands.
    assert float((b.double() @ a.double() - product).norm() / product.norm()) < 1e-4
    error = lost(weight.float(), (b, a)).double()
    assert float(error.norm()) == pytest.approx(float((rest - product).norm()), rel=1e-4)


@norms
@shapes
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_falls_with_the_rounds_and_is_below_a_plain_start(
    shape: tuple[int, int], rank: int, norm: str
) -> None:
    weight = trained(shape)
    errors = [math.inf] + [
        float(torch.linalg.matrix_norm(lost(weight, quantised_start(weight, pissa(rank), rounds=rounds)), norm))
        for rounds in range(1, 6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[5] < 0.99 * errors[1]
    plain = float(torch.linalg.matrix_norm(weight - nf4_rounded(weight), norm))  # QLoRA: B A = 0
    assert errors[1] < plain


def test_more_rounds_keep_the_principal_part() -> None:
    weight = trained((192, 320))
    (b, a), (b_5, a_5) = (quantised_start(weight, pissa(8), rounds=rounds) for rounds in (1, 5))
    cosine = float(((b @ a) * (b_5 @ a_5)).sum() / (b @ a).norm() / (b_5 @ a_5).norm())
    assert cosine > 0.99
    assert cosine < 1 - 1e-6


def test_a_minor_part_does_not_outlive_the_first_round() -> None:
    """Why such a start must have one round: the second takes the least of the rounding's noise."""
    weight = trained((200, 200))
    (b, a), (b_2, a_2) = (quantised_start(weight, milora(8), rounds=rounds) for rounds in (1, 2))
    cosine = float(((b @ a) * (b_2 @ a_2)).sum() / (b @ a).norm() / (b_2 @ a_2).norm())
    assert abs(cosine) < 0.1
    assert float(lost(weight, (b_2, a_2)).norm()) == pytest.approx(float(lost(weight, (b, a)).norm()), rel=0.02)


def test_a_start_is_asked_once_a_round_for_what_the_base_lacks() -> None:
    weight, asked = trained((64, 96)), []

    def start(matrix: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(matrix)
        return torch.zeros(64, 2), torch.zeros(2, 96)

    b, a = quantised_start(weight, start, rounds=3)
    assert torch.equal(asked[0], weight)
    assert len(asked) == 3
    assert all(torch.equal(matrix, weight - nf4_rounded(weight)) for matrix in asked[1:])
    assert not (b @ a).any()


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_whole_rank_and_zeros_leave_no_error(rounds: int) -> None:
    for weight in (trained((24, 40)), torch.zeros(24, 40)):
        error = lost(weight, quantised_start(weight, pissa(24), rounds=rounds))
        assert float(error.norm()) <= 1e-5 * float(weight.norm())
