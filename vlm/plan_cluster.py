"""What a run needs of a cluster, told without one: memory by strategy, FLOPs of a step, hours on a named GPU.

Memory per device, N devices. Weights: 4 bytes each (2 for frozen ones of a checkpoint under bf16). Gradients: 4 bytes
per trained weight. AdamW: 8. Sharded over N: the optimizer (zero1), gradients too (zero2), weights too (zero3, fsdp2).
Activations, per token of a micro-batch and block of width D and MLP m: ``16 D + 6 m`` values kept for the backward
pass, of 2 bytes in bf16 and 4 in fp32 (attention without its matrix, as in FlashAttention; after Korthikanti et al.,
MLSys 2023, section 4.1, without dropout and with a gated MLP), ``D`` of them with run.checkpoint_activations; and
``8 V`` bytes of each text token for logits and their gradient. An estimate: allocators and libraries come on top.

FLOPs of a step are those of :mod:`vlm.training.flops`, for samples of one picture and 64 text tokens, without attention
inside the encoder and as if every stage ran the whole model. Hours: these over the GPU's peak in bf16 times an
assumed utilization.
"""

from typing import Any

from vlm.build import program_of
from vlm.devices import GPUS, Gpu, by_name
from vlm.evaluation.forecast import visual_per_layer
from vlm.models.base import BaseVlm
from vlm.models.lora import is_adapter
from vlm.models.program.program import Program
from vlm.models.program.schedule import TEXT
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.errors import unknown
from vlm.recipe.schema import Stage
from vlm.training.flops import Cost
from vlm.training.sharding import blocks_of

MFU = 0.35  # assumed; published runs of vision-language models have 0.30 to 0.40 on images
SHARDED = {"single": "", "ddp": "", "zero1": "o", "zero2": "og", "zero3": "ogw", "fsdp2": "ogw"}
EXAMPLE = 576  # visual tokens where they depend on the image


def find_gpu(name: str) -> Gpu:
    """Raises RecipeError for a GPU that is not in the table, with the nearest that is."""
    gpu = by_name(name)
    if gpu is None:
        raise RecipeError(f"--gpu: {name} {unknown(name, [gpu.name for gpu in GPUS])}")
    return gpu


def trained_weights_of(stage: Stage, model: BaseVlm) -> tuple[int, set[str]]:
    """How many weights a stage trains, and the roles through which gradients flow."""
    count, roles = 0, set()
    for role, how in stage.train.items():
        if role not in model.parts:  # the head of a classifying stage is made by its objective
            continue
        named = model.parts[role].named_parameters()
        count += sum(p.numel() for name, p in named if is_adapter(name) == (how.lora is not None))
        roles.add(role)
    return count, roles


