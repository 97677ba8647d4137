"""A real base model and real text, from the packages that carry them."""
