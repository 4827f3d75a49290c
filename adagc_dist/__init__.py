"""The AdaGC method and its training loop. Reads no environment, parses no arguments, opens no TIFF."""
