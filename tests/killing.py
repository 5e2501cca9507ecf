"""A plugin that ends its own training process at a given moment: SIGKILL, or SIGINT as by Ctrl-C."""

import json
import os
import signal

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class Killer(TrainerCallback):
    """Sends a signal to its own process at the nth call of a callback event."""

    def __init__(self, event, count, signal_name):
        self.count, self.number = count, getattr(signal, signal_name)
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **kwargs):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.number)


class KillingPlugin(BasePlugin):
    """Reads event, count and signal from the environment variable KILL_AT; does nothing without it."""

    def add_callbacks_pre_trainer(self, cfg, model):
        return [Killer(*json.loads(os.environ["KILL_AT"]))] if "KILL_AT" in os.environ else []
