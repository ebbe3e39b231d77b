"""What the vision backbones written by us share: variants, published weights, and their maps as an encoder's features.

A backbone's file holds its network (an ``nn.Module`` whose state dict has the keys of the published checkpoints), a
table of variants, and a subclass of :class:`BackboneEncoder` that names both.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vlm.models.encoder import Features, ImageSpec, unread
from vlm.models.errors import ModelError
from vlm.models.part import Part

_WRAPPERS = ("model", "state_dict", "module")  # under which training scripts keep the weights in a file
_SHOWN = 6  # keys of each kind that a message lists


class Network(Protocol):
    """What :class:`BackboneEncoder` asks of a network. stages: their number, or the modules themselves.

    A network with tokens before its patches says how many in ``prefix``; its maps come as pairs with them.
    """

    stages: int | nn.ModuleList

    def maps(self, images: Float[Tensor, "images 3 height width"]) -> Iterator[Float[Tensor, "images width rows cols"]]:
        """The map of every stage in order, each computed when it is asked for; the last with the final norm."""
        ...


class BackboneEncoder(Part):
    """A backbone of ours as an encoder: its features are the map of one stage, what comes after is removed.

    Args:
        variant: a published configuration, by name.
        weights: file with published weights, safetensors or a torch checkpoint without code in it; random weights if
            not given. Its classification head is not needed.
        layer: stage whose map is taken (block, in a backbone of one resolution). -2 is usual: stride 16 in a pyramid;
            -1 is the last stage, with the network's final norm where it has one.
        image: side of the input in pixels; the one of the published weights by default. Images of other sizes and
            shapes are taken as they come.
        config: settings of the network that differ from the variant's.
    """

    network: ClassVar[Any]  # makes a Network of the settings of a variant
    # Settings of the network by variant; besides them `image`, the side in pixels where it is not `native`.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    native: ClassVar[int] = 224
    smallest: ClassVar[int] = 32  # side of an image in pixels that the network can take
    multiple: ClassVar[int] = 1  # of which both sides of an image must be multiples
    mean: ClassVar[tuple[float, float, float]] = IMAGENET_DEFAULT_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_DEFAULT_STD
    heads: ClassVar[tuple[str, ...]] = ("head",)  # where weights lie that only classify
    # Maps that a layer norm without weights ends, because a connector needs features of one scale: those of inner
    # stages come as a residual sum that nothing has normalised.
    normalized: ClassVar[Literal["inner", "all", "none"]] = "inner"
    blind: str = "its blocks do not attend to all tokens"
    cuts: str = "its blocks work on maps"

    def __init__(
        self,
        variant: str,
        weights: str | None = None,
        layer: int = -2,
        image: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__.lower()
        settings = self.settings(variant) | dict(config or {})
        native = settings.pop("image", self.native)
        if wrong := [key for key in settings if key not in signature(self.network).parameters]:
            raise ModelError(f"model.vision.config: {name} {_nearest(wrong[0], signature(self.network).parameters)}")
        self.model: Any = self.network(**settings)
        stages = self.model.stages
        self.depth: int = stages if isinstance(stages, int) else len(stages)
        if not -self.depth <= layer < self.depth:
            raise ModelError(
                f"model.vision: {name} {variant} has layers {-self.depth}..{self.depth - 1}; found layer {layer}"
            )
        self.output, self.image = layer % self.depth, ImageSpec(image or native, self.mean, self.std)
        self.prefix, self.class_token = int(getattr(self.model, "prefix", 0)), getattr(self.model, "prefix", 0) > 0
        if weights is not None and torch.empty(0).device.type != "meta":  # a plan needs the shape and no weights
            load_weights(self.model, weights, self.heads)
        self.dim, self.grid, ran = self._measure()
        self._drop_unread(ran)

    @classmethod
    def settings(cls, variant: str) -> dict[str, Any]:
        """Settings of a variant. Raises ModelError with the nearest name for one that is not there."""
        if variant not in cls.variants:
            raise ModelError(f"model.vision.variant: {cls.__name__.lower()} {_nearest(variant, cls.variants)}")
        return dict(cls.variants[variant])

    @classmethod
    def whole(cls, variant: str, **config: Any) -> Any:
        """The whole network of a variant, head included, with random weights: what published weights are for."""
        settings = cls.settings(variant) | config
        settings.pop("image", None)
        return cls.network(**settings)

    def options(self) -> dict[str, Any]:
        return super().options() | {"weights": None}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks of attention to all tokens, where the network has nothing else."""
        return () if self.blind else list(self.model.blocks)[: self.output + 1]

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        self._check(images)
        stage = next(islice(self.model.maps(images), self.output, None))
        prefix = None
        if isinstance(stage, tuple):  # a network with tokens before its patches hands over both
            prefix, stage = stage  # [N,P,V] and [N,V,h,w]
        grid = stage.shape[2], stage.shape[3]
        tokens = stage.flatten(2).transpose(1, 2)  # [N,h*w,V]
        inner = self.output < self.depth - 1
        if self.normalized == "all" or (self.normalized == "inner" and inner):
            tokens = F.layer_norm(tokens, tokens.shape[2:])
        return Features(tokens, grid, prefix)

    def _check(self, images: Tensor) -> None:
        sides = images.shape[2:]
        if min(sides) < self.smallest or any(side % self.multiple for side in sides):
            kind = f"multiples of {self.multiple} of " if self.multiple > 1 else ""
            raise ModelError(
                f"model.vision: {type(self).__name__.lower()}: expected images whose sides are {kind}{self.smallest} "
                f"pixels or more; found {sides[0]} x {sides[1]}"
            )

    def _measure(self) -> tuple[int, tuple[int, int], set[str]]:
        """Width and grid for images of the declared size, and the names of the modules that run: from a pass on the
        meta device, which computes nothing."""
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        blank = torch.empty(2, 3, self.image.size, self.image.size, device="meta")
        ran: set[str] = set()
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
            for name, module in self.named_modules()
        ]
        with torch.no_grad():
            features = functional_call(self, {k: torch.empty_like(v, device="meta") for k, v in state.items()}, blank)
        for handle in handles:
            handle.remove()
        return features.tokens.shape[2], features.grid, ran

    def _drop_unread(self, ran: set[str]) -> None:
        """Modules that neither run nor hold weights that the features depend on (later stages, the head) leave an empty
        place."""
        needed = ({name for name, _ in self.named_parameters()} - set(unread(self))) | ran
        for name, module in list(self.named_modules()):
            own = any(True for _ in module.parameters())
            if own and name and not any(f"{other}.".startswith(f"{name}.") for other in needed):
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, nn.Identity())


