"""The model: families, loading, chat templates and tokens, generation, hooks."""
