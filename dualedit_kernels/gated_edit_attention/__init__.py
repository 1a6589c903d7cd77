"""Gated edit attention: cross-attention to the routed edit, untouched where no edit is routed."""
