"""A Slurm cluster of real daemons on this machine, and what is tested on it."""
