"""One model on several hosts: rank 0 runs the command, and the others compute with it."""
