"""The seam into fairseq: an ascent before its train step, an average of the weights after it."""
