"""The version, in one place: the package, its distribution, cards and run folders read it here."""

__version__ = "0.1.0"
