"""The measures of the report, compared with dense references and known values."""

import math

import pytest
import torch
from graft_trainer.analysis.similarity import cka, gram
from graft_trainer.analysis.spectra import LEADING, dense_spectrum, effective_rank, kinds_of, low_rank_spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(48, 80, 8), (80, 48, 8), (12, 10, 32)])
def test_a_low_rank_spectrum_equals_that_of_the_dense_product(outputs: int, inputs: int, rank: int) -> None:
    a, b = normal(rank, inputs), normal(outputs, rank, seed=1)
    dense = 0.5 * b @ a
    found = low_rank_spectrum(a, b, 0.5)
    count = min(rank, outputs, inputs)
    torch.testing.assert_close(found.values[:count], torch.linalg.svdvals(dense)[:count], rtol=1e-4, atol=1e-4)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-5)


def test_a_zero_update_has_an_effective_rank_of_zero() -> None:
    found = low_rank_spectrum(normal(4, 20), torch.zeros(30, 4), 2.0)
    assert found.norm == 0
    assert effective_rank(found.values) == 0


def test_the_leading_singular_values_of_a_large_matrix_are_found_without_a_full_decomposition() -> None:
    left, right = torch.linalg.qr(normal(1200, 80))[0], torch.linalg.qr(normal(1100, 80, seed=1))[0]
    wanted = 0.8 ** torch.arange(80.0)
    matrix = left * wanted @ right.T
    state = torch.random.get_rng_state()
    found = dense_spectrum(matrix)
    torch.testing.assert_close(found.values[:20], wanted[:20], rtol=1e-3, atol=1e-5)
    assert len(found.values) == LEADING and not found.complete
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert torch.equal(state, torch.random.get_rng_state())  # the random state of the run does not change


def test_a_small_matrix_is_decomposed_completely() -> None:
    matrix = normal(40, 90)
    found = dense_spectrum(matrix)
    assert found.complete
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix))


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),  # equal values count fully
        ([5.0], 1.0),
        ([2.0, 0.0, 0.0], 1.0),
        ([0.5, 0.25, 0.25], math.exp(1.5 * math.log(2))),  # entropy of 1/2, 1/4, 1/4 is 1.5 bits
        ([], 0.0),
    ],
)
def test_effective_rank_of_known_spectra(values: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(7 * torch.tensor(values)) == pytest.approx(rank, rel=1e-6)  # the scale has no effect


def test_cka_does_not_depend_on_rotation_scale_and_shift() -> None:
    states = normal(60, 16)
    rotation = torch.linalg.qr(normal(16, 16, seed=1))[0]
    assert cka(gram(states), gram(states)) == pytest.approx(1)
    assert cka(gram(states), gram(3 * states @ rotation + 5)) == pytest.approx(1, abs=1e-5)


def test_cka_of_unrelated_states_is_small_even_with_more_dimensions_than_tokens() -> None:
    x, y = gram(normal(64, 512)), gram(normal(64, 512, seed=1))
    assert abs(cka(x, y)) < 0.1
    centred = torch.eye(64, dtype=torch.double) - 1 / 64
    x, y = centred @ x @ centred, centred @ y @ centred
    biased = float((x * y).sum() / (x.norm() * y.norm()))
    assert biased > 0.8  # the value of the plain estimator


def test_cka_approaches_the_plain_estimator_with_many_tokens() -> None:
    x = normal(2000, 8)
    y = torch.cat([x[:, :4], normal(2000, 4, seed=1)], dim=1)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    cross = (centred_x.T @ centred_y).norm() ** 2
    plain = cross / (
        (centred_x.T @ centred_x).norm() * (centred_y.T @ centred_y).norm()
    )  # Kornblith et al. 2019, eq. 4
    assert cka(gram(x), gram(y)) == pytest.approx(float(plain), abs=5e-3)


def test_cka_of_constant_states_is_nan() -> None:
    assert math.isnan(cka(gram(torch.ones(10, 4)), gram(normal(10, 4))))


def test_kinds_are_short_if_they_are_unique_and_longer_otherwise() -> None:
    llama = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)] + ["model.embed_tokens"]
    found = kinds_of(llama)
    assert found["model.layers.11.self_attn.q_proj"] == ("q_proj", 11)
    assert found["model.embed_tokens"] == ("embed_tokens", None)
    t5 = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ]
    found = kinds_of(t5)
    assert found[t5[1]] == ("encoder.SelfAttention.q", 1)
    assert found[t5[2]] == ("decoder.SelfAttention.q", 1)
    assert found[t5[3]] == ("decoder.EncDecAttention.q", 1)
    assert found[t5[4]] == ("wo", 1)
