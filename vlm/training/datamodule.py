"""The Lightning data module: the slot-ordered stream of one stage, and its state on every rank.

Lightning would save only rank 0's loader state and lose a batch at each resume. So the
state travels with each micro-batch, the module of this file remembers that of the last one consumed, and a
checkpoint holds the slots of all ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule

from vlm.data.batch import Batch, Example
from vlm.data.draw import Draw
from vlm.data.schema import Sample
from vlm.data.store import Store
from vlm.data.stream import BadSamplePolicy, MicroBatch, Packing, SampleStream, StreamConfig, merge_states
from vlm.training.ranks import gather


class StageData(LightningDataModule):
    """The training data of one stage.

    Args:
        stores, weights: the sources of the mixture and their weights.
        prepare: makes an example of a sample; ``collate`` a batch of examples.
        layout: keyword arguments of :class:`~vlm.data.stream.StreamConfig` except rank and world.
        packing, repeat: see :class:`~vlm.data.stream.SampleStream`.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        prepare: Callable[[Sample, Draw], Example],
        collate: Callable[[list[Example]], Batch],
        layout: Mapping[str, int],
        tolerance: BadSamplePolicy,
        packing: Packing | None = None,
        repeat: bool = False,
    ) -> None:
        super().__init__()
        self.stores, self.weights = stores, weights
        self.prepare, self.collate = prepare, collate
        self.layout, self.tolerance = layout, tolerance
        self.packing, self.repeat = packing, repeat
        self.step = 0  # steps consumed
        self.slots: dict[str, Any] | None = None

    def train_dataloader(self) -> "SizedStream":
        trainer = self.trainer
        assert trainer is not None
        config = StreamConfig(rank=trainer.global_rank, world=trainer.world_size, **self.layout)
        stream = SampleStream(
            self.stores,
            self.weights,
            config,
            self.prepare,
            self.collate,
            self.slots,
            self.step,
            self.tolerance,
            packing=self.packing,
            repeat=self.repeat,
        )
        return SizedStream(stream, config.steps * trainer.accumulate_grad_batches)

    def consumed(self, micro: MicroBatch) -> None:
        """Remember the state after a window whose gradient has been used."""
        self.step, self.slots = micro.step + 1, micro.state

    def transfer_batch_to_device(self, batch: MicroBatch, device: Any, dataloader_idx: int) -> MicroBatch:
        return replace(batch, batch=batch.batch.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Called on every rank; all slots of the global batch."""
        return {"step": self.step, "slots": merge_states(gather(self.slots))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.slots = state_dict["step"], state_dict["slots"]


class SizedStream:
    """The stream with the length of the whole stage: what Lightning compares its own progress with on resume."""

    def __init__(self, stream: SampleStream, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.stream)
