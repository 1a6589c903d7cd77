"""Nearest-key routing: which edit, if any, a query belongs to."""
