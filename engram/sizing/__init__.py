"""Sizing: from the n-grams that were asked for to how much memory they want."""
