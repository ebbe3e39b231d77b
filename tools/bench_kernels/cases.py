"""What is measured: the operations at the shapes of real models, and their peers.

A case is a name and a function that makes its peers for a device and a type; the first thing it makes is the truth
that the others are compared with before they are timed. Names in parentheses compute something else on purpose.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vlm.kernels import dense, elementwise, grouped_mass, linear, neighborhood, received, sparse
from vlm.kernels.grouped_mass.rules import TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, Static, visual_redistribution
from vlm.kernels.sparse.lists import BlockLists

Peers = dict[str, Callable[[], tuple[Tensor, ...]]]
GROUPS = 4


class Case(NamedTuple):
    """``truth`` is None where the first peer is the measure of the others and nothing is compared."""

    name: str
    truth: Callable[[], tuple[Tensor, ...]] | None
    peers: Peers


class Shape(NamedTuple):
    """A language model's attention: ``text`` tokens before and after ``visual`` ones; ``rows`` 1 is a decode step."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    before: int
    visual: int
    after: int
    rows: int | None = None

    @property
    def keys(self) -> int:
        return self.before + self.visual + self.after


PREFILL = (
    Shape("LLaVA-1.5 prefill", 1, 32, 32, 128, 35, 576, 64),
    Shape("LLaVA-1.5 prefill, batch 16", 16, 32, 32, 128, 35, 576, 64),
    Shape("LLaVA-NeXT prefill", 1, 32, 32, 128, 32, 2880, 32),
    Shape("Qwen2.5-VL-7B prefill", 1, 28, 4, 128, 32, 4096, 224),
    Shape("Qwen2.5-VL-7B prefill, 16k", 1, 28, 4, 128, 32, 16384, 480),
)
DECODE = (
    Shape("LLaVA-1.5 decode", 16, 32, 32, 128, 35, 576, 64, 1),
    Shape("LLaVA-NeXT decode", 16, 32, 32, 128, 32, 2880, 32, 1),
    Shape("Qwen2.5-VL-7B decode, 16k", 16, 28, 4, 128, 32, 16384, 480, 1),
)
TRAIN = (Shape("LLaVA training", 8, 32, 32, 128, 32, 1984, 32), Shape("Qwen training", 4, 28, 4, 128, 32, 3968, 96))
SMALL_PREFILL = (Shape("narrow LLaVA-1.5 prefill", 1, 4, 4, 64, 35, 576, 64),)
SMALL_DECODE = (Shape("narrow LLaVA-1.5 decode", 4, 4, 4, 64, 35, 576, 64, 1),)
SMALL_TRAIN = (Shape("narrow training", 1, 4, 2, 64, 32, 256, 32),)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every case at its shapes; on a CPU a reduced set of small ones."""
    small = device.type == "cpu"
    for shape in SMALL_PREFILL if small else PREFILL:
        yield from prefill(shape, device, dtype)
    for shape in SMALL_DECODE if small else DECODE:
        yield decode(shape, device, dtype)
    for shape in SMALL_TRAIN if small else TRAIN:
        yield training(shape, device, dtype)
    yield from lists(1024 if small else 16384, 4 if small else 32, device, dtype)
    for side, heads, window in ((14, 2, 7),) if small else ((56, 2, 7), (28, 4, 7), (14, 8, 7), (56, 2, 13)):
        yield windows(1 if small else 64, side, heads, window, device, dtype)
    for length in (512,) if small else (2048, 8192, 32768):
        yield scans(1 if small else 4, 4 if small else 32, length, device, dtype)
    yield sigmoid(1 if small else 32, 4 if small else 16, 577, device, dtype)


def tensors(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and the groups of the keys: contiguous with three sinks, and with sinks scattered over the image."""
    rows = shape.rows or shape.keys
    q = torch.randn(shape.batch, shape.heads, rows, shape.dim, device=device, dtype=dtype)
    k, v = torch.randn(2, shape.batch, shape.kv_heads, shape.keys, shape.dim, device=device, dtype=dtype)
    group = torch.full((shape.batch, shape.keys), TEXT, device=device)
    group[:, shape.before : shape.before + shape.visual] = VISUAL
    group[:, 0] = TEXT_SINK
    pure = group.clone()
    pure[:, shape.before : shape.before + 2] = VISUAL_SINK
    group[:, shape.before : shape.before + shape.visual : 40] = VISUAL_SINK
    return q, k, v, pure, group


def prefill(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    q, k, v, pure, scattered = tensors(shape, device, dtype)
    gqa = shape.heads != shape.kv_heads
    plain: Peers = {"(sdpa, no masses)": lambda: (sdpa(q, k, v, is_causal=True, enable_gqa=gqa),)}
    rule = visual_redistribution()
    gains = Static.of([1.0, 1.5, 1.0, 1.0])
    eager = chosen(device, grouped_mass, shape.keys)
    for label, groups, how in (
        ("neutral", pure, "neutral"),
        ("static gains", pure, gains),
        ("VAR, contiguous groups", pure, rule),
        ("VAR, scattered sinks", scattered, rule),
    ):
        call = lambda impl, groups=groups, how=how: grouped_mass.grouped_mass_attention(  # noqa: E731
            q, k, v, groups, rule=how, impl=impl, validate=False
        )
        peers = plain | {impl: (lambda impl=impl, call=call: call(impl)) for impl in eager}
        yield Case(f"grouped mass, {label}: {shape.name}", lambda call=call: call("torch"), peers)
    _, lse = dense.dense_attention(q, k, v, return_lse=True)
    for count in sorted({1, 64, shape.keys}):
        yield received_case(shape, q, k, v, lse, count)


def chosen(device: torch.device, module: object, keys: int) -> list[str]:
    """The implementations to time: all, but the reference only where rows x keys of scores fit well."""
    names = [i.name for i in module.IMPLEMENTATIONS]  # type: ignore[attr-defined]
    return [n for n in names if (n != "reference" or keys <= 4500) and (n != "triton" or device.type == "cuda")]


def received_case(shape: Shape, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, count: int) -> Case:
    rows = torch.arange(shape.keys - count, shape.keys, device=q.device).expand(shape.batch, -1)
    gqa = shape.heads != shape.kv_heads
    call = lambda impl: (received.received_attention(q, k, lse, rows, impl=impl, validate=False),)  # noqa: E731
    peers: Peers = {"(sdpa, the prefill)": lambda: (sdpa(q, k, v, is_causal=True, enable_gqa=gqa),)}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in chosen(q.device, received, shape.keys)}
    return Case(f"received attention of {count} rows: {shape.name}", lambda: call("torch"), peers)


