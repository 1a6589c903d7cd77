"""Who else measures: one process alone, or those that `accelerate launch` (or torchrun) started together."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch


class Processes(Protocol):
    """This process among the others.

    Attributes:
        index: which one this is, from 0.
        count: how many there are.
    """

    index: int
    count: int

    def gather(self, items: list) -> list:
        """Everybody's items, in the order of the processes, on each of them."""

    def wait(self) -> None:
        """Until all have come here."""


class Alone:
    """The only process."""

    index = 0
    count = 1

    def gather(self, items: list) -> list:
        return items

    def wait(self) -> None:
        pass


class Accelerated:
    """A process group that accelerate has set up; each process works on a device of its own."""

    def __init__(self, state: Any):
        self._state = state
        self.index = state.process_index
        self.count = state.num_processes

    def gather(self, items: list) -> list:
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        self._state.wait_for_everyone()


def join_processes() -> Processes:
    """The group that this process was launched in, by the environment's WORLD_SIZE; alone without one.

    Call it before a model is loaded: it chooses this process's device.

    Raises:
        ImportError: launched with others, but accelerate is not installed.
        RuntimeError: the others are not there.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched < 2:
        return Alone()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "WORLD_SIZE is set, but accelerate is not installed: pip install accelerate, or run one process."
        ) from error
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available())  # gloo; else the device's own
    if state.num_processes != launched:
        # Each would take itself for the only one, do all the work and write over the others' files.
        raise RuntimeError(
            f"WORLD_SIZE is {launched}, but accelerate sees {state.num_processes} processes: start them with "
            f"accelerate launch."
        )
    return Accelerated(state)
