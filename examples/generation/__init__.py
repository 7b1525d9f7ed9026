"""A small transformer and its BLEU with one command."""
