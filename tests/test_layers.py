"""What is asked once and not with every call stays true when a model or a layer changes."""

from __future__ import annotations

import copy

import opacus.grad_sample
import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.layers.dp_rnn import RNNLinear
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH, needs_functorch
from torch import nn
from truth import equal_to_rounding

import dpguard
from dpguard import _compat
from dpguard.noted.graph_task import GraphTask
from dpguard.patches.model import products
from dpguard.patches.model.layers import Roster

GradSampleHooks = getattr(opacus.grad_sample, "GradSampleHooks", GradSampleModule)


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _same(model):
    model(torch.ones(1, 3, dtype=torch.float64))


def _another_parameter(model):
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))


def _written_past_the_module(model):
    model[0]._parameters["weight"] = nn.Parameter(torch.ones_like(model[0].weight))


def _initialised_again(model):
    model[0].__init__(3, 4)
    model.double()


def _without_bias(model):
    model[2].bias = None


def _another_module(model):
    model[2] = nn.Linear(4, 2).double()


def _one_more(model):
    model.append(nn.Linear(2, 2).double())


def _tied(model):
    model[2].bias = model[0].bias


CHANGES = [
    _another_parameter,
    _written_past_the_module,
    _initialised_again,
    _without_bias,
    _another_module,
    _one_more,
    _tied,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_roster_notices_what_was_replaced(change):
    """Its parameters and names are those of ``named_parameters``, whatever was done."""
    model, roster = _mlp(), Roster()
    assert roster.renew(model)
    roster.settle()
    change(model)
    assert roster.renew(model)
    expected = list(model.named_parameters())
    assert [name for name, _ in roster.named] == [name for name, _ in expected]
    assert all(mine is p for (_, mine), (_, p) in zip(roster.named, expected, strict=True))


def test_a_roster_whose_news_were_not_taken_in():
    """Whoever was interrupted on the way is told again."""
    model, roster = _mlp(), Roster()
    assert roster.renew(model)
    assert roster.renew(model)
    roster.settle()
    assert not roster.renew(model)


def test_a_roster_of_another_model():
    """A copy with equal parameters is another model."""
    model, roster = _mlp(), Roster()
    roster.renew(model)
    roster.settle()
    assert roster.renew(copy.deepcopy(model))


def test_a_roster_of_a_model_that_is_the_same():
    """Forwards, freezing and new values replace nothing."""
    model, roster = _mlp(), Roster()
    roster.renew(model)
    roster.settle()
    _same(model)
    model[0].weight.requires_grad_(False)
    model[0].weight.data = torch.zeros(4, 3)
    assert not roster.renew(model)


def _cast(model):
    for p in model.parameters():
        p.data = p.data.float()


@pytest.mark.parametrize(
    "change", [_same, _another_parameter, _written_past_the_module, _another_module, _cast]
)
def test_rows_after_a_change(guard, change):
    """Rows of the step after it are those of single-sample backwards, with nothing left over."""
    model = _mlp()
    called = GradSampleModule(model)
    called(torch.randn(2, 3, dtype=torch.float64)).mean().backward()
    called.zero_grad()
    change(model)
    dtype = model[0].weight.dtype
    x = torch.randn(3, 3, dtype=dtype)
    called(x).mean().backward()
    plain = _mlp().to(dtype)
    plain.load_state_dict(model.state_dict())
    for i in range(3):
        plain.zero_grad()
        plain(x[i : i + 1]).mean().backward()
        for mine, truth in zip(model.parameters(), plain.parameters(), strict=True):
            assert len(mine.grad_sample) == 3
            torch.testing.assert_close(mine.grad_sample[i], truth.grad, rtol=1e-5, atol=1e-6)
    assert guard.violations == ()


def test_a_layer_initialised_again_has_lost_its_hooks(guard):
    """Its new parameters get gradients and no rows: the step is refused."""
    model = _mlp()
    called = GradSampleModule(model)
    called(torch.randn(2, 3, dtype=torch.float64)).mean().backward()
    _initialised_again(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
    )
    optimizer.zero_grad()
    called(torch.randn(2, 3, dtype=torch.float64)).mean().backward()
    with pytest.raises(dpguard.PerSampleGradientError, match=r"0\.weight"):
        optimizer.step()
    assert guard.violations


def test_a_sampler_registered_between_two_steps(guard):
    """The one that is registered when a layer is called computes its rows."""
    model = _mlp()
    called = GradSampleModule(model)
    x = torch.randn(2, 3, dtype=torch.float64)
    called(x).sum().backward()
    original = GradSampleHooks.GRAD_SAMPLERS[nn.Linear]
    rows = [2 * p.grad_sample for p in model.parameters()]
    called.zero_grad()
    try:
        register_grad_sampler(nn.Linear)(
            lambda *call: {p: 2 * found for p, found in original(*call).items()}
        )
        called(x).sum().backward()
    finally:
        register_grad_sampler(nn.Linear)(original)
    for expected, p in zip(rows, model.parameters(), strict=True):
        assert torch.equal(p.grad_sample, expected)
    assert guard.violations == ()


def _images():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 2, 2)
    )


