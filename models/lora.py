"""Low-rank adapters (LoRA) on the linear layers of a part of a model, through the ``peft`` library."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm.models.errors import ModelError
from vlm.models.roles import Role


class Lora(NamedTuple):
    """W becomes W + (alpha / rank) B A, with A of ``rank`` rows and B zero at first; dropout acts on the input of A.

    LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022), section 4.1.
    """

    rank: int
    alpha: float
    dropout: float = 0.0


def is_adapter(name: str) -> bool:
    """Whether a weight of that name is one of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapters(part: Role) -> list[tuple[str, nn.Parameter]]:
    """The weights of the part's adapters by name; none where it has none."""
    return [(name, value) for name, value in part.named_parameters() if is_adapter(name)]


def linear_layers(part: Role, head: nn.Module | None) -> list[str]:
    """Names of the part's linear layers that an adapter can stand on: all that a pass reads but the head that makes
    logits.

    The output projection of torch's own multi-head attention is none: torch reads its weight and never calls it.
    """
    inside = {id(module.out_proj) for module in part.root.modules() if isinstance(module, nn.MultiheadAttention)}
    return [
        name
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) not in inside and not part.is_idle(name)
    ]


def adapt(part: Role, role: str, lora: Lora, head: nn.Module | None) -> None:
    """Put a fresh adapter on every linear layer of the part; the model computes what it did.

    Names of base weights gain ``.base_layer``. Adapters of a model in half precision are kept in float32, for the
    optimizer. Raises ModelError for a part that has no linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = linear_layers(part, head)
    if not names:
        raise ModelError(f"train.{role}.lora: expected a part with linear layers to adapt; {role} has none")
    wanted = {id(value): value.requires_grad for value in part.root.parameters()}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a number; peft divides by the rank
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, names)),
    )
    inject_adapter_in_model(config, part.root)
    vars(part.root).pop("peft_config", None)  # else the next part's adapters are taken for further ones of this
    for value in part.root.parameters():  # peft freezes all but adapters: who trains is said elsewhere
        value.requires_grad_(wanted.get(id(value), True))
    for name in names:
        layer: Any = part.root.get_submodule(name)
        layer.train(layer.get_base_layer().training)
    for _, value in adapters(part):
        if value.dtype in (torch.bfloat16, torch.float16):
            value.data = value.data.float()


@contextmanager
def without_adapters(root: nn.Module) -> Iterator[None]:
    """In this block ``root`` computes what it did before it got its adapters, to the bit.

    Raises ModelError for a model without adapters.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in root.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ModelError("adapters: expected a model with adapters to switch off; found none")
    # peft freezes adapters that it switches off, and sets all free that it switches on
    wanted = [(value, value.requires_grad) for layer in layers for value in layer.parameters()]  # type: ignore[attr-defined]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for value, trained in wanted:
            value.requires_grad_(trained)


def merge_adapters(root: nn.Module) -> None:
    """Add every adapter to its weight and take it away: the names of weights are those of the bare model again."""
    from peft.tuners.lora import LoraLayer

    found: Sequence[tuple[str, Any]] = [(n, m) for n, m in root.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in found:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, layer.get_base_layer())


def merged(root: nn.Module) -> Any:
    """``root`` itself where it has no adapters; otherwise a copy of it in which they are merged."""
    if not any(is_adapter(name) for name, _ in root.named_parameters()):
        return root
    copied = copy.deepcopy(root)
    merge_adapters(copied)
    return copied
