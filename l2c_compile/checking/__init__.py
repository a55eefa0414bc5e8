"""Is it right? The reference, the proof and the comparison; they know no frontend, no pass and no backend."""