def decode(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v, _, groups = tensors(shape, device, dtype)
    call = lambda impl: grouped_mass.grouped_mass_attention(  # noqa: E731
        q, k, v, groups, rule=visual_redistribution(), impl=impl, validate=False
    )
    gqa = shape.heads != shape.kv_heads
    peers: Peers = {"(sdpa, no masses)": lambda: (sdpa(q, k, v, enable_gqa=gqa),)}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in chosen(device, grouped_mass, 0)}
    return Case(f"grouped mass, VAR: {shape.name}", lambda: call("reference"), peers)


def training(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v, _, groups = tensors(shape, device, dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(shape.batch, shape.heads, shape.keys, shape.dim, device=device, dtype=dtype)
    gqa = shape.heads != shape.kv_heads

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return (out.detach(), *torch.autograd.grad(out, inputs, weight))

    call = lambda impl: backward(  # noqa: E731
        grouped_mass.grouped_mass_attention(q, k, v, groups, rule=visual_redistribution(), impl=impl, validate=False)[0]
    )
    peers: Peers = {"(sdpa, no masses)": lambda: backward(sdpa(q, k, v, is_causal=True, enable_gqa=gqa))}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in chosen(device, grouped_mass, shape.keys)}
    return Case(f"grouped mass, VAR, forward and backward: {shape.name}", lambda: call("torch"), peers)


def lists(length: int, heads: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Random causal block lists with the diagonal, at several densities."""
    q, k, v = torch.randn(3, 1, heads, length, 128, device=device, dtype=dtype)
    blocks = length // 128
    for share in (5, 10, 25, 50):
        table = (torch.rand(1, heads, blocks, blocks, device=device) < share / 100).tril()
        table |= torch.eye(blocks, dtype=torch.bool, device=device)
        listed = BlockLists.from_table(table, 128, 128)
        call = lambda impl, listed=listed: (  # noqa: E731
            sparse.block_sparse_attention(q, k, v, listed, impl=impl, validate=False),
        )
        peers: Peers = {"(sdpa, dense causal)": lambda: (sdpa(q, k, v, is_causal=True),)}
        for impl in chosen(device, sparse, length):
            peers[impl] = lambda impl=impl, call=call: call(impl)
        name = f"block sparse, {share} % of blocks: {length} tokens, {heads} heads of 128"
        yield Case(name, lambda call=call: call("torch"), peers)


def windows(batch: int, side: int, heads: int, window: int, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v = torch.randn(3, batch, heads, side * side, 32, device=device, dtype=dtype)
    call = lambda impl: (  # noqa: E731
        neighborhood.neighborhood_attention(q, k, v, (side, side), window, impl=impl),
    )
    peers: Peers = {"(sdpa, all of the image)": lambda: (sdpa(q, k, v),)}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in chosen(device, neighborhood, side * side)}
    name = f"neighborhood {window} x {window}: {side} x {side}, batch {batch}, {heads} heads of 32"
    return Case(name, lambda: call("torch"), peers)


def scans(batch: int, heads: int, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v = torch.randn(3, batch, heads, length, 128, device=device, dtype=dtype)
    decay = -torch.arange(1, heads + 1, device=device, dtype=torch.float32) / heads / 8

    def call(impl: str) -> tuple[Tensor, ...]:
        out, *_ = linear.linear_attention(q, k, v, log_decay=decay, output_state=True, impl=impl, validate=False)
        return (out,)  # type: ignore[return-value]

    names = [n for n in chosen(device, linear, length) if n != "reference"]  # token by token
    peers: Peers = {"(sdpa, causal)": lambda: (sdpa(q, k, v, is_causal=True),)}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in names}
    name = f"linear attention with decay: {length} tokens, batch {batch}, {heads} heads of 128"
    return Case(name, lambda: call("chunk"), peers)


def sigmoid(batch: int, heads: int, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    q, k, v = torch.randn(3, batch, heads, length, 64, device=device, dtype=dtype)
    call = lambda impl: (elementwise.elementwise_attention(q, k, v, impl=impl, causal=False),)  # noqa: E731
    peers: Peers = {"(sdpa, softmax)": lambda: (sdpa(q, k, v),)}
    peers |= {impl: (lambda impl=impl: call(impl)) for impl in chosen(device, elementwise, length)}
    name = f"sigmoid attention: ViT-L/14-336, batch {batch}, {heads} heads of 64"
    return Case(name, lambda: call("torch"), peers)
