"""The TorchServe handler; it travels in the archive as ``open_set_handler.py``."""
