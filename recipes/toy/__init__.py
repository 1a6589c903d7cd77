"""Training of the toy model, its editors and its baselines: ``python -m recipes.toy.<name>``."""
