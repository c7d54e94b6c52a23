"""What a teacher is worth to a small student: the same student with and without it, over several seeds."""
