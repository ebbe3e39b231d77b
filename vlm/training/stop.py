"""SIGTERM, which a scheduler sends before it takes a machine back: save after the step under way, and end with 0.

Lightning's own handler broadcasts inside the signal handler and asks all ranks before every batch, with a wait for the
GPU each time. Here a rank only notes the signal; the ranks hear of it with the number that they tell each other anyway
at the beginning of a step (see :meth:`~vlm.training.module.TrainingModule.training_step`), so that all stop after the
same one, however few of them were told.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer

from vlm.data.stream import MicroBatch
from vlm.training.callbacks import Save


class Told:
    """Whether this process was told to stop. One for all stages: what comes in the last step of a stage, or between
    two, is heard in the first step of the next."""

    heard = False

    def note(self, *_: Any) -> None:
        self.heard = True


@contextmanager
def listening() -> Iterator[Told]:
    """Notes SIGTERM inside, where this is the main thread."""
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, told.note)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


class Stop(Callback):
    """``done`` is the number of steps after which the run was stopped, None while it was not."""

    def __init__(self, save: Save, told: Told) -> None:
        self.saver, self.told = save, told
        self.done: int | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """The handler is there before the loader's workers begin: a signal to the whole job must not end them in the
        middle of a step."""
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        pl_module.told_to_stop = lambda: self.told.heard

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if not (pl_module.stop and batch.last_in_window):
            return
        self.done = batch.step + 1
        self.saver.save_unless_saved(trainer, self.done)
        trainer.should_stop = True
