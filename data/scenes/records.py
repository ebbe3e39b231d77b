"""Scenes as samples of shards: each a pure function of (seed, split, number), so any process may make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.scenes import text
from vlm.data.scenes.render import png
from vlm.data.scenes.world import Scene, World, generator
from vlm.data.schema import Message, Part, Sample


@dataclass(frozen=True)
class Batch:
    """The scenes [first, last) of a split and how many records each gives, the last scene perhaps fewer."""

    world: World
    seed: int
    split: str
    first: int
    last: int
    records_per_scene: int
    records: int


def draw_scene(world: World, seed: int, split: str, number: int) -> Scene:
    """Scene `number` of a split. A counterfactual one is a biased scene without what is expected in it.

    In the biased world it is the test scene of the same number that is changed. The uniform world has nothing expected,
    so its model is judged on the counterfactual scenes of the biased one, and both arms see the same pictures.
    """
    if split != "counterfactual":
        return world.draw(generator(seed, split, number), split)
    biased = World("biased")
    scene = biased.draw(generator(seed, "test", number), "test")
    return biased.counterfactual(scene, generator(seed, split, number))


def make_batch(batch: Batch) -> list[Sample]:
    """The samples of a batch in order: training scenes with the mix of the spec, the others with a full caption."""
    samples = []
    for number in range(batch.first, batch.last):
        scene = draw_scene(batch.world, batch.seed, batch.split, number)
        picture = png(scene)
        first = number * batch.records_per_scene
        for record in range(first, min(first + batch.records_per_scene, batch.records)):
            rng = generator(batch.seed, batch.split, number, purpose=1 + record - first)
            chat = text.chat(scene, rng) if batch.split == "train" else (text.caption(scene, rng),)
            samples.append(_sample(f"{batch.split}/{record:06d}", scene, picture, chat))
    return samples


def _sample(key: str, scene: Scene, picture: bytes, chat: Sequence[text.Exchange]) -> Sample:
    messages = []
    for turn, exchange in enumerate(chat):
        shown = (Part("image", ref=0),) if turn == 0 else ()
        messages.append(Message("user", (*shown, Part("text", text=exchange.prompt))))
        messages.append(Message("assistant", (Part("text", text=exchange.answer),), weight=exchange.weight))
    return Sample(
        key=key,
        messages=tuple(messages),
        media=(picture,),
        media_ext=("png",),
        tags=scene.names,
        source="scenes",
        meta=scene.to_meta(),
    )
