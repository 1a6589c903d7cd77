"""The stored edits: tables of one layer, those of all layers together, and a snapshot of them."""

from .budget import Budget
from .group import MemoryGroup
from .snapshot import Fired, Snapshot
from .tables import EditMemory

__all__ = ["Budget", "EditMemory", "Fired", "MemoryGroup", "Snapshot"]
