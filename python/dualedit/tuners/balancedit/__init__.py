"""BalancEdit (ICML 2025): a codebook at one linear layer."""

from ..method import register_edit_method
from .config import BalancEditConfig
from .layer import BalancEditLayer
from .method import BalancEditMethod
from .model import BalancEditModel, inject_balancedit

__all__ = ["BalancEditConfig", "BalancEditLayer", "BalancEditMethod", "BalancEditModel", "inject_balancedit"]

register_edit_method(BalancEditMethod())
