"""Everything that is decided before work starts: recipe, memory, jobs, and the place of every output byte."""
