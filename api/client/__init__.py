"""Command-line client of the gateway: ``python -m api.client predict FOLDER --out results.parquet``."""
