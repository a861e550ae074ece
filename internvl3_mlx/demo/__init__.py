"""The demo checkpoint and its sample pictures, shipped with the package."""
