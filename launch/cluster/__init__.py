"""A job of a batch system: the nodes it has, the steps it runs on them, and whether it goes back into the queue."""
