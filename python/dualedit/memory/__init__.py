"""The stored edits: tables of one layer, those of all layers together, and a snapshot of them."""

from .group import MemoryGroup
from .snapshot import Snapshot
from .tables import EditMemory

__all__ = ["EditMemory", "MemoryGroup", "Snapshot"]
