"""This paper's run: subjects, presets, stages, figures, report."""
