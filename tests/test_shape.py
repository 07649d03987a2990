"""Noise of the right size and the wrong shape is refused, and Gaussian noise is not."""

from __future__ import annotations

import pytest
import torch
from digits import Training
from releases import needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit.noise import SCALE
from dpguard.audit.shape import Shape

pytestmark = needs_reshaping


def of_one_sign(like):
    return torch.randn_like(like).abs()


def uniform(like):
    return (torch.rand_like(like) - 0.5) * 12**0.5


def cut_off(like):
    drawn = torch.randn_like(like)
    return torch.where(drawn.abs() > 2, torch.randn_like(like).clamp(-2, 2), drawn)


def redrawn(like):
    """What would be beyond three standard deviations is drawn anew, and all is scaled for that."""
    drawn = torch.randn_like(like)
    while (beyond := drawn.abs() > 3).any():
        drawn = torch.where(beyond, torch.randn_like(like), drawn)
    return drawn / 0.98658


def laplace(like):
    signs = torch.randint_like(like, 2) * 2 - 1
    return signs * torch.empty_like(like).exponential_() * 0.5**0.5


@pytest.mark.parametrize(("draw", "within"), [(of_one_sign, 60), (uniform, 160), (redrawn, 160)])
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_noise_of_another_shape_is_refused(mode, draw, within):
    """Its norms are those of Gaussian noise."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        optimizer = training.optimizer

        def add_noise():
            std = optimizer.noise_multiplier * optimizer.max_grad_norm
            for p in optimizer.params:
                p.grad = (p.summed_grad + std * draw(p.summed_grad)).view_as(p)

        optimizer.add_noise = add_noise
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale.*not Gaussian noise"):
            training.run(within)
        assert {(v.check, v.cause) for v in guard.violations} == {(SCALE, diagnosis.NOISE_SCALE)}


@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm(seed):
    """In 20,000 evaluations."""
    generator, shape = torch.Generator().manual_seed(seed), Shape()
    for values in 0.3 * torch.randn(4000, 64, generator=generator):
        assert not shape.take(values.tolist(), 0.3)


def test_what_is_cut_off_is_found():
    """At two standard deviations, whose norm is smaller by less than a tenth."""
    torch.manual_seed(1)
    shape = Shape()
    assert any(shape.take(cut_off(torch.empty(64)).tolist(), 1.0) for _ in range(20))


@pytest.mark.parametrize("before", [40, 400, 4000])
def test_noise_that_is_replaced_later_is_found(before):
    """When the values since then are about as many as those before, or some hundreds."""
    torch.manual_seed(2)
    shape, step = Shape(), torch.empty(40)
    assert not any(shape.take(torch.randn_like(step).tolist(), 1.0) for _ in range(before // 40))
    within = (before + 1000) // 40
    assert any(shape.take(uniform(step).tolist(), 1.0) for _ in range(within))


def test_values_in_between_count():
    """A million that are within four standard deviations, or one that is far beyond all."""
    assert not Shape().take([-4.8, 4.7], 1.0, 999_998)
    assert Shape().take([-3.9, 4.0], 1.0, 999_998)
    assert Shape().take([-4.8, 12.0], 1.0, 999_998)


def test_laplace_noise_is_too_large():
    """As many of its values as a model of some size has."""
    torch.manual_seed(3)
    drawn = laplace(torch.empty(1_000_000))
    assert float(drawn.square().mean()) == pytest.approx(1.0, rel=0.02)
    assert Shape().take(drawn[:100].tolist() + [float(v) for v in torch.aminmax(drawn)], 1.0, 10**6)


@pytest.mark.parametrize("seed", range(3))
def test_no_false_alarm_of_extremes(seed):
    """Of what torch's generator makes, which has few values beyond five standard deviations."""
    generator, shape = torch.Generator().manual_seed(seed), Shape()
    for _ in range(100):
        drawn = torch.normal(0, 0.3, (1_000_000,), generator=generator)
        extremes = [float(value) for value in torch.aminmax(drawn)]
        assert not shape.take(extremes, 0.3, drawn.numel() - 2)


@pytest.mark.parametrize("values", [[float("nan")] * 5, [float("inf")], []])
def test_nothing_to_judge(values):
    """What is not finite says nothing."""
    assert not Shape().take(values, 1.0)


@pytest.mark.parametrize(("bound", "within"), [(1.8, 3), (2.0, 4), (2.5, 12), (3.0, 60)])
def test_noise_that_is_clamped_has_the_same_largest_value_in_each_step(bound, within):
    """That is another matter than noise that stays, of which the norm stays as well."""
    generator, shape = torch.Generator().manual_seed(3), Shape()
    scale = torch.randn(1_000_000, generator=generator).clamp(-bound, bound).std()

    def take(values):
        extremes = [values.min().item(), values.max().item()]
        return shape.take(extremes, 1.0, len(values) - 2, values.norm().item())

    draws = (torch.randn(640, generator=generator).clamp(-bound, bound) for _ in range(within))
    assert any(take(values / scale) for values in draws)


def test_noise_that_stays_is_taken_in_once():
    values, shape = torch.randn(640, generator=torch.Generator().manual_seed(3)), Shape()
    extremes, norm = [values.min().item(), values.max().item()], values.norm().item()
    assert not any(shape.take(extremes, 1.0, 638, norm) for _ in range(300))
