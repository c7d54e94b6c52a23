"""Data sets: readers, and the built-in generated one."""
