"""Compile backbones of ours and say how the result differs from them: a program, because under pytest every function is
wrapped for the check of shapes, and a compiler would trace the checks.

    python compiled.py aot_eager:nat eager:biformer

prints a line of JSON for each: graphs; breaks, why a graph ended; difference of the tokens and of the gradients, over
the largest number of each; recompiled, graphs that a second call of the same shape made; and for those whose tables
follow from the size of the picture also resized, the difference for a picture of another size. The name ``layers``
stands for layers of these alone, compiled with sizes that the compiler may leave open.
"""

import json
import sys
import time
from typing import Any

import torch
from test_contract import make
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from vlm.models.backbone import BackboneEncoder
from vlm.models.backbones.biformer import RoutedAttention
from vlm.models.backbones.nat import NeighborhoodAttention

PLANNED = ("biformer", "nat", "transnext")


def answer(encoder: Any, call: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens of the images, and the gradient of every weight for a loss that has all of them."""
    encoder.zero_grad()
    tokens = call(images).tokens
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return [tokens.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]


def differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    assert len(found) == len(expected)
    each = zip(found, expected, strict=True)
    return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in each]


def compare(name: str, backend: str) -> dict[str, Any]:
    torch.compiler.reset()
    counters.clear()
    encoder: BackboneEncoder = make(name, -1).eval()
    torch.manual_seed(2)
    images, others = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 96, 64)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(encoder, backend=counter, dynamic=False)
    tokens, *gradients = differences(answer(encoder, compiled, images), answer(encoder, encoder, images))
    graphs = counter.frame_count
    answer(encoder, compiled, images)
    told = {
        "name": name,
        "graphs": graphs,
        "breaks": list(counters["graph_break"]),
        "tokens": tokens,
        "gradients": max(gradients),
        "recompiled": counter.frame_count - graphs,
    }
    if name not in PLANNED or backend == "inductor":
        return told
    with torch.no_grad():
        resized = differences([compiled(others).tokens], [encoder(others).tokens])
    return told | {"resized": resized[0], "breaks": list(counters["graph_break"])}


def compare_layers(backend: str) -> dict[str, Any]:
    """Each layer at two sizes: at the second the compiler takes sizes for open, and the tables settle them."""
    found = []
    torch.compiler.reset()
    counters.clear()
    for layer in (NeighborhoodAttention(8, 2, 3), RoutedAttention(8, 2, 4)):
        compiled = torch.compile(layer.eval(), backend=backend)
        for size in ((1, 14, 14), (2, 9, 21)):
            x = torch.randn(*size, 8)
            found += differences([compiled(x).detach()], [layer(x).detach()])
    return {"name": "layers", "breaks": list(counters["graph_break"]), "resized": max(found)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        backend, name = argument.split(":")
        told = compare_layers(backend) if name == "layers" else compare(name, backend)
        print(json.dumps(told | {"seconds": time.process_time()}), flush=True)
