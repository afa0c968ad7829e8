"""Scripts that make or measure what the repository holds; none of it is in the wheel."""