def _thumbnails():
    """Of one pixel each, which is contiguous in either format."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 3, 3, padding=1))


FORMATS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "from_nhwc": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "cropped": lambda x: x[:, :, 1:, :-1],
    "gray": lambda x: x[:, :1].expand(-1, 2, -1, -1),
}


@pytest.mark.parametrize("arrange", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("build", [_images, _thumbnails])
def test_images_of_any_memory_format(guard, build, arrange):
    """Opacus's sampler of convolutions reads memory as if it were contiguous."""
    torch.manual_seed(4)
    _assert_rows(guard, build().double(), arrange(torch.randn(3, 2, 6, 6, dtype=torch.float64)))


@pytest.mark.parametrize("padding", [None, 2, -1])
def test_padding_has_no_gradient(guard, padding):
    """Autograd drops what comes to ``padding_idx``; Opacus's sampler adds it to the row."""
    torch.manual_seed(4)
    ids = torch.tensor([[2, 2, 1], [0, 2, 6], [6, 6, 6], [3, 4, 3]])
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 2))
    _assert_rows(guard, model, ids)


def _assert_rows(guard, model, inputs):
    plain = copy.deepcopy(model)
    called = GradSampleModule(model)
    called(inputs).square().flatten(1).sum(dim=1).mean().backward()
    for i in range(len(inputs)):
        plain.zero_grad()
        plain(inputs[i : i + 1]).square().sum().backward()
        for mine, truth in zip(model.parameters(), plain.parameters(), strict=True):
            assert len(mine.grad_sample) == len(inputs)
            torch.testing.assert_close(mine.grad_sample[i], truth.grad, rtol=1e-5, atol=1e-6)
    assert guard.violations == guard.interventions == ()


class _Scaled(nn.Module):
    """Owns a raw parameter, so that functorch replays it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("last", [nn.LayerNorm(2), pytest.param(_Scaled(), marks=needs_functorch)])
def test_a_model_without_numbers(guard, last):
    """On the device ``meta``, where shapes and memory are estimated, rows have their shapes."""
    model = nn.Sequential(_mlp().float(), last).to("meta")
    called = GradSampleModule(model)
    called(torch.empty(3, 3, device="meta")).mean().backward()
    for p in model.parameters():
        assert p.grad_sample.shape == (3, *p.shape)
        assert p.grad_sample.is_meta
    assert guard.violations == guard.internal_errors == ()


class _Asker:
    """Asks for the roles of leaves in the middle of a backward."""

    def __init__(self, leaves):
        self.leaves, self.roles = leaves, None

    def __call__(self, _grads):
        self.roles = _compat.autograd().roles_of(self.leaves)


@pytest.mark.parametrize(
    ("run", "roles"),
    [
        (lambda loss, _: loss.backward(), [1, 1, 0, 0]),
        (lambda loss, used: loss.backward(inputs=used), [1, 0, 0, 0]),
        (torch.autograd.grad, [2, 0, 0, 0]),
    ],
    ids=["backward", "inputs", "grad"],
)
def test_roles_of_leaves(run, roles):
    """Used, used and not asked for, unused, and frozen; alone as together."""
    leaves = [torch.ones(2, requires_grad=i < 3) for i in range(4)]
    for asked in (leaves, *([leaf] for leaf in leaves), []):
        loss = (leaves[0] * leaves[1] * leaves[3]).sum()
        asker = _Asker(asked)
        loss.grad_fn.register_prehook(asker)
        run(loss, leaves[:1])
        expected = [
            role for leaf, role in zip(leaves, roles, strict=True) if any(leaf is a for a in asked)
        ]
        assert asker.roles == expected


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_that_is_kept_multiplies_as_a_number(dtype):
    """Bit by bit and with the same layout, also where the batch size is no number of that kind."""
    torch.manual_seed(1)
    tensor = torch.randn(64, 9).mul(torch.randn(64, 9).mul(8).exp()).to(dtype)
    task = GraphTask.__new__(GraphTask)
    for factor in (0, 1, 3, 257, 4097, 2**24 + 1):
        for backprops in (tensor, tensor.t(), tensor[::3]):
            found, expected = task.times(backprops, factor), backprops * factor
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            if dtype.is_complex:
                found, expected = torch.view_as_real(found), torch.view_as_real(expected)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


class _Layer(nn.Module):
    """A layer whose backprops can be given."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(3, 4, **options)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.Linear, RNNLinear])
