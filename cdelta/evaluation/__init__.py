"""From answers to rates: judges, rows, intervals, comparisons."""
