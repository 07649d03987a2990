"""Lightning's Trainer: automatic and manual optimization, and a resume."""

from __future__ import annotations

import pytest
import torch
from private import Applied, Private
from torch.optim.lr_scheduler import StepLR

from dpguard import diagnosis

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
        self.private = Private(sigma=1.0, **options)
        self.called = self.private.called
        self.applied = Applied(self.private.dp)

    def configure_optimizers(self):
        scheduler = StepLR(self.private.dp, step_size=1, gamma=0.5)
        return [self.private.dp], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, _index):
        (x,) = batch
        return self.called(x).mean()


class Manual(Automatic):
    """The module steps for itself, through Lightning's objects."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, _index):
        (x,) = batch
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(self.called(x).mean())
        optimizer.step()
        scheduler.step()


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


RATES = [0.1 * 0.5**step for step in range(2 * STEPS)]


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_fit(guard, kind, tmp_path):
    """Rate, noise, steps and budget."""
    module = kind()
    trainer(tmp_path).fit(module, loader())
    module.applied.assert_intended(module.private.accountant, RATES[:STEPS], [1.0] * STEPS)
    assert {v.cause for v in guard.violations} <= {diagnosis.NOT_POISSON}  # nobody has claimed it
    failed = {name for name, count in guard.last_step.checks.items() if count.failed}
    assert failed <= {"accounting.sampling"}


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_noise_changed_through_lightnings_object(guard, kind, tmp_path):
    """What a module writes to ``self.optimizers()`` is what is applied and accounted."""

    class Quieter(kind):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().noise_multiplier = 1.0 + batch_idx

    module = Quieter()
    trainer(tmp_path).fit(module, loader())
    sigmas = [1.0, 2.0, 3.0, 4.0]
    module.applied.assert_intended(module.private.accountant, RATES[:STEPS], sigmas)


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_resume(guard, kind, tmp_path):
    """From a checkpoint, with the rate at which training stopped and the budget spent so far."""
    first = kind()
    fit = trainer(tmp_path, enable_checkpointing=True)
    fit.fit(first, loader())
    fit.save_checkpoint(str(tmp_path / "here.ckpt"))
    second = kind(accountant=first.private.accountant)
    trainer(tmp_path, epochs=2).fit(second, loader(), ckpt_path=str(tmp_path / "here.ckpt"))
    second.applied.assert_intended(
        second.private.accountant, RATES[STEPS:], [1.0] * STEPS, before=[1.0] * STEPS
    )
    assert {v.cause for v in guard.violations} <= {diagnosis.NOT_POISSON}  # nobody has claimed it
