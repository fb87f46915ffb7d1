"""The one place that holds the version; the build reads it from here without importing anything."""

__version__ = "0.1.0"
