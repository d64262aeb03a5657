"""What a run will need, from its configuration and the model's config alone."""
