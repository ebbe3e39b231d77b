"""Compile backbones of ours and say how the result differs from them: a program, because under pytest every function is
wrapped for the check of shapes, and a compiler would trace the checks.

    python compiled.py aot_eager nat biformer

prints a line of JSON for each: graphs; breaks, why a graph ended; difference of the tokens and of the gradients, over
the largest number of each; recompiled, graphs that a second call of the same shape made; and resized, the difference
for pictures of another shape, where the encoder takes them.
"""

import json
import sys
from typing import Any

import torch
from test_contract import ONE_SIZE, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from vlm.models.backbone import BackboneEncoder


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
    compiled = torch.compile(encoder, backend=counter)
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
    if name in ONE_SIZE or backend == "inductor":
        return told
    with torch.no_grad():
        resized = differences([compiled(others).tokens], [encoder(others).tokens])
    return told | {"resized": resized[0], "breaks": list(counters["graph_break"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        print(json.dumps(compare(name, sys.argv[1])), flush=True)
