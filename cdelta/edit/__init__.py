"""The edit: recipe, training rows, training, stop rule and scale."""
