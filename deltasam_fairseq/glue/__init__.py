"""GLUE and your own TSV files: prepare the data, write predictions."""
