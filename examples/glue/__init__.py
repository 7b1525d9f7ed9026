"""Tasks x methods x seeds on GLUE or your own TSV files, and the report that compares them."""