@pytest.mark.parametrize("shape", [(5, 3), (5, 1, 3), (5, 2, 3), (1, 3)])
def test_rows_of_linear_layers_have_the_bits_of_opacus(kind, shape, reduction):
    """Whether a sample has one vector or several, called once or twice, with a bias or without."""
    torch.manual_seed(3)
    for bias in (True, False):
        model = _Layer(kind, bias=bias)
        x, weights = torch.randn(shape), torch.randn(4)
        found = []
        for mode in ("off", "repair"):
            with dpguard.install(mode=mode):
                called = GradSampleModule(copy.deepcopy(model), loss_reduction=reduction)
                (called(x) + called(2 * x)).mul(weights).sum().backward()
                found.append([p.grad_sample for p in called.parameters()])
        # The calls of a recurrent cell's layer are added as those of time steps.
        equal = equal_to_rounding if kind is RNNLinear else torch.equal
        assert all(equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("width", "dtype"), [(6, torch.float32), (14, torch.float32), (6, torch.float64)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"padding": 1, "stride": 2},
        {"padding": (2, 0), "stride": (1, 3), "kernel_size": (2, 3), "dilation": (3, 1)},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel_size": (4, 1)},
        {"padding": "valid"},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (7, 6)},
        {"kernel_size": (3, 1), "one": True},
        {"kernel_size": (2, 6), "one": True, "stride": 2},
        {"padding_mode": "circular", "padding": 1},
        {"groups": 2},
    ],
    ids=str,
)
def test_rows_of_convolutions_have_the_bits_of_opacus(options, size, reduction, width, dtype):
    """Whatever the stride, padding or groups; the layer is called twice, its lines long or short."""
    if isinstance(options.get("padding"), str) and not FUNCTORCH:
        pytest.skip("this Opacus knows no padding by name")
    if isinstance(options.get("dilation"), tuple) and not FUNCTORCH:
        pytest.skip("this Opacus takes one side of such a kernel for the other")
    torch.manual_seed(4)
    channels = 1 if options.get("one") else 4
    options = {"kernel_size": 3, **{k: v for k, v in options.items() if k != "one"}}
    model = nn.Sequential(nn.Conv2d(channels, 6, **options), nn.Tanh()).to(dtype)
    x = torch.randn(size, channels, 7, width, dtype=dtype)
    found = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode):
            called = GradSampleModule(copy.deepcopy(model), loss_reduction=reduction)
            (called(x) + called(2 * x)).square().sum().backward()
            found.append([p.grad_sample for p in called.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_a_bias_are_nobody_elses(guard, reduction):
    """They are not the tensor that autograd hands to a hook, nor overlap each other."""
    model = GradSampleModule(_Layer(nn.Linear), loss_reduction=reduction)
    out, seen = model(torch.randn(5, 3)), []
    out.register_hook(seen.append)
    out.sum().backward()
    rows = model._module.layer.bias.grad_sample
    before = seen[0].clone()
    rows[0] += 1
    assert torch.equal(seen[0], before)
    assert not torch.equal(rows[0], rows[1])


def test_a_weight_that_is_no_parameter_of_the_layer(guard):
    """What the layer computes with may be another parameter: Opacus's sampler is asked then."""
    model = _Layer(nn.Linear)
    found = products.matrix_products(
        model.layer, torch.ones(2, 3), torch.ones(2, 4), [nn.Parameter(torch.ones(4, 3))]
    )
    assert found is None


def _assigned(y):
    y[..., 1:] = 3 * y[..., 1:].detach()
    return y


def _seen_otherwise(y):
    y.view(len(y), -1).mul_(2)
    return y.tanh()


def _overwritten(y):
    return y.copy_(y.detach() * 2).sum(1) + y.new_ones(len(y), y.shape[2])


def _kept_beside(y):
    before = y.clone()
    return y.mul_(before) + before


def _hooked(y):
    y.add_(1).register_hook(lambda grad: 3 * grad)
    return y.square()


_CHANGES = [
    torch.Tensor.tanh_,
    torch.relu_,
    lambda y: y.transpose_(1, 2),
    lambda y: y.add_(1).mul_(y.detach().clone()),
    _assigned,
    _seen_otherwise,
    _overwritten,
    _kept_beside,
    _hooked,
]


@pytest.mark.parametrize("oracle_every", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", _CHANGES)
def test_outputs_of_linear_layers_that_are_changed_in_place(change, bias, oracle_every):
    """With several vectors in a sample an output is a view of a product; it may change like any."""
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4, bias=bias).double(), nn.Linear(4, 2).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x):
            h = change(self.first(x))
            return self.last(h if h.shape[-1] == 4 else h.mT)

    def loss(model, x):
        return model(x).square().flatten(1).sum(1).mean()

    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    model = Model()
    truth = []
    for one in x:
        grads = torch.autograd.grad(loss(model, one[None]), model.parameters(), allow_unused=True)
        truth.append(
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(model.parameters(), grads, strict=True)
            ]
        )
    with dpguard.install(mode="repair", oracle_every=oracle_every) as guard:
        called = GradSampleModule(model)
        loss(called, x).backward()
        for p, rows in zip(model.parameters(), zip(*truth, strict=True), strict=True):
            assert torch.allclose(p.grad_sample, torch.stack(rows), rtol=1e-10)
        assert guard.violations == guard.internal_errors == ()
