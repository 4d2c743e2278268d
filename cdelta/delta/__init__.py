"""The weight delta: arithmetic, and its way into a checkpoint and back."""
