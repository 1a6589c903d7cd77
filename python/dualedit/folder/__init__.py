"""A folder of saved edits: PEFT's files, a journal of what came since, and a manifest of digests.

Works on the files alone, without torch. docs/files.md describes the format.
"""

from .journal import Damaged
from .lock import FolderLocked
from .reading import View, find_folder, read_folder
from .writing import Writer

__all__ = ["Damaged", "FolderLocked", "View", "Writer", "find_folder", "read_folder"]