def memory(recipe: Recipe, stage: Stage, model: BaseVlm, parallel: str, world: int) -> dict[str, float]:
    """GiB per device of each kind; see the module."""
    trained, _ = trained_weights_of(stage, model)
    half = recipe.model.origin is not None and recipe.run.precision == "bf16"
    ever = {role for each in recipe.stages for role, how in each.train.items() if how.lora is None}
    weights = sum(
        p.numel() * (2 if half and role not in ever and not is_adapter(name) else 4)
        for role, part in model.parts.items()
        for name, p in part.named_parameters()
    )
    share = {kind: 1 / world if kind in SHARDED[parallel] else 1.0 for kind in "wgo"}
    parts = {
        "weights": weights * share["w"],
        "gradients": 4 * trained * share["g"],
        "optimizer": 8 * trained * share["o"],
        "activations": activations(recipe, stage, model),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def activations(recipe: Recipe, stage: Stage, model: BaseVlm) -> float:
    """Bytes that one device keeps of a micro-batch for the backward pass."""
    batch = stage.global_batch or recipe.run.global_batch
    micro = recipe.run.micro_batch or batch // recipe.run.world
    config, size = model.decoder.config, 2 if recipe.run.precision == "bf16" else 4
    again = recipe.run.checkpoint_activations
    kept = config.hidden_size if again else 16 * config.hidden_size + 6 * config.intermediate_size
    visual = model.most_visual_tokens or EXAMPLE
    counts, _ = visual_per_layer(_program(recipe, model), visual, config.num_hidden_layers)
    found = sum(micro * (count + TEXT) * kept * size for count in counts)
    if "vision" in stage.train:
        for block in _vision_blocks(model):
            matrix = max((p for p in block.parameters() if p.ndim == 2), key=lambda p: p.numel(), default=None)
            width, mlp = (min(matrix.shape), max(matrix.shape)) if matrix is not None else (0, 0)
            found += micro * visual * (width if again else 16 * width + 4 * mlp) * size
    return found + micro * TEXT * config.vocab_size * 8


def step_flops(recipe: Recipe, stage: Stage, model: BaseVlm) -> float:
    """FLOPs of one step over the whole global batch."""
    _, roles = trained_weights_of(stage, model)
    for role, part in model.parts.items():
        how = stage.train.get(role)  # type: ignore[call-overload]  # a role is one of the keys
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(how is not None and is_adapter(name) == (how.lora is not None))
    config: Any = model.decoder.config
    visual, layers = model.most_visual_tokens or EXAMPLE, config.num_hidden_layers
    heads = config.num_attention_heads
    attention = 2.0 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    flows = bool(roles)
    counts, _ = visual_per_layer(_program(recipe, model), visual, layers)
    sample = 0.0
    for layer, count in zip(model.decoder.layers, counts, strict=True):
        cost, tokens = Cost(layer.parameters(), flows), count + TEXT
        sample += cost.total * tokens + cost.attention * attention * tokens**2
    sample += Cost(model.head.parameters(), flows).total * TEXT
    sample += Cost(model.parts["connector"].parameters(), "vision" in roles).total * visual
    for block in _vision_blocks(model):
        sample += Cost(block.parameters(), "vision" in roles).total * visual
    return sample * (stage.global_batch or recipe.run.global_batch)


def _vision_blocks(model: BaseVlm) -> list[Any]:
    return list(blocks_of([module for _, module in model.parts["vision"].named_modules()]))


def _program(recipe: Recipe, model: BaseVlm) -> Program:
    return program_of(recipe.own, model.facts)


def cluster(
    recipe: Recipe, model: BaseVlm, steps: dict[str, int | None], gpu: Gpu | None
) -> tuple[list[tuple[str, ...]], list[str]]:
    """A table of memory and the lines below it. steps: of each stage, None where only its samples would tell."""
    world = recipe.run.world
    rows: list[tuple[str, ...]] = [
        ("memory per device (GiB)", "weights", "gradients", "optimizer", "activations", "all")
    ]
    heaviest = max(recipe.stages, key=lambda stage: trained_weights_of(stage, model)[0])
    for parallel in dict.fromkeys(("ddp", "zero1", "zero2", "fsdp2", recipe.run.parallel)):
        sizes = memory(recipe, heaviest, model, parallel, world)
        total = sum(sizes.values())
        fits = "" if gpu is None or total < 0.9 * gpu.memory else f" (more than a {gpu.name} has room for)"
        mark = " <- this recipe" if parallel == recipe.run.parallel else ""
        rows.append((f"{parallel} x {world}{mark}", *(f"{size:.3g}" for size in sizes.values()), f"{total:.3g}{fits}"))
    lines = [f"Of stage {heaviest.name}; estimates, formulas in vlm/plan_cluster.py; libraries come on top."]
    hours = 0.0
    for stage in recipe.stages:
        flops, count = step_flops(recipe, stage, model), steps.get(stage.name)
        text = f"Stage {stage.name}: {flops:.3g} FLOPs per step ({TEXT} text tokens and one picture per sample)"
        if gpu is not None and count is not None:
            took = flops * count / (gpu.peak * MFU * world) / 3600
            hours += took
            text += f"; {count:,} steps: {took:.3g} h on {world} x {gpu.name}"
        lines.append(f"{text}.")
    if gpu is not None:
        lines.append(f"Expected in all: {hours:.3g} h at {MFU:.0%} of {gpu.peak / 1e12:g} bf16 TFLOP/s (assumed).")
    return rows, lines


def stage_lengths(recipe: Recipe) -> dict[str, int | None]:
    """Steps of each stage as far as the recipe alone tells them."""
    lengths: dict[str, int | None] = {}
    for stage in recipe.stages:
        batch = stage.global_batch or recipe.run.global_batch
        lengths[stage.name] = stage.steps or (-(-stage.samples // batch) if stage.samples else None)
    return lengths
