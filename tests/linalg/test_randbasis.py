"""The generator against published vectors and against itself in other pieces; bases against their definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from basiscli.checkpoints.packing import packed, stored_form, unpacked
from basiscli.linalg.nola import factor_bases, seed_name, start_of
from basiscli.linalg.randbasis import RandomBases, philox4x32, stream_key, uniform

# Random123, tests/kat_vectors, the lines `philox4x32 10`: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def by_hand(counter: list[int], key: int) -> list[int]:
    """Philox-4x32-10 in Python's integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def values_by_hand(key: int, start: int, count: int) -> list[float]:
    found = []
    for place in range(start, start + count):
        counter, lane = divmod(place, 8)
        word = by_hand([counter % 2**32, counter >> 32, 0, 0], key)[lane // 2]
        half = word >> 16 if lane % 2 else word & 0xFFFF
        found.append((2 * (half - 2**16 if half >= 2**15 else half) + 1) / 2**16)
    return found


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    found = philox4x32(torch.tensor(words(counter))[:, None], high << 32 | low)
    assert found.flatten().tolist() == words(expected)


def test_many_counters_and_keys_against_integers_without_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 200), generator=generator)
    for key in (1, 2**63, 2**64 - 1, stream_key(7, "layers.0.q_proj", "A")):
        found = philox4x32(counters.clone(), key)
        assert found.T.tolist() == [by_hand(c, key) for c in counters.T.tolist()]


@pytest.mark.parametrize("start", [0, 3, 8 * 2**32 - 5, 8 * 2**40 + 1])
def test_values_are_odd_multiples_of_a_power_of_two(start: int) -> None:
    key = stream_key("test")
    assert uniform(key, start, 37).tolist() == values_by_hand(key, start, 37)


def test_any_slice_is_a_slice_of_the_whole_across_blocks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uniform(5, 0, 5000)
    monkeypatch.setattr("basiscli.linalg.randbasis._CPU_BLOCK", 16)
    for start, count in ((0, 5000), (1, 1), (127, 130), (4999, 1), (640, 512), (77, 0)):
        assert torch.equal(uniform(5, start, count), whole[start : start + count])


def test_values_look_uniform_and_streams_independent() -> None:
    one, other = uniform(stream_key(0, "a"), 0, 1 << 20), uniform(stream_key(0, "b"), 0, 1 << 20)
    sigma = (1 << 20) ** -0.5
    for values in (one, other):
        assert abs(values.double().mean()) < 5 * sigma / 3**0.5
        assert abs(values.double().square().mean() - 1 / 3) < 5 * sigma * (4 / 45) ** 0.5
        assert (values.abs() < 1).all()
        counts = torch.histc(values, 64, -1, 1)
        assert ((counts - 2**14) ** 2 / 2**14).sum() < 63 + 6 * (2 * 63) ** 0.5
    for shift in (0, 1, 2, 7, 8):
        assert abs((one * other.roll(shift)).mean()) < 5 * sigma / 3
        assert shift == 0 or abs((one * one.roll(shift)).mean()) < 5 * sigma / 3


