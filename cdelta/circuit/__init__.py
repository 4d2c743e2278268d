"""From scores to a circuit and the parameters that it owns."""
