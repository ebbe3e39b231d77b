"""Stochastic attention: a sliding window over tokens in random order."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.order import Order
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import check_tensors

NAME = "stochastic"


@torch.no_grad()
def stochastic(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    window: int = 256,
    block: int = 64,
    seed: int = 0,
    causal: bool = True,
) -> tuple[BlockLists, Order]:
    """Jin and Sui 2026, Stochastic Attention (arXiv 2604.00754): permute, attend in a window, put back.

    The tokens are put in a random order, the same for every sample and head. There each block sees itself and the
    blocks before it, ``window`` tokens in all; before the first comes the last. Causality goes by where the tokens
    stood: a token then sees those of its window that came before it, about half of them, and always itself::

        lists, order = stochastic(q, k, seed=step * layers + layer)
        at = order.positions(len(q))
        out = block_sparse_attention(order.apply(q), order.apply(k), order.apply(v), lists, q_pos=at, k_pos=at)
        out = order.undo(out)

    Give a new ``seed`` in every layer and step; the same seed gives the same order on every device. Padding is hidden
    by ``key_valid`` in the new order.

    Permutation and window are the paper's; reconstructed are causality by former positions and one order for all
    heads. Ours are the window's side, its moving by whole blocks instead of tokens (in random order as random a set)
    and its closing to a ring, which gives every token as many keys and makes a window of all tokens full attention.
    The paper's gate with sliding-window attention is the layer's matter.

    Raises:
        ValueError: q and k of different lengths, or a window that is not one block or more, whole ones.
    """
    check_tensors(NAME, q, k, None)
    tokens = q.shape[2]
    if k.shape[2] != tokens:
        raise ValueError(f"{NAME}: q and k must be as long as each other; found {tokens}, {k.shape[2]}")
    if block < 1 or window < block or window % block:
        raise ValueError(f"{NAME}: window must be a multiple of block, {block}; found {window}")
    order = Order.of(torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).to(q.device))
    number = torch.arange(-(-tokens // block), device=q.device)
    table = (number[:, None] - number) % max(1, len(number)) < window // block
    if causal:  # less the pairs in which every key stood after every row
        filled_up = order.forward[-1:].expand(-tokens % block)
        stood = torch.cat((order.forward, filled_up)).view(-1, block)
        table &= stood.amin(1) <= stood.amax(1)[:, None]
    return BlockLists.from_table(table[None, None], block, block), order
