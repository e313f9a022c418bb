"""Tests: unit, contract and end to end."""
