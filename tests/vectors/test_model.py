"""A model in flat vectors: nothing that a script may do to parameters and gradients breaks the views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from danaz.vectors.layout import Layout
from danaz.vectors.model import FlatModel


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def with_complex(model: nn.Module) -> nn.Module:
    model.odd = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


def batch() -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients that plain autograd computes."""
    model(batch()).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class TestModelInAVector:
    def test_the_model_computes_as_before(self):
        plain, flat = net(), FlatModel(net())
        assert torch.equal(flat.model(batch()), plain(batch()))

    def test_parameters_are_views_in_both_directions(self):
        model = net()
        flat = FlatModel(model)
        flat.params.fill_(3)
        assert all((p == 3).all() for p in model.parameters())
        with torch.no_grad():
            model[3].bias.fill_(5)
        assert flat.params[-2:].tolist() == [5, 5]

    def test_all_values_stand_in_the_order_of_the_groups(self):
        model = net()
        convolution, linear = list(model[0].parameters()), list(model[3].parameters())
        flat = FlatModel(model, [linear, convolution])
        values = torch.cat([p.detach().reshape(-1) for p in [*linear, *convolution]])
        assert torch.equal(flat.params, values)
        assert flat.layout.groups == ((0, 34), (34, 34 + 112))

    def test_the_gradient_is_autograds(self):
        plain, model = net(), net()
        flat = FlatModel(model)
        expected = torch.cat([g.reshape(-1) for g in gradients(plain)])
        model(batch()).square().sum().backward()
        flat.gather_gradients(range(len(flat.trained)))
        assert torch.equal(flat.grads, expected)

    @pytest.mark.parametrize("clear", ["to none", "to zero", "on the model", "none by hand", "a tensor by hand"])
    def test_any_way_to_clear_gradients(self, clear):
        plain, model = net(), net()
        flat = FlatModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        expected = torch.cat([g.reshape(-1) for g in gradients(plain)])
        for _ in range(3):
            match clear:
                case "to none":
                    optimizer.zero_grad()
                case "to zero":
                    optimizer.zero_grad(set_to_none=False)
                case "on the model":
                    model.zero_grad()
                case "none by hand":
                    for p in model.parameters():
                        p.grad = None
                case "a tensor by hand":
                    for p in model.parameters():
                        p.grad = torch.zeros_like(p)
            model.train()
            model(batch()).square().sum().backward()
            flat.gather_gradients(range(len(flat.trained)))
            assert torch.equal(flat.grads, expected)
            assert all(p.grad is view for p, view in zip(flat.trained, flat.grad_views, strict=True))

    def test_gradients_accumulate_in_place(self):
        plain, model = net(), net()
        flat = FlatModel(model)
        expected = 2 * torch.cat([g.reshape(-1) for g in gradients(plain)])
        for _ in range(2):
            model(batch()).square().sum().backward()
            flat.gather_gradients(range(len(flat.trained)))
            assert all(p.grad is view for p, view in zip(flat.trained, flat.grad_views, strict=True))
        assert torch.allclose(flat.grads, expected)
        assert flat.absent == ()

    def test_a_parameter_that_the_loss_does_not_use_has_gradient_zero(self):
        model = net()
        flat = FlatModel(model)
        flat.grads.fill_(7)
        model.zero_grad()
        model[0].weight.sum().backward()
        flat.gather_gradients(range(len(flat.trained)))
        assert flat.grads[:108].tolist() == [1] * 108
        assert flat.grads[108:].tolist() == [0] * (len(flat.grads) - 108)
        assert flat.absent == ((108, len(flat.grads)),)
        assert model[0].bias.grad is None, "torch distinguishes a gradient of zero from none"

    def test_only_some_gradients_are_gathered(self):
        """Gradients are gathered bucket by bucket, while backward still runs."""
        flat = FlatModel(net())
        flat.model(batch()).square().sum().backward()
        flat.gather_gradients(range(4, 6))
        assert flat.grads[:120].abs().sum() == 0
        assert flat.grads[120:].abs().sum() > 0

    def test_channels_last_stays_channels_last(self):
        plain = net()
        model = net().to(memory_format=torch.channels_last)
        flat = FlatModel(model)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(model[0].weight, plain[0].weight)
        model(batch()).square().sum().backward()
        flat.gather_gradients(range(len(flat.trained)))
        for p, expected in zip(model.parameters(), gradients(plain), strict=True):
            assert torch.allclose(p.grad, expected, atol=1e-5)
        named = flat.layout.named(flat.params, flat.buffers())
        assert torch.equal(named["0.weight"], plain[0].weight)
        assert named["0.weight"].is_contiguous()

    def test_frozen_parameters_stay_out(self):
        model = net()
        model[0].weight.requires_grad_(False)
        flat = FlatModel(model)
        assert [entry.name for entry in flat.layout.parameters] == [
            "0.bias",
            "1.weight",
            "1.bias",
            "3.weight",
            "3.bias",
        ]

    def test_a_state_dict_comes_out_and_goes_in(self):
        model = net()
        flat = FlatModel(model)
        other = net()
        other.load_state_dict(flat.layout.named(flat.params, flat.buffers()), strict=False)
        assert torch.equal(other.eval()(batch()), model.eval()(batch()))
        with torch.no_grad():
            flat.params.add_(1)
        model.load_state_dict(other.state_dict())
        assert torch.equal(flat.params, FlatModel(other).params)

    def test_an_empty_parameter(self):
        model = nn.Linear(2, 2)
        model.nothing = nn.Parameter(torch.empty(0, 3))
        flat = FlatModel(model)
        assert flat.layout.size == 6
        assert Layout.from_lists(flat.layout.to_lists()) == flat.layout

    @pytest.mark.parametrize(
        ("groups", "reason"),
        [
            (lambda model: [], "no parameters"),
            (lambda model: [[nn.Parameter(torch.zeros(2))]], "does not have"),
            (lambda model: [[model[3].bias], [model[3].bias]], "in two groups"),
            (lambda model: [[with_complex(model).odd]], "trains parameters of the types float32"),
        ],
    )
    def test_what_it_cannot_train(self, groups, reason):
        model = net()
        with pytest.raises(ValueError, match=reason):
            FlatModel(model, groups(model))


class TestBuffers:
    def test_they_are_copied_out_and_in(self):
        model, other = net(), net()
        model(batch())
        flat, target = FlatModel(model), FlatModel(other)
        taken = flat.buffers()
        assert taken.shape == (8,)
        target.load_buffers(taken)
        assert torch.equal(other[1].running_mean, model[1].running_mean)
        assert torch.equal(other[1].running_var, model[1].running_var)
        assert other[1].num_batches_tracked == 0, "counters are not averaged"
        model(batch())
        assert not torch.equal(flat.buffers(), taken), "a copy, not a view"

    def test_those_that_are_not_saved_stay_out(self):
        model = nn.Linear(1, 1)
        model.register_buffer("scratch", torch.ones(3), persistent=False)
        assert FlatModel(model).layout.buffer_size == 0
