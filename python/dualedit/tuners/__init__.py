"""The editing methods as PEFT methods: config, wrapped layer, tuner. Importing registers them with PEFT."""

from .adapter import EditAdapter, active_adapter, adapter_of
from .adapters import disabled, lifted, remove_adapter
from .balancedit import BalancEditConfig, inject_balancedit
from .config import EditConfig
from .dualedit import DualEditConfig, inject_dualedit
from .layer import EditLayer
from .method import EditMethod, register_edit_method
from .model import EditTuner

__all__ = [
    "BalancEditConfig",
    "DualEditConfig",
    "EditAdapter",
    "EditConfig",
    "EditLayer",
    "EditMethod",
    "EditTuner",
    "active_adapter",
    "adapter_of",
    "disabled",
    "inject_balancedit",
    "inject_dualedit",
    "lifted",
    "register_edit_method",
    "remove_adapter",
]
