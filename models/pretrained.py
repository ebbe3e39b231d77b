"""Vision-language models of Hugging Face, run through our layout and programs: no modeling code of our own."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from vlm.models.base import BaseVlm, Overview, pixel_seed
from vlm.models.errors import ModelError
from vlm.models.family import Picture, find_family
from vlm.models.processing import PER_TOKEN
from vlm.models.program.attach import RUN
from vlm.models.program.layout import IMAGE, PAD, TEXT, Layout, Side, compact
from vlm.models.program.perturb import edited, insertion
from vlm.models.program.run import Run
from vlm.models.program.signals import Vision
from vlm.models.roles import ROLES
from vlm.models.tower import PackedTower, Tower


class PretrainedInputs(NamedTuple):
    """A batch as a Hugging Face processor makes it: an image stands in ``tokens`` as often as it has visual tokens.

    visual marks those places. types are the processor's ``token_type_ids``, for the families that go by them. media
    are its tensors about images, whatever they are called. Images come in the order of their places. pack: which
    sequence of the decoder each row goes into (see :mod:`vlm.models.pack`); None: one each.
    """

    tokens: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"]
    visual: Bool[Tensor, "batch length"]
    media: Mapping[str, Tensor] = MappingProxyType({})
    types: Int[Tensor, "batch length"] | None = None
    keys: Sequence[str] = ()
    pack: Int[Tensor, " batch"] | None = None

    def take(self, keep: Bool[Tensor, "batch length"], side: Side) -> "PretrainedInputs":
        """The places to keep of every row, in order, padded on ``side``."""
        index, valid = compact(keep, side)
        tokens, visual = self.tokens.gather(1, index), self.visual.gather(1, index) & valid
        types = None if self.types is None else self.types.gather(1, index)
        return self._replace(tokens=tokens.masked_fill(~valid, 0), valid=valid, visual=visual, types=types)

    def without_images(self) -> "PretrainedInputs":
        """The same prompts with their images removed; text that a template put around an image stays."""
        return self.take(self.valid & ~self.visual, "left")._replace(media={})

    def insert(self, ids: Sequence[int], start: bool = False) -> "PretrainedInputs":
        """The same prompts with the tokens ``ids`` put in after their last image (with ``start``, and in a row without
        an image, after its first token)."""
        put = insertion(self.visual, self.valid, len(ids), start)
        return self._replace(
            tokens=put(self.tokens, self.tokens.new_tensor(ids)),
            valid=put(self.valid, 1),
            visual=put(self.visual, 0),
            types=None if self.types is None else put(self.types, 0),
        )

    def edit(
        self, ids: Sequence[Sequence[int]], at: Int[Tensor, " batch"], drop: Bool[Tensor, "batch length"] | None = None
    ) -> "PretrainedInputs":
        """The same prompts without the text at ``drop``, and with ``ids[row]`` after the place ``at`` of each row."""
        keep = self.valid if drop is None else self.valid & ~drop
        put, fresh, valid = edited(keep, at, ids, "left")
        types = None if self.types is None else put(self.types, 0)
        visual = put(self.visual, 0)
        return self._replace(tokens=put(self.tokens, fresh), valid=valid, visual=visual, types=types)

    def doubled(self) -> "PretrainedInputs":
        """The same prompts with their one image twice in succession. Raises ModelError where a row has more of them, or
        where the family needs to know more of an image than its pixels."""
        if not self.media:
            return self
        pixels, count = self.media.get("pixel_values"), self.visual.sum(1).tolist()
        shown = sum(number > 0 for number in count)
        if set(self.media) != {"pixel_values"} or self.types is not None or pixels is None or len(pixels) != shown:
            raise ModelError(
                "images: to show an image twice a row must have one, of one picture of fixed size; "
                f"found {shown} rows with images and {', '.join(sorted(self.media))}"
            )
        place = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        last = (self.visual * place).amax(1) - 1  # [B]
        token = self.tokens.gather(1, last.clamp_min(0)[:, None])[:, 0].tolist()  # the image's, where there is one
        new = self.edit([[one] * number for one, number in zip(token, count, strict=True)], last)
        put, fresh, _ = edited(self.valid, last, [[1] * number for number in count], "left")
        visual = put(self.visual, fresh)
        return new._replace(visual=visual, media={"pixel_values": pixels.repeat_interleave(2, 0)})


class PretrainedVlm(BaseVlm):
    """A Hugging Face model under the surface of :class:`~vlm.models.base.BaseVlm`.

    Its language model, head, encoder and connector are Transformers' own modules, and logits are Transformers' own to
    the bit; only the step between them, images into the sequence, is done here so that a program can act on it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.family = find_family(model.config.model_type)(model)
        self.model = model
        for level in range(self.family.deep):
            self.decoder.layers[level].register_forward_hook(partial(_add_deep, level), with_kwargs=True)

    @property
    def language(self) -> Any:
        return self.decoder

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    @property
    def places(self) -> Mapping[str, Sequence[str]]:
        return {role: [f"model.{place}" for place in places] for role, places in self.family.places.items()}

    @property
    def idle(self) -> Sequence[str]:
        return [f"model.{place}" for place in self.family.idle]

    @property
    def vision(self) -> Tower | PackedTower | None:
        """The vision encoder where programs can see it."""
        return self.family.tower

    @property
    def visual_tokens(self) -> int | None:
        return self.family.visual_tokens

    @property
    def vision_facts(self) -> Vision | None:
        tower = self.family.tower
        if tower is None:
            return None
        blocks, known = len(tower.blocks), {"width": tower.dim, "kind": tower.kind}
        return Vision(tower.depth, blocks, tower.output, tower.class_token, tower.cuts, **known)

    @property
    def refuses(self) -> Mapping[str, str]:
        kind = self.model.config.model_type
        step = f"{kind} encodes and projects images in one step of Transformers; prune at llm.in instead"
        padding = dict.fromkeys(("TokenShown", "PatchShown"), self._unpadded)
        return {**({} if self.family.tower else {"vit.out": step}), **padding, **self.family.refuses}

    def inputs(self, batch: Mapping[str, Any], keys: Sequence[str] = ()) -> PretrainedInputs:
        """The batch that a Hugging Face processor returned (``return_tensors="pt"``), as this model takes it.

        Raises ModelError for a video.
        """
        if video := [name for name, value in batch.items() if "video" in name and value is not None]:
            raise ModelError(f"{self.model.config.model_type}: images only here; found {video[0]}, a video")
        tokens = batch["input_ids"]
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens).bool()
        media = {name: value for name, value in batch.items() if name not in PER_TOKEN and isinstance(value, Tensor)}
        visual = (tokens == self.family.image_token) & valid
        return PretrainedInputs(tokens, valid, visual, media, batch.get("token_type_ids"), keys)

    def overview(self, layout: Layout, sample: int) -> Overview | None:
        shown = layout.image[sample][layout.visual[sample]]
        if not len(shown):
            return None
        image = self.family.whole_image(shown.unique().tolist())
        mine = layout.visual[sample] & (layout.image[sample] == image)
        rows, cols = (int(places[sample][mine].max()) + 1 for places in (layout.row, layout.col))
        return Overview(image, *self.family.whole_view(rows, cols))

    def visual_counts(self, inputs: PretrainedInputs) -> Int[Tensor, " batch"]:
        return inputs.visual.sum(1)

    def map_pixels(self, inputs: PretrainedInputs, change: Callable[[Tensor, int], Tensor]) -> PretrainedInputs:
        if "pixel_values" not in inputs.media:
            return inputs
        return inputs._replace(media=self.family.map_pixels(inputs.media, change))

    def patch_features(
        self, inputs: PretrainedInputs
    ) -> tuple[Float[Tensor, "batch visual width"], Bool[Tensor, "batch visual"]]:
        tower, count = self.family.tower, inputs.visual.sum(1).tolist()
        if not isinstance(tower, Tower):
            return super().patch_features(inputs)
        if "pixel_values" not in inputs.media:
            return torch.zeros(len(count), 0, 1, device=inputs.tokens.device), inputs.visual[:, :0]
        given: list[Tensor] = []
        hook = tower.projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        try:
            self.family.pictures(inputs.media)
        finally:
            hook.remove()
        slots = torch.cat(list(self.family.slots(inputs.media, given[0].shape[:2])))  # [tokens], -1 without a patch
        features = given[0].flatten(0, 1)[slots.clamp_min(0)]
        rows = [pad_sequence(list(flat.split(count)), batch_first=True) for flat in (features, slots >= 0)]
        return rows[0], rows[1]

    def encode(self, inputs: PretrainedInputs) -> Sequence[Picture]:
        """The images of a batch as visual tokens. Raises ModelError when they do not fill their places exactly."""
        pictures = self._pictures(inputs.media) if "pixel_values" in inputs.media else []
        _check_places(inputs, [len(picture.features) for picture in pictures])
        return self.family.join(pictures, inputs.visual)

    def _pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        """The images, cut in the encoder and after it where the program says so."""
        engine, tower = None if self.engine is None else self.engine.vision, self.family.tower
        if engine is None or tower is None or not engine.acts:
            return self.family.pictures(media)
        with tower.cutting(engine, self.family.views(media)) as marks:
            pictures = self.family.pictures(media)
        if not marks:
            return pictures
        kept = self.family.kept(marks[0], media)
        return [picture._replace(kept=left) for picture, left in zip(pictures, kept, strict=True)]

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        return self.family.logits(hidden)

    def _enter(self, inputs: PretrainedInputs, side: Side | None) -> tuple[Tensor, Run]:
        padded_left = bool((~inputs.valid[:, 0]).any())
        if side is not None and padded_left != (side == "left"):
            inputs = inputs.take(inputs.valid, side)
        pictures = self.encode(inputs)
        embeds = self.decoder.get_input_embeddings()(inputs.tokens.masked_fill(inputs.visual, 0))
        if pictures:
            features = torch.cat([picture.features for picture in pictures]).to(embeds)
            embeds = embeds.masked_scatter(inputs.visual[..., None], features)
        elif self.training and any(p.requires_grad for role in ROLES[:2] for p in self.parts[role].parameters()):
            embeds = embeds + self._blank(embeds)
        pixels, none = [picture.pixels[None] for picture in pictures], inputs.tokens.new_empty(0)
        seed = cache(lambda: torch.cat([none, *map(pixel_seed, pixels)]))
        layout, side = self._layout(inputs, pictures), side or ("left" if padded_left else "right")
        total = layout.visual.sum(1)
        if pictures and pictures[0].kept is not None:
            embeds, layout = self._drop(embeds, layout, pictures, side)
        run = Run(layout, side, seed)
        run.total = total
        grids = [(int(picture.row.max()) + 1, int(picture.col.max()) + 1) for picture in pictures]
        whole = all(rows * cols == len(p.row) for (rows, cols), p in zip(grids, pictures, strict=True))
        run.grids = grids if whole else []
        deep = zip(*(picture.deep for picture in pictures), strict=True)
        run.deep = [_spread(torch.cat(level), inputs.visual) for level in deep]
        return (embeds if self.engine is None else self.engine.enter_language(embeds, run)), run

    def _layout(self, inputs: PretrainedInputs, pictures: Sequence[Picture]) -> Layout:
        tokens, valid, visual = inputs.tokens, inputs.valid, inputs.visual
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        fill, nothing = torch.full_like(tokens, -1), tokens.new_empty(0)
        image = [torch.full_like(picture.row, number) for number, picture in enumerate(pictures)]
        image, row, col = (
            fill.masked_scatter(visual, torch.cat([nothing, *values]))
            for values in (image, [picture.row for picture in pictures], [picture.col for picture in pictures])
        )
        axes = self.family.axes(tokens, valid, visual, inputs.media)
        position = (valid.long().cumsum(1) - 1).clamp_min(0) + self.family.first_position
        return Layout(
            role=torch.where(visual, IMAGE, torch.where(valid, TEXT, PAD)),
            image=image,
            row=row,
            col=col,
            position=position if axes is None else axes.amax(2),
            sample=torch.arange(len(tokens), device=tokens.device)[:, None].expand(tokens.shape),
            source=place,
            axes=axes,
            block=self.family.block(visual, inputs.types),
        )

    def _drop(self, embeds: Tensor, layout: Layout, pictures: Sequence[Picture], side: Side) -> tuple[Tensor, Layout]:
        """The sequence without the visual tokens that a cut before the connector dropped."""
        left = torch.cat([picture.kept for picture in pictures if picture.kept is not None])
        kept = torch.zeros_like(layout.visual).masked_scatter(layout.visual, left)
        index, real = compact(layout.valid & (kept | ~layout.visual), side)
        taken = layout.take(index, real)
        assert self.engine is not None and self.engine.vision is not None  # it made the cut
        if self.engine.vision.position == "reindex":
            taken = taken.reindexed()
        return embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[2])), taken

    def _blank(self, embeds: Tensor) -> Tensor:
        """Zero, through the vision path: its parameters get a gradient while another rank waits to reduce theirs."""
        media = {name: value.to(embeds.device) for name, value in self.family.blank().items()}
        pictures = self.family.pictures(media)
        total = torch.stack([part.sum() for picture in pictures for part in (picture.features, *picture.deep)]).sum()
        return 0.0 * total.to(embeds.dtype)

    def _mask(self, embeds: Tensor, run: Run, cache: DynamicCache | None) -> Any:
        layout = run.layouts[0]
        plain = super()._mask(embeds, run, cache)
        if layout.block is None or not run.prompt or run.packed:
            return plain
        return self.model.create_masks_for_generate(
            self.model.config, embeds, plain, cache, layout.position, token_type_ids=self.family.mask_types(layout)
        )

    def _tag(self, run: Run) -> dict[str, Any]:
        return super()._tag(run) | ({RUN: run} if run.deep else {})


