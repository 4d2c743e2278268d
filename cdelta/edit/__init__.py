"""Training the weight delta on the circuit's parameters, and choosing its scale."""
