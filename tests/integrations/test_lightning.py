"""Lightning's Trainer: automatic and manual optimization, and a resume."""

from __future__ import annotations

import pytest
import torch
from private import Private
from torch.optim.lr_scheduler import StepLR

pl = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # About loggers, workers, tensorboard and the like.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 4


class Automatic(pl.LightningModule):
    """Lightning steps optimizer and scheduler."""

    def __init__(self, **options):
        super().__init__()
        self.private = Private(**options)
        self.called = self.private.called
        self.rates, self.sigmas, self.given = [], [], []

    def configure_optimizers(self):
        scheduler = StepLR(self.private.dp, step_size=1, gamma=0.5)
        return [self.private.dp], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, _index):
        (x,) = batch
        return self.called(x).mean()

    def step_and_measure(self, step):
        rate = self.private.dp.param_groups[0]["lr"]
        moved, silent = self.private.moved(step)
        noise = silent.std().item() * self.private.batch / rate / self.private.bound
        self.rates.append(moved.mean().item())
        self.sigmas.append(noise)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.given.append(optimizer)
        self.step_and_measure(lambda: optimizer.step(closure=optimizer_closure))


class Manual(Automatic):
    """The module steps for itself, through Lightning's objects."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, _index):
        (x,) = batch
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.given.append(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.called(x).mean())
        self.step_and_measure(optimizer.step)
        scheduler.step()

    optimizer_step = pl.LightningModule.optimizer_step


def loader():
    data = torch.utils.data.TensorDataset(torch.zeros(2 * STEPS, 3))
    return torch.utils.data.DataLoader(data, batch_size=2)


def trainer(folder, epochs=1, **options):
    return pl.Trainer(
        default_root_dir=str(folder),
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_fit(guard, kind, tmp_path):
    """Applied rate, and accounted steps."""
    module = kind()
    trainer(tmp_path).fit(module, loader())
    assert module.rates == pytest.approx([0.1, 0.05, 0.025, 0.0125], rel=1e-3)
    assert module.private.accounted == [(0.0, STEPS)]
    assert guard.violations == ()
    assert guard.last_step.ok


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_noise_changed_through_lightnings_object(guard, kind, tmp_path):
    """What a module writes to ``self.optimizers()`` is what is applied and accounted."""

    class Quieter(kind):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().noise_multiplier = 1.0 + batch_idx

    module = Quieter(sigma=9.0)
    trainer(tmp_path).fit(module, loader())
    assert module.sigmas == pytest.approx([1.0, 2.0, 3.0, 4.0], rel=0.05)
    assert module.private.accounted == [(sigma, 1) for sigma in (1.0, 2.0, 3.0, 4.0)]


def test_resume(guard, tmp_path):
    """From a checkpoint, the rate that is applied is the one at which training stopped."""
    first = Automatic()
    fit = trainer(tmp_path, enable_checkpointing=True)
    fit.fit(first, loader())
    fit.save_checkpoint(str(tmp_path / "here.ckpt"))
    second = Automatic()
    trainer(tmp_path, epochs=2).fit(second, loader(), ckpt_path=str(tmp_path / "here.ckpt"))
    expected = [0.1 * 0.5**step for step in range(STEPS, 2 * STEPS)]
    assert second.rates == pytest.approx(expected, rel=1e-2)
    assert second.private.accounted == [(0.0, STEPS)]
    assert guard.violations == ()
