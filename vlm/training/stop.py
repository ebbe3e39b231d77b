"""SIGTERM, which a scheduler sends before it takes a machine back: save after the step under way, and end with 0.

Lightning's own handler broadcasts inside the signal handler and asks all ranks before every batch, with a wait for the
GPU each time. Here a rank only notes the signal; the ranks hear of it with the number that they tell each other anyway
at the beginning of a step (see :meth:`~vlm.training.module.TrainingModule.training_step`), so that all stop after the
same one, however few of them were told.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Callback, Trainer

from vlm.data.stream import MicroBatch
from vlm.training.callbacks import Save


class Stop(Callback):
    """``done`` is the number of steps after which the run was stopped, None while it was not."""

    def __init__(self, save: Save) -> None:
        self.saver, self.before = save, None
        self.done: int | None = None
        self.told = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before the loader's workers begin: a signal to the whole job must not end them in the middle of a step."""
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        pl_module.told_to_stop = lambda: self.told
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.told = True

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if not (pl_module.stop and batch.last_in_window):
            return
        self.done = batch.step + 1
        self.saver.save_unless_saved(trainer, self.done)
        trainer.should_stop = True
