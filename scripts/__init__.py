"""Set-up and benchmark: entry points, nothing to import from elsewhere."""
