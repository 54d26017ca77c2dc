"""What was learned: reads `results/` and nothing else, and turns it into summaries, figures, comparisons and a report."""
