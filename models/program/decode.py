"""Decoding: the one loop that generates, with as many streams as the program's logits ops ask for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.base import BaseVlm, Stream
from vlm.models.errors import ModelError


class Sampling(NamedTuple):
    """Sample from softmax(logits / temperature); without one, decoding is greedy."""

    temperature: float = 1.0
    seed: int = 0


STREAMS: dict[str, Callable[[Any], Any]] = {
    "main": lambda inputs: inputs,
    "no_image": lambda inputs: inputs.without_images(),
}


def open_streams(model: BaseVlm, inputs: Any) -> tuple[dict[str, Float[Tensor, "batch vocab"]], dict[str, Stream]]:
    """Run the prompts through every stream that the attached program asks for.

    Returns next-token logits and stream by name; ``"main"`` is always there.
    """
    rewrites = model.engine.rewrites if model.engine is not None else []
    names = ["main", *dict.fromkeys(name for op in rewrites for name in op.streams)]
    if unknown := set(names) - set(STREAMS):
        raise ModelError(f"logits: unknown stream {sorted(unknown)[0]!r}; known: {', '.join(STREAMS)}")
    opened = {name: model.prefill(STREAMS[name](inputs)) for name in names}
    return {name: logits for name, (logits, _) in opened.items()}, {
        name: stream for name, (_, stream) in opened.items()
    }


@torch.inference_mode()
def generate(
    model: BaseVlm, inputs: Any, *, max_new_tokens: int, stop: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Continue each prompt until ``stop`` or ``max_new_tokens`` tokens; ``stop`` itself is not returned.

    Runs under the program that is attached to ``model``. Every stream has its own cache; all get the tokens
    chosen from the rewritten logits.
    """
    rewrites = model.engine.rewrites if model.engine is not None else []
    logits, streams = open_streams(model, inputs)
    generator = None
    if sampling is not None:
        generator = torch.Generator(inputs.tokens.device).manual_seed(sampling.seed)
    chosen: list[Int[Tensor, " batch"]] = []
    done: Bool[Tensor, " batch"] = torch.zeros(len(inputs.tokens), dtype=torch.bool, device=inputs.tokens.device)
    for step in range(max_new_tokens):
        final = logits["main"]
        for op in rewrites:
            final = op.logits(logits | {"main": final}, step)
        token = _pick(final, sampling, generator).masked_fill(done, stop)
        chosen.append(token)
        done = done | (token == stop)
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        logits = {name: model.step(stream, token) for name, stream in streams.items()}
    return [_until(row, stop) for row in torch.stack(chosen, 1).tolist()]


def _pick(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling | None, generator: torch.Generator | None
) -> Int[Tensor, " batch"]:
    if sampling is None:
        return logits.argmax(-1)
    probability = (logits.float() / sampling.temperature).softmax(-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(1)


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
