"""Exact, faster forms of what the plain stack computes; each is optional and falls back by itself."""