def init_linear(module: nn.Module) -> None:
    """The start of most of these networks, for ``apply``: linear weights normal of deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def relative_offsets(rows: int, cols: int) -> Int[Tensor, "places places"]:
    """Where in a bias table of (2 rows - 1) x (2 cols - 1) offsets the one of each query and key of a grid lies."""
    row, col = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
    down, right = row[:, None] - row + rows - 1, col[:, None] - col + cols - 1
    return down * (2 * cols - 1) + right


def load_weights(model: nn.Module, path: str, heads: Sequence[str] = ()) -> None:
    """Put the weights of a published checkpoint into ``model``, all or none.

    Weights of the modules ``heads`` are taken where the file has them in the model's shape. Counters of batch norms,
    which old files lack, may be missing.

    Raises:
        ModelError: a file that cannot be read, or one line with the keys that are missing, unexpected or of another
            shape; the model is as it was then.
    """
    found = _read(path)
    own = model.state_dict()
    of_head = {key for key in {*own, *found} if key.startswith(tuple(f"{head}." for head in heads))}
    optional = {key for key in own if key in of_head or key.endswith("num_batches_tracked")}
    wrong = {
        "missing": [key for key in own if key not in found and key not in optional],
        "unexpected": [key for key in found if key not in own and key not in of_head],
        "of another shape": [
            f"{key} (expected {tuple(own[key].shape)}, found {tuple(value.shape)})"
            for key, value in found.items()
            if key in own and key not in of_head and value.shape != own[key].shape
        ],
    }
    shown = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in wrong.items() if keys]
    if shown:
        raise ModelError(f"model.vision.weights: {path} does not fit the variant; {'; '.join(shown)}")
    fits = {key: value for key, value in found.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fits, strict=False)


def _read(path: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names in the network."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a file of the wrong kind raises anything
        known = isinstance(error, OSError | SafetensorError)
        reason = str(error).splitlines()[0] if known else "neither safetensors nor a torch checkpoint of plain tensors"
        raise ModelError(f"model.vision.weights: {path} cannot be read: {reason}") from None
    for key in _WRAPPERS:
        held = held[key] if isinstance(held, Mapping) and isinstance(held.get(key), Mapping) else held
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ModelError(f"model.vision.weights: {path}: expected tensors by name, alone or under {_listed(_WRAPPERS)}")
    parallel = all(key.startswith("module.") for key in held)  # saved from DistributedDataParallel
    return {key.removeprefix("module.") if parallel else key: value for key, value in held.items()}


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(str(name), list(known), n=3, cutoff=0.4)
    return f"has no {name!r}; {'similar' if near else 'it has'}: {', '.join(near or known)}"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
