"""Attention read backwards: messages add up, voices fade, Lite keeps who was sent most."""

import torch

from vlm.models.backbones.dependencyvit import Dependencyvit, ReversedAttention

SMALL = {"dim": 24, "heads": 3, "size": 64, "classes": 7}


@torch.no_grad()
def test_every_sender_divides_one_message():
    torch.manual_seed(0)
    attention, x = ReversedAttention(24, 3).double(), torch.randn(2, 9, 24).double()
    voice = torch.rand(2, 9).double()
    said = attention(x, voice)
    left = voice * attention.message_controller(x)
    torch.testing.assert_close(said.voice, left)
    # Over all receivers and heads a sender gives away its voice, no more and no less.
    torch.testing.assert_close(said.received.sum(1), left.sum(1))
    silent = attention(x, torch.zeros(2, 9).double())
    torch.testing.assert_close(silent.out, attention.proj.bias.expand(2, 9, -1))


@torch.no_grad()
def test_a_message_goes_from_the_row_of_attention_to_its_columns():
    torch.manual_seed(0)
    attention, x = ReversedAttention(24, 3).double(), torch.randn(1, 9, 24).double()
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)[:, 0]  # [H,T,d] each
    heads = (attention.head_selector(x)[0] / 0.1).softmax(1)  # [T,H]
    voice = attention.message_controller(x)[0]
    expected = torch.zeros(9, 24).double()
    for head in range(3):
        rows = (q[head] @ k[head].T * 8**-0.5).softmax(1)
        for sender in range(9):
            message = heads[sender, head] * voice[sender] * v[head, sender]
            expected[:, 8 * head : 8 * head + 8] += rows[sender][:, None] * message
    torch.testing.assert_close(attention(x, torch.ones(1, 9).double()).out[0], attention.proj(expected))


@torch.no_grad()
def test_lite_drops_tokens_by_what_they_received():
    torch.manual_seed(0)
    network = Dependencyvit.network(**(SMALL | {"size": 224}), lite=True, controller_bias=4.0).eval()
    received = []
    hooks = [b.attn.register_forward_hook(lambda m, a, out: received.append(out.received)) for b in network.blocks]
    states = list(network.states(torch.randn(1, 3, 224, 224)))
    for hook in hooks:
        hook.remove()
    left = [state.tokens.shape[1] for state in states]
    assert left == [196] + [164] * 3 + [132] * 3 + [100] * 3 + [69] * 2  # as the paper has them
    kept = states[1].place[0]
    assert torch.equal(kept, received[1][0].topk(164).indices.sort().values)
    assert set(states[4].place[0].tolist()) <= set(kept.tolist())
    torch.testing.assert_close(network.blocks[0].attn.message_controller.fc2.bias, torch.tensor([4.0]))


def test_lite_hands_over_tokens_without_places():
    lite = Dependencyvit("lite_tiny", layer=4, image=64, config=SMALL).eval()
    before = Dependencyvit("lite_tiny", layer=0, image=64, config=SMALL).eval()
    assert (lite.spatial, lite.grid) == (False, (1, 10))  # 16, 13, 10
    assert (before.spatial, before.grid) == (True, (4, 4))
    assert lite(torch.randn(2, 3, 64, 64)).tokens.shape == (2, 10, 24)
