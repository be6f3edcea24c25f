"""FAKE of the vendor's helpers."""
