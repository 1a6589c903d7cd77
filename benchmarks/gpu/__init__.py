"""What only a GPU can tell, what compilers tell without one, and the goals that are set for one."""
