"""Decoding methods, ours and the baselines, behind one interface and by one kind of name."""
