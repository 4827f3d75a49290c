"""A made-up tree in the official layout of reBEN, which can be learnt from."""
