"""SimSiam with a stop-gradient, trained with differential privacy on handwritten digits.

The training loop is the one everybody writes, ``target.detach()`` included, and Opacus alone
cannot run it: its first ``optimizer.step()`` raises ``ValueError: Per sample gradient is not
initialized``. Nothing here refers to dpguard; activate it from outside
(``DPGUARD=repair python simsiam_digits.py``) and the same loop trains.

The images are the 1,797 digits that ship inside scikit-learn. Three quarters of them are private
and train the encoder without labels. The rest counts as public: it provides the mean image and,
with its labels, the measurement of what the encoder has learned.

The seed is fixed so that results repeat. For data that is really private, do not fix it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "Config",
    "Digits",
    "Encoder",
    "Quality",
    "SimSiam",
    "augment",
    "evaluate",
    "load_data",
    "simsiam_loss",
    "total_steps",
    "train",
]

PRIVATE_IMAGES = 1347
FULL_SCALE = 16.0
SHOTS = 10


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run.

    Attributes:
        epochs: passes over the private images, on average, as Poisson sampling draws them.
        batch_size: expected number of images per step.
        noise_multiplier: standard deviation of the noise in units of ``max_grad_norm``.
        max_grad_norm: bound on the L2 norm of one person's gradient.
        delta: the δ of (ε, δ)-differential privacy; below 1 / ``PRIVATE_IMAGES``.
    """

    epochs: int = 60
    batch_size: int = 450
    noise_multiplier: float = 4.5
    max_grad_norm: float = 1.0
    learning_rate: float = 0.1
    momentum: float = 0.9
    delta: float = 1e-5
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)``, less the mean of the public ones, and labels ``(N,)``."""

    private: Tensor
    public: Tensor
    public_labels: Tensor


@dataclass(frozen=True)
class Quality:
    """What an embedding of the public images is worth.

    Attributes:
        accuracy: share of the images, in views as noisy as those trained on, that get the right
            class from the nearest of ``SHOTS`` labelled images per class, over many draws.
        spread: mean standard deviation of the coordinates of the L2-normalised embedding: about
            ``isotropic`` when it fills its space, 0 when it has collapsed to one point.
        isotropic: ``1 / sqrt(d)`` for an embedding of ``d`` coordinates.
    """

    accuracy: float
    spread: float
    isotropic: float


class Encoder(nn.Module):
    """Images ``(B, 1, 8, 8)`` to embeddings ``(B, width)``.

    There are no biases and tanh is odd, so ``f(-x) = -f(x)``: such an encoder cannot map
    everything to one point, which is the job that batch normalisation, not available under
    differential privacy, has in the original SimSiam.
    """

    def __init__(self, channels: int = 6, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(2 * channels * 16, width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 1, 8, 8)``."""
        x = F.layer_norm(images, images.shape[1:])
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(x))
        embedding: Tensor = self.head(x.flatten(1))
        return embedding


class SimSiam(nn.Module):
    """An encoder and the predictor that maps the embedding of one view to that of the other."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = Encoder(width=width)
        self.predictor = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.predictor.weight)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction from the first views, and the embedding of the second ones."""
        return self.predictor(self.encoder(first)), self.encoder(second)


def simsiam_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The asymmetric SimSiam loss: no gradient flows into the target."""
    return -F.cosine_similarity(prediction, target.detach(), dim=1).mean()


def load_data() -> Digits:
    """The digits in an order that is always the same."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1)
    images = images * (2 / FULL_SCALE)
    public = images[PRIVATE_IMAGES:]
    mean = public.mean(0)
    labels = torch.tensor(bunch.target)[order][PRIVATE_IMAGES:]
    return Digits(images[:PRIVATE_IMAGES] - mean, public - mean, labels)


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One random view of each image: rotated, sheared, scaled, shifted, and noisy.

    Args:
        images: shape ``(B, 1, 8, 8)``.
        generator: source of randomness, the global one by default.
    """

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale, shear = uniform(math.radians(8)), uniform(0.1).exp(), uniform(0.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, uniform(0.06)], 1)]
    rows.append(torch.stack([sin, cos, uniform(0.06)], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    brightness = uniform(0.3).exp().reshape(-1, 1, 1, 1)
    return moved * brightness + 0.7 * torch.randn(images.shape, generator=generator)


def total_steps(config: Config) -> int:
    """Number of optimizer steps that :func:`train` makes."""
    return config.epochs * math.ceil(PRIVATE_IMAGES / config.batch_size)


def train(
    model: SimSiam,
    images: Tensor,
    config: Config,
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Train ``model`` in place with DP-SGD.

    Args:
        model: the model, on ``config.device``.
        images: the private images, of shape ``(N, 1, 8, 8)``.
        config: hyper-parameters.
        on_step: called after each step with the number of steps made.

    Returns:
        The ε spent at ``config.delta``, from the accountant of the privacy engine.
    """
    torch.manual_seed(config.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum
    )
    engine = PrivacyEngine()
    private_model, private_optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(images), batch_size=config.batch_size),
        noise_multiplier=config.noise_multiplier,
        max_grad_norm=config.max_grad_norm,
    )
    step = 0
    for _ in range(config.epochs):
        for (batch,) in loader:
            first = augment(batch).to(config.device)
            second = augment(batch).to(config.device)
            private_optimizer.zero_grad()
            prediction, target = private_model(first, second)
            simsiam_loss(prediction, target).backward()
            private_optimizer.step()
            step += 1
            if on_step is not None:
                on_step(step)
    return float(engine.get_epsilon(config.delta))


@torch.no_grad()
def evaluate(encoder: nn.Module, digits: Digits, device: str = "cpu", draws: int = 20) -> Quality:
    """Measure the embedding of the public images, see :class:`Quality`.

    Always the same views and the same labelled images, so that encoders can be compared.

    Args:
        encoder: maps images to embeddings ``(B, d)``; ``nn.Flatten()`` measures the raw pixels.
        digits: only the public part is used.
        device: where the encoder is.
        draws: how often new views and new labelled images are drawn.
    """
    generator = torch.Generator().manual_seed(1)
    accuracy = spread = isotropic = 0.0
    for _ in range(draws):
        views = augment(digits.public, generator).to(device)
        embedding = F.normalize(encoder(views).cpu(), dim=1)
        accuracy += _few_shot_accuracy(embedding, digits.public_labels, generator) / draws
        spread += float(embedding.std(0).mean()) / draws
        isotropic = embedding.shape[1] ** -0.5
    return Quality(accuracy, spread, isotropic)


def _few_shot_accuracy(embedding: Tensor, labels: Tensor, generator: torch.Generator) -> float:
    """Nearest-neighbour accuracy with ``SHOTS`` random labelled images per class."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    rank_in_class = F.one_hot(shuffled).cumsum(0).gather(1, shuffled.unsqueeze(1)).squeeze(1)
    known, asked = order[rank_in_class <= SHOTS], order[rank_in_class > SHOTS]
    nearest = (embedding[asked] @ embedding[known].T).argmax(1)
    return float((labels[known][nearest] == labels[asked]).float().mean())


def main() -> None:
    """Train with the default hyper-parameters and print what came of it."""
    config, digits = Config(), load_data()
    torch.manual_seed(config.seed)
    model = SimSiam()
    print(f"accuracy before training: {evaluate(model.encoder, digits).accuracy:.1%}")
    epsilon = train(model, digits.private, config)
    print(f"accuracy after training: {evaluate(model.encoder, digits).accuracy:.1%}")
    print(f"privacy spent: epsilon = {epsilon:.2f} at delta = {config.delta:g}")


if __name__ == "__main__":
    main()
