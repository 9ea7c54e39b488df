"""Tasks that curricula train."""