def load_pretrained(name: str | os.PathLike[str], meta: bool = False) -> PretrainedVlm:
    """A vision-language model of a folder or a hub name, in eval mode, with the attention that Transformers picks
    (sdpa where the family has it). On the meta device it is made of its config alone, without weights.

    Raises ModelError when there is none or its family is not one of ours.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: no checkpoint at {str(name)!r}: {str(error).splitlines()[0]}") from None
    find_family(config.model_type)  # before gigabytes are read
    if meta:
        with torch.device("meta"):
            return PretrainedVlm(AutoModelForImageTextToText.from_config(config)).eval()
    try:
        model = AutoModelForImageTextToText.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: cannot load {str(name)!r}: {str(error).splitlines()[0]}") from None
    return PretrainedVlm(model).eval()


def _check_places(inputs: PretrainedInputs, features: Sequence[int]) -> None:
    """Refuse a batch in which a row's image tokens are not those of whole images."""
    left = list(features)
    for row, found in enumerate(inputs.visual.sum(1).tolist()):
        expected = 0
        while expected < found and left:
            expected += left.pop(0)
        if expected != found:
            name = inputs.keys[row] if inputs.keys else f"row {row}"
            raise ModelError(f"sample {name}: expected {expected} image tokens, those of whole images; found {found}")
    if left:
        raise ModelError(f"expected a place for each of {len(features)} images; found none for the last {len(left)}")


def _spread(values: Float[Tensor, "tokens width"], visual: Bool[Tensor, "batch length"]) -> Tensor:
    """[batch, length, width] with the values at the visual places."""
    return values.new_zeros(*visual.shape, values.shape[1]).masked_scatter(visual[..., None], values)


def _add_deep(level: int, module: Any, args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Tensor | None:
    """Forward hook of decoder layer ``level``: add its visual features where the visual tokens now stand."""
    run: Run | None = kwargs.get(RUN)
    if run is None or not run.prompt or not run.deep:
        return None
    layout = run.layouts[run.stage(level)]
    visual = layout.visual
    added = hidden.clone()
    added[visual] = hidden[visual] + run.deep[level][layout.sample[visual], layout.source[visual]].to(hidden)
    return added
