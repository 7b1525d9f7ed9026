"""Workarounds for what fairseq does wrong, whatever the method; they use nothing else of ours.

Each module says what goes wrong without it and has an ``install``, called by ``plugin.install``.
"""
