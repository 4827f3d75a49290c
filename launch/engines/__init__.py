"""Engines: how a student is wrapped, differentiated and stepped."""
