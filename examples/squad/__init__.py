"""SQuAD with one command."""
