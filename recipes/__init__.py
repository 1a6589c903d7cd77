"""How the shipped models and editors were trained: scripts that use the library."""
