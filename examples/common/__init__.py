"""What the example programs share: running stages, reading logs, data made here."""
