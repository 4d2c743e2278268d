"""The edit: recipe, training rows, training, stop rule and scale. Names are imported from the modules."""
