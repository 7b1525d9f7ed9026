"""What all programs that prepare data share: encoding, files, options."""
