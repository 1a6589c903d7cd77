"""A small rendered world and a small real vision-language model to edit offline."""
