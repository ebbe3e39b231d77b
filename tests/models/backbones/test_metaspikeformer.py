"""Neurons over time, their gradient, and attention of spikes in either order."""

from itertools import islice

import torch

from vlm.models.backbones.metaspikeformer import Metaspikeformer, Neuron, Spike, SpikeAttention, _NormAndPad

SMALL = {"dims": (8, 16, 32, 40), "depths": (1, 1), "classes": 7}


def test_a_neuron_integrates_leaks_fires_and_resets():
    x = torch.tensor([1.2, 1.2, 3.0, 0.0, 2.0])[:, None]
    # 0.6; 0.9; 1.95 fires, 0; 0; 1.0 fires (the threshold itself is enough)
    assert Neuron()(x)[:, 0].tolist() == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert Neuron(0.5)(x)[:, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert torch.equal(Neuron()(x), Neuron()(x))  # nothing is left from pass to pass


def test_the_gradient_of_a_spike_is_that_of_a_sigmoid():
    above = torch.tensor([-0.7, 0.0, 0.3], requires_grad=True)
    Spike.apply(above).sum().backward()
    soft = above.detach().clone().requires_grad_()
    (4 * soft).sigmoid().sum().backward()
    torch.testing.assert_close(above.grad, soft.grad)


def test_all_weights_of_a_network_learn_through_its_spikes():
    torch.manual_seed(0)
    network = Metaspikeformer.network(**SMALL, steps=2).train()
    network(2 * torch.randn(2, 3, 32, 32)).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None]
    assert not idle


@torch.no_grad()
def test_queries_times_keys_first_is_the_same():
    torch.manual_seed(0)
    attention, x = SpikeAttention(16, 4).eval(), 4 * torch.randn(2, 1, 16, 3, 3)
    for module in attention.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, mean=1.0)
    spikes, seen = [], []
    for fire in (attention.q_lif, attention.k_lif, attention.v_lif):
        fire.register_forward_hook(lambda m, args, out: spikes.append(out))
    attention.attn_lif.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    attention(x)
    assert all(set(one.unique().tolist()) == {0.0, 1.0} for one in spikes)
    q, k, v = (one.unflatten(2, (4, 4)).flatten(4).transpose(3, 4) for one in spikes)
    dense = (q @ k.transpose(3, 4)) @ v * 0.125
    assert dense.any()
    assert torch.equal(seen[0], dense.transpose(3, 4).reshape(x.shape))


@torch.no_grad()
def test_padding_after_the_norm_is_padding_of_zeros_before_it():
    norm = _NormAndPad(5).eval()
    for value in (norm.bn.weight, norm.bn.bias, norm.bn.running_mean):
        torch.nn.init.normal_(value)
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(norm(x), norm.bn(torch.nn.functional.pad(x, (1, 1, 1, 1))))


def test_features_are_the_mean_over_time():
    encoder = Metaspikeformer("15m", layer=1, config=SMALL | {"steps": 3}).eval()
    images = torch.randn(2, 3, 32, 48)
    *_, currents = islice(encoder.model.currents(images), 2)
    assert currents.shape == (3, 2, 8, 8, 12)
    found = encoder(images)
    mean = currents.mean(0).flatten(2).transpose(1, 2)
    assert found.grid == (8, 12)
    torch.testing.assert_close(found.tokens, torch.nn.functional.layer_norm(mean, (8,)))
