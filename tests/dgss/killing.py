"""A callback that kills its own process, as an operating system short of memory would."""

import os
import signal

from lightning.pytorch.callbacks import Callback


class Kill(Callback):
    """Args: when: the name of a hook; batch: the micro-batch of the run, from 0, in which it strikes."""

    def __init__(self, when: str, batch: int) -> None:
        self.when, self.batch = when, batch

    def _strike(self, trainer, when):
        if when == self.when and trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, *rest):
        self._strike(trainer, "on_train_batch_start")

    def on_before_optimizer_step(self, trainer, *rest):
        self._strike(trainer, "on_before_optimizer_step")

    def on_validation_batch_start(self, trainer, *rest):
        self._strike(trainer, "on_validation_batch_start")
