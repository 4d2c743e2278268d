"""Every other way to make a model refuse a category, and attacks on all of them."""
