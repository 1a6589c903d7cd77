"""DualEdit (COLM 2025): two cross-attention adapters behind a gate."""

from ..method import register_edit_method
from .config import DualEditConfig
from .layer import DualEditLayer
from .method import DualEditMethod
from .model import DualEditModel, inject_dualedit

__all__ = ["DualEditConfig", "DualEditLayer", "DualEditMethod", "DualEditModel", "inject_dualedit"]

register_edit_method(DualEditMethod())
