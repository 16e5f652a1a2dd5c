"""How far a model is from its float source: in perplexity and divergence, and at the output of every layer."""
