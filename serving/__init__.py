"""Packs an artifact into an archive; configures, starts, supervises, heals and stops TorchServe."""
