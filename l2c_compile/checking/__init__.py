"""Check that a result is right: the reference, the proof and the comparison. They know no frontend, pass or backend."""
