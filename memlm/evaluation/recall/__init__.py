"""Documents in which facts are told, and questions for them."""
