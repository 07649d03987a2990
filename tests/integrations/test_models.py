"""Models of transformers, tiny and with random weights, which Opacus trains right by itself."""

from __future__ import annotations

import pytest
import torch
from healthy import GHOSTS, HOW, Case, assert_true, assert_untouched, trained, untouched
from opacus import GradSampleModule
from releases import FUNCTORCH
from truth import TOLERANCE, flat_rows, relative_error, rows_of

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = {"vocab_size": 19, "max_position_embeddings": 16}


def vit():
    config = transformers.ViTConfig(**SIZES, **STILL, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


def llama():
    config = transformers.LlamaConfig(
        **SIZES, **WORDS, num_key_value_heads=1, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config)


def qwen2():
    config = transformers.Qwen2Config(
        **SIZES, **WORDS, num_key_value_heads=1, tie_word_embeddings=False
    )
    return transformers.Qwen2ForCausalLM(config)


def roberta():
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES, **STILL, **WORDS)
    )


def pictures(rows, generator):
    return (torch.randn(rows, 3, 8, 8, generator=generator),)


def words(rows, generator):
    return (torch.randint(3, 19, (rows, 5), generator=generator),)


def losses(called, data):
    return called(data).logits.square().flatten(1).mean(dim=1)


def made(build):
    """In training mode; where no seed is set, weights are random all the same."""
    return lambda: build().train()


CASES = {
    "ViT": Case(made(vit), pictures, losses),
    # Their norms compute in single precision, whatever they are given.
    "Llama": Case(made(llama), words, losses, torch.float32),
    "Qwen2": Case(made(qwen2), words, losses, torch.float32),
    "RoBERTa": Case(made(roberta), words, losses, torch.float32),
}


if not FUNCTORCH:  # all others have layers that Opacus replays
    CASES = {"RoBERTa": CASES["RoBERTa"]}
BRANCHING = ("Llama", "Qwen2")
"""What uses the input of a layer three times, so that the order in which gradients are added shows.

Opacus's backward hooks change that order, in the last bit of the gradients themselves; under a
guard it is torch's own.
"""


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_gradients_have_the_bits_of_torch_alone(guard, name):
    """What a guarded backward leaves in ``p.grad`` is what torch leaves there without Opacus."""
    case, seen = CASES[name], []
    for private in (False, True):
        torch.manual_seed(0)
        model = case.build()
        called = GradSampleModule(model) if private else model
        data = case.inputs(4, torch.Generator().manual_seed(1))
        losses(called, *data).mean().backward()
        seen.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
@pytest.mark.parametrize("name", CASES)
def test_models(name, how):
    """Bits as without a guard, rows or clipped sums as single-sample backwards, and not a word."""
    case = CASES[name]
    equal = close if name in BRANCHING else torch.equal
    assert_untouched(lambda: trained(case, how, steps=2), equal)
    with untouched():
        assert_true(case, how)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in ("ViT", "Llama") if name in CASES])
def test_gradient_checkpointing(guard, name, reentrant):
    """As switched on in transformers, by default without reentrance, which Opacus cannot do."""
    case = CASES[name]
    torch.manual_seed(0)
    model, plain = case.build(), case.build()
    plain.load_state_dict(model.state_dict())
    data = case.inputs(3, torch.Generator().manual_seed(1))
    truth = rows_of(lambda m, x: losses(m, x).mean(), plain, data)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    called = GradSampleModule(model)
    losses(called, *data).mean().backward()
    assert relative_error(flat_rows(model), truth) <= TOLERANCE[torch.float32]
    assert guard.interventions == guard.violations == ()
