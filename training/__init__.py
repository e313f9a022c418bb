"""From data to a calibrated artifact: protocols, losses, engine, evaluation, export."""
