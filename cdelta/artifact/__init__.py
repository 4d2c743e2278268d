"""The paper's run: subjects, presets, stages, workflow, figures, and report."""
