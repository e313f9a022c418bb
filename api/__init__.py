"""The gateway: HTTP in, validated and bounded; image bytes out to TorchServe over a Unix socket. Knows no torch."""
