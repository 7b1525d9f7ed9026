"""Table 2 of the delta-SAM paper: sentence embeddings with one command."""
