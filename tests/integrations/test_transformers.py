"""The Trainer of transformers, on a tiny vision transformer with random weights."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from private import RATE, Applied
from torch.optim.lr_scheduler import StepLR

from dpguard import diagnosis

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
BATCH = 4


class Images(torch.utils.data.Dataset):
    """Random pictures of two classes."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(size, 3, 8, 8, generator=generator)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": torch.tensor(i % 2)}


class Private:
    """Model, optimizer, scheduler and accountant."""

    def __init__(self, package, sigma=1.0, accountant=None):
        torch.manual_seed(0)
        config = package.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = package.ViTForImageClassification(config)
        # Tokens and positions are raw parameters that are added to one another: not per sample.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer" in name or "classifier" in name)
        self.model = GradSampleModule(model)
        self.dp = DPOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            noise_multiplier=sigma,
            max_grad_norm=0.5,
            expected_batch_size=BATCH,
        )
        self.accountant = accountant or RDPAccountant()
        self.dp.attach_step_hook(self.accountant.get_optimizer_hook_fn(RATE))
        self.scheduler = StepLR(self.dp, step_size=1, gamma=0.5)
        self.applied = Applied(self.dp)

    def trainer(self, package, folder, **options):
        arguments = package.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            max_grad_norm=0.0,
            remove_unused_columns=False,  # the wrapper hides the signature of forward
            logging_strategy="no",
            **{"save_strategy": "no", "max_steps": 4, **options},
        )
        return package.Trainer(
            model=self.model,
            args=arguments,
            train_dataset=Images(16),
            optimizers=(self.dp, self.scheduler),
        )


@pytest.fixture
def transformers(accelerate):
    """The package."""
    return pytest.importorskip("transformers")


def assert_intended(private, rates, sigmas, **options):
    # Fewer weights than elsewhere, and gradients of their own: noise is measured less exactly.
    private.applied.assert_intended(private.accountant, rates, sigmas, within=0.1, **options)


def test_train(guard, transformers, tmp_path):
    """The Trainer clears gradients on the model only; each step is its own, noised, accounted."""
    private = Private(transformers)
    private.trainer(transformers, tmp_path).train()
    assert_intended(private, [0.1, 0.05, 0.025, 0.0125], [1.0] * 4)
    assert {v.cause for v in guard.violations} <= {diagnosis.NOT_POISSON}  # batches are shuffled


def test_a_callback_that_changes_the_noise(guard, transformers, tmp_path):
    """It is given the Trainer's own object for the optimizer; what it writes there is applied."""
    private = Private(transformers)
    trainer = private.trainer(transformers, tmp_path)

    class Quieter(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            optimizer.noise_multiplier = 2.0

    trainer.add_callback(Quieter())
    trainer.train()
    assert_intended(private, [0.1, 0.05, 0.025, 0.0125], [1.0, 2.0, 2.0, 2.0])


def test_resume_from_checkpoint(guard, transformers, tmp_path):
    """In another process: the rate at which training stopped, and the budget spent so far."""
    first = Private(transformers)
    first.trainer(transformers, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    second = Private(transformers, accountant=first.accountant)
    saved = str(tmp_path / "checkpoint-2")
    second.trainer(transformers, tmp_path).train(resume_from_checkpoint=saved)
    assert_intended(second, [0.025, 0.0125], [1.0] * 2, before=[1.0] * 2)
    assert guard.violations == ()
