"""Studies of the methods: orderings of the papers, routing, interference. ``python -m studies.<name>``."""
