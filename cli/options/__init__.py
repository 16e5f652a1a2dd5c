"""Options that several commands share, and what becomes of them: prompts, sampling, loading, reading."""