def test_a_fresh_process_makes_the_same_bits() -> None:
    program = (
        "import torch; torch.manual_seed(9); torch.set_num_threads(2)\n"
        "from basiscli.linalg.nola import factor_bases\n"
        "a, b = factor_bases(3, 'model.layers.1.mlp.up_proj', rank=4, count=9, in_features=17, out_features=33)\n"
        "print(b.rows(slice(2, 4)).numpy().tobytes().hex(), a.rows(slice(8, 9)).numpy().tobytes().hex())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    a, b = factor_bases(3, "layers.1.mlp.up_proj", rank=4, count=9, in_features=17, out_features=33)
    assert out == [b.rows(slice(2, 4)).numpy().tobytes().hex(), a.rows(slice(8, 9)).numpy().tobytes().hex()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_bits() -> None:
    for start, count in ((0, 1 << 20), (8 * 2**32 - 5, 1000)):
        assert torch.equal(uniform(11, start, count, "cuda").cpu(), uniform(11, start, count))


def dense(bases: RandomBases) -> Tensor:
    size = bases.shape[0] * bases.shape[1]
    whole = torch.tensor(values_by_hand(bases.key, 0, bases.count * size), dtype=torch.float64)
    return whole.view(bases.count, *bases.shape) * bases.bound


@pytest.mark.parametrize("values", [1, 64, 1 << 18])
def test_combinations_and_projections_against_dense_float64(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basiscli.linalg.randbasis._VALUES", values)
    generator = torch.Generator().manual_seed(0)
    for bases in factor_bases(1, "h.0.c_fc", rank=3, count=10, in_features=5, out_features=7):
        whole = dense(bases)
        coefficients, matrix = torch.randn(10, generator=generator), torch.randn(bases.shape, generator=generator)
        torch.testing.assert_close(
            bases.combination(coefficients).double(), torch.einsum("k,kij->ij", coefficients.double(), whole)
        )
        torch.testing.assert_close(
            bases.projections(matrix).double(), torch.einsum("kij,ij->k", whole, matrix.double())
        )


def test_elements_have_the_variance_of_the_formula() -> None:
    a, b = factor_bases(0, "layers.0.q_proj", rank=8, count=300, in_features=96, out_features=64)
    for bases, fan in ((a, 96), (b, 8)):
        entries = bases.combination(start_of(bases)).double()
        # Coefficients of variance 1 and elements of variance 1/(fan·k): entries of variance 1/fan.
        assert float(entries.square().mean()) * fan == pytest.approx(1, rel=0.3)
        assert float(start_of(bases).square().mean()) == pytest.approx(1, rel=0.2)


def test_a_factor_has_no_more_bases_than_elements() -> None:
    a, b = factor_bases(0, "q_proj", rank=1, count=100, in_features=40, out_features=200)
    assert (a.count, b.count) == (40, 100)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"],
         "layers.0.mlp.up_proj"),
        (["bert.encoder.layer.3.output.dense", "encoder.layer.3.output.dense"], "encoder.layer.3.output.dense"),
        (["decoder.block.1.layer.0.SelfAttention.q"], "decoder.block.1.layer.0.SelfAttention.q"),
        (["transformer.h.11.attn.c_attn", "h.11.attn.c_attn"], "h.11.attn.c_attn"),
        (["lm_head"], "lm_head"),
        (["bert.pooler.dense", "pooler.dense"], "pooler.dense"),
        (["0.weight"], "0.weight"),
    ],
)  # fmt: skip
def test_bases_are_named_alike_however_a_model_is_loaded(names: list[str], expected: str) -> None:
    assert {seed_name(name) for name in names} == {expected}


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 363])
@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_coefficients_in_few_bits(count: int, bits: int, most: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 3
    stored = packed(values, bits)
    assert stored_form(count, bits) == ("U8", tuple(stored.shape))
    assert stored.dtype == torch.uint8
    blocks = -(-count // 64)
    assert len(stored) == 2 * blocks + (count if bits == 8 or count == 1 else -(-count // 2))
    found = unpacked(stored, count)
    for block in range(blocks):
        part, back = values[64 * block : 64 * block + 64], found[64 * block : 64 * block + 64]
        # Half a step, and what a scale of 8 bits takes from the largest.
        assert (back - part).abs().max() <= part.abs().max() * (0.5 / (most if count > 1 else 127) + 2**-8)


def test_coefficients_that_are_zero_or_not_as_many() -> None:
    assert torch.equal(unpacked(packed(torch.zeros(70), 4), 70), torch.zeros(70))
    assert torch.equal(unpacked(torch.ones(3, dtype=torch.float16), 3), torch.ones(3))
    for stored in (torch.ones(4), packed(torch.ones(70), 8), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="coefficients"):
            unpacked(stored, 3)
