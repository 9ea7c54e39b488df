"""Language models that read and write any memory."""
