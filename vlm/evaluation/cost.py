"""What a prompt costs: visual tokens per layer, FLOPs and cache bytes, counting only tokens that are there."""

from typing import Any

import torch

from vlm.models.program.decode import open_streams
from vlm.models.vision_language import Inputs, VisionLanguageModel


def layer_flops(tokens: float, width: int, mlp: int) -> float:
    """Multiply-accumulates of one decoder layer over ``tokens`` tokens: 4 n D^2 + 2 n^2 D + 3 n D m.

    The count of the pruning literature for a gated MLP.
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * mlp


@torch.inference_mode()
def prompt_cost(model: VisionLanguageModel, inputs: Inputs) -> dict[str, Any]:
    """Mean cost of a prompt of ``inputs`` under the attached program, summed over its decode streams."""
    config: Any = model.language.config
    layers, width = model.facts.layers, model.facts.width
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    _, streams = open_streams(model, inputs)
    flops = cache = 0.0
    for stream in streams.values():
        for layer in range(layers):
            layout = stream.run.layouts[stream.run.stage(layer)]
            tokens = float(layout.valid.sum(1).float().mean())
            flops += layer_flops(tokens, width, config.intermediate_size)
            cache += tokens * 2 * config.num_key_value_heads * head * next(model.language.parameters()).itemsize
    per_layer = streams["main"].run.visual_tokens(layers)
    return {
        "visual_tokens": {
            "before": float(model.visual_counts(inputs).float().mean()),
            "after": per_layer[-1],
            "average": sum(per_layer) / layers,
            "per_layer": per_layer,
        },
        "llm_flops_per_prompt": flops,
        "kv_bytes_per_prompt": cache,
        "streams": len(streams),
    }
