"""What is the same when a model is trained, calibrated and served."""
