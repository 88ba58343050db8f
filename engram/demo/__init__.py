"""The parts of `engram demo`: real text, its traffic, a real model."""
