"""Restate services, one per pattern. The list below is the architecture."""
